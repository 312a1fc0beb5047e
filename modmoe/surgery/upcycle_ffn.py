"""One dense feed-forward network made into a pool of experts; tensors in, tensors out.

Letters: E experts, I intermediate size of the dense FFN, H hidden size.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.surgery.balanced_kmeans import balanced_kmeans

Method = Literal["copy", "cluster"]
METHODS: tuple[Method, ...] = get_args(Method)

# The neurons of an FFN are rows of these; the first half of `gate_up_proj` are gates.
_UP_NAMES = ("gate_up_proj", "up_proj")


class UpcycledFFN(NamedTuple):
    """What a routed pool takes."""

    experts: dict[str, Tensor]
    """Weights under the names of the dense FFN, (E, ...)."""
    router: Tensor | None
    """(E, H) fp32, weight of a linear router; None for copies, between which nothing can choose yet."""


def upcycle_ffn(
    weights: Mapping[str, Tensor],
    method: Method,
    num_experts: int,
    top_k: int,
    *,
    reinit: float = 0.0,
    input_scale: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> UpcycledFFN:
    """
    Experts of one dense FFN, and a router that knows them.

    "copy": every expert is the FFN (sparse upcycling, arXiv:2212.05055), of which `reinit` draws anew a share of each
    expert's own random neurons (arXiv:2502.19261). The start equals the FFN for any top-k if gates sum to one
    (`norm_topk_prob`). "cluster": every expert is a cluster of I / E neurons (arXiv:2110.01786, arXiv:2310.10908).
    All of them add up to the FFN if gates are one (`unit_gates`); a top-k below E leaves out the other neurons.

    Args:
        weights: of a dense `GatedFFN` or `PlainFFN`, as in its `state_dict()`: (1, ...).
        method: "copy" or "cluster".
        num_experts: E; a divisor of I for "cluster".
        top_k: experts that a token will use; "cluster" divides the FFN's output bias among so many.
        reinit: share of neurons, 0 to 1, for "copy" alone.
        input_scale: (H,) typical size of the FFN's inputs, such as the weight of the norm before it; the router's
            logits then have a standard deviation near 1. Ones if None.
        generator: of all randomness, on the CPU.

    Returns:
        weights in the dtype and on the device that they came in.

    Raises:
        ValueError: for another method, a share outside 0 to 1, or E that does not fit.
    """
    experts, router = split_ffn(
        weights, method, num_experts, top_k, reinit=reinit, input_scale=input_scale, generator=generator
    )
    parts = list(experts)
    return UpcycledFFN({name: torch.cat([part[name] for part in parts]) for name in weights}, router)


def split_ffn(
    weights: Mapping[str, Tensor],
    method: Method,
    num_experts: int,
    top_k: int,
    *,
    reinit: float = 0.0,
    input_scale: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Iterator[dict[str, Tensor]], Tensor | None]:
    """As `upcycle_ffn`, but the experts come one after another, (1, ...) each: memory need not hold all of them."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if not 0.0 <= reinit <= 1.0:
        raise ValueError(f"reinit={reinit} must be a share between 0 and 1 of each expert's neurons")
    if method == "copy":
        return (_redraw(weights, reinit, generator) for _ in range(num_experts)), None
    if reinit:
        raise ValueError(f"reinit={reinit} would break up the clusters: it belongs to method='copy'")
    keys = _keys(weights)
    clusters = cluster_neurons(keys, num_experts, generator)
    return (_take(weights, own, top_k) for own in clusters), centroid_router(keys, clusters, input_scale)


def check_divides(num_experts: int, intermediate_size: int) -> None:
    """
    Raises:
        ValueError: if clusters cannot have the same size; names a number that fits.
    """
    if num_experts > 0 and intermediate_size % num_experts == 0:
        return
    divisors = [n for n in range(1, intermediate_size + 1) if intermediate_size % n == 0]
    raise ValueError(
        f"num_experts={num_experts} does not divide the {intermediate_size} neurons (intermediate_size) of a dense "
        f"FFN: choose a divisor, such as {min(divisors, key=lambda n: abs(n - num_experts))}"
    )


def cluster_neurons(keys: Tensor, num_experts: int, generator: torch.Generator | None = None) -> Tensor:
    """(I, H) -> (E, I / E) int64: neurons that look for similar inputs: balanced k-means on the keys' directions."""
    check_divides(num_experts, len(keys))
    return balanced_kmeans(F.normalize(keys, dim=-1), num_experts, generator=generator)


def centroid_router(keys: Tensor, clusters: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """(I, H), (E, I / E) -> (E, H): mean directions of keys, so long that inputs of `input_scale` score about 1."""
    centroids = F.normalize(keys, dim=-1)[clusters].mean(1)
    seen = centroids if input_scale is None else centroids * input_scale.to(centroids)
    return centroids / seen.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def _keys(weights: Mapping[str, Tensor]) -> Tensor:
    """(I, H) in fp32 or wider: what each neuron looks for in an input; of a gated FFN, the gate decides."""
    neurons = next(_by_neuron(name, weights)[0, 0] for name in _UP_NAMES if name in weights)
    return neurons.to(torch.promote_types(neurons.dtype, torch.float32))


def _by_neuron(name: str, weights: Mapping[str, Tensor]) -> Tensor:
    """A view whose third dimension runs over neurons: (1, 2 or 1, I, ...), or of `down_proj` (1, H, I)."""
    return weights[name] if name == "down_proj" else weights[name].unflatten(1, (-1, weights["down_proj"].shape[2]))


def _per_neuron(weights: Mapping[str, Tensor]) -> list[str]:
    """All names except the output bias, which belongs to no neuron."""
    return [name for name in weights if name != "down_proj_bias"]


def _take(weights: Mapping[str, Tensor], neurons: Tensor, top_k: int) -> dict[str, Tensor]:
    """The FFN of some of the neurons, and of one out of `top_k` parts of the output bias."""
    part = {name: bias / top_k for name, bias in weights.items() if name == "down_proj_bias"}
    for name in _per_neuron(weights):
        chosen = _by_neuron(name, weights).index_select(2, neurons)
        part[name] = chosen if name == "down_proj" else chosen.flatten(1, 2)
    return part


def _redraw(weights: Mapping[str, Tensor], share: float, generator: torch.Generator | None) -> dict[str, Tensor]:
    """A copy, of which a share of the neurons is drawn from normal distributions with their old mean and deviation."""
    size = weights["down_proj"].shape[2]
    neurons = torch.randperm(size, generator=generator)[: round(share * size)]
    part = dict(weights)
    for name in _per_neuron(weights) if len(neurons) else ():
        part[name] = weights[name].clone()
        view = _by_neuron(name, part)
        own = neurons.to(view.device)
        old = view.index_select(2, own).float()
        dims = [d for d in range(old.ndim) if d != 1 or name == "down_proj"]  # gates and ups each have their own
        std, mean = torch.std_mean(old, dim=dims, correction=0, keepdim=True)
        noise = torch.randn(old.shape, generator=generator).to(old)
        view.index_copy_(2, own, (mean + std * noise).to(view.dtype))
    return part
