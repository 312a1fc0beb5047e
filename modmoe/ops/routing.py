"""From router logits to experts, and from experts to the order in which grouped products want the rows.

Letters: N tokens, E experts, K experts per token, S = N * K (token, slot) pairs; pair p = token * K + slot.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import routing_cpp, routing_cuda
from .backend import choose_backend, library, requested_backend

ROUTE_BACKENDS = ("torch", "cuda")
PLAN_BACKENDS = ("cpp", "torch", "cuda")


class Routing(NamedTuple):
    """The experts of each token: gates (N, K) in float32 and expert ids (N, K) in int64, E for "none"."""

    top_k_weights: Tensor
    top_k_index: Tensor


class DispatchPlan(NamedTuple):
    """How pairs are grouped by expert.

    Attributes:
        tokens_per_expert: (E,) int32, number of pairs of each expert.
        offsets: (E,) int32, its inclusive cumulative sum: expert e owns sorted rows offsets[e - 1] to offsets[e].
        order: (S,) int64, the pair in each sorted row; stable, pairs with no expert last.
        inverse: (S,) int64, the sorted row of each pair.
    """

    tokens_per_expert: Tensor
    offsets: Tensor
    order: Tensor
    inverse: Tensor


def route(
    logits: Tensor,
    top_k: int,
    *,
    token_mask: Tensor | None = None,
    selection_bias: Tensor | None = None,
    renormalize: bool = False,
    sample_top_k: int = 0,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Routing:
    """Choose `top_k` experts for each token, gated by a softmax over all experts (in float32).

    Gradient reaches `logits` through the gates alone; the choice itself has none.

    Args:
        logits: (N, E), any floating dtype; float64 stays float64.
        top_k: number of experts per token, 1 to E.
        token_mask: (N,) bool; False tokens get gate 0 and expert id E, and so take no slot anywhere.
        selection_bias: (E,), added to the probabilities for the choice only (arXiv:2408.15664). An expert with -inf is
            never chosen; at least `top_k` must be finite.
        renormalize: divide the gates of a token by their sum.
        sample_top_k: of the `top_k`, how many are drawn at random, without replacement, with weights p + 1e-6; the
            others are the best ones (ModuleFormer `sample_topk`, for training).
        generator: source of that randomness.
        backend: see `modmoe.ops.backend`.

    Returns:
        Gates and expert ids, (N, K) each, best expert first (drawn ones after the best ones).

    Raises:
        ValueError: shapes that do not fit, `top_k` not in 1..E, `sample_top_k` not in 0..top_k.
        TypeError: logits that are not floating point, a mask that is not bool.
        RuntimeError: a backend that cannot be had; "cuda" does not sample.
    """
    _check_route(logits, top_k, token_mask, selection_bias, sample_top_k)
    if requested_backend("route", backend, ROUTE_BACKENDS) == "cuda":
        if sample_top_k:
            raise RuntimeError(f"route: backend 'cuda' does not sample, got sample_top_k={sample_top_k}; use 'torch'")
        return Routing(*torch.ops.modmoe.route(logits, top_k, token_mask, selection_bias, renormalize))
    num_experts = logits.shape[1]
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        index = _choose(probs, top_k, selection_bias, sample_top_k, generator)
    weights = probs.gather(1, index)
    if renormalize:
        # A selection bias can choose experts whose probabilities underflow.
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    if token_mask is not None:
        weights = weights.masked_fill(~token_mask[:, None], 0.0)
        index = index.masked_fill(~token_mask[:, None], num_experts)
    return Routing(weights, index)


def _choose(
    probs: Tensor, top_k: int, bias: Tensor | None, sample_top_k: int, generator: torch.Generator | None
) -> Tensor:
    scores = probs if bias is None else probs + bias
    best = scores.topk(top_k - sample_top_k, dim=-1).indices
    if not sample_top_k:
        return best
    chances = (probs + 1e-6).masked_fill(scores.isneginf(), 0.0).scatter(1, best, 0.0)
    # As torch.multinomial draws, the same numbers even; but that asserts on its input first, in some versions on the
    # host.
    race = chances / torch.empty_like(chances).exponential_(generator=generator)
    return torch.cat([best, race.topk(sample_top_k, dim=-1).indices], dim=-1)


def _check_route(
    logits: Tensor, top_k: int, token_mask: Tensor | None, selection_bias: Tensor | None, sample_top_k: int
) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be (tokens, experts), got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    num_tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and the number of experts ({num_experts}), got {top_k}")
    if not 0 <= sample_top_k <= top_k:
        raise ValueError(f"sample_top_k must be between 0 and top_k ({top_k}), got {sample_top_k}")
    if selection_bias is not None and selection_bias.shape != (num_experts,):
        raise ValueError(f"selection_bias must have shape ({num_experts},), got {tuple(selection_bias.shape)}")
    if token_mask is not None:
        if token_mask.dtype != torch.bool:
            raise TypeError(f"token_mask must be bool (True = real token), got {token_mask.dtype}")
        if token_mask.shape != (num_tokens,):
            raise ValueError(f"token_mask must have shape ({num_tokens},), got {tuple(token_mask.shape)}")


def dispatch_plan(top_k_index: Tensor, num_experts: int, *, backend: str | None = None) -> DispatchPlan:
    """Group the (token, slot) pairs by expert; all shapes are static and nothing is read back from the device.

    Args:
        top_k_index: (N, K) integer expert ids, 0 to E - 1, or E for a slot without an expert. On other devices than
            the CPU, where a look would stop the device, values are not checked.
        num_experts: E.
        backend: see `modmoe.ops.backend`.

    Returns:
        The plan; see `DispatchPlan`.

    Raises:
        ValueError: `top_k_index` is not (N, K) or has other values, or `num_experts` < 1.
        TypeError: `top_k_index` is not an integer tensor.
        RuntimeError: a backend that cannot be had.
    """
    if top_k_index.dim() != 2:
        raise ValueError(f"top_k_index must be (tokens, top_k), got shape {tuple(top_k_index.shape)}")
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"top_k_index must be int64 or int32, got {top_k_index.dtype}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    name = requested_backend("dispatch_plan", backend, PLAN_BACKENDS)
    return DispatchPlan(*torch.ops.modmoe.dispatch_plan(top_k_index, num_experts, name))


# The gates and the choice in one kernel. PyTorch's own operations are composed in `route` instead, where autograd and
# torch.compile see through them.


def _route(
    logits: Tensor, top_k: int, token_mask: Tensor | None, selection_bias: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor]:
    choose_backend("route", "cuda", {"cuda": lambda: routing_cuda.gating_problem(logits)})
    return routing_cuda.gating(logits, top_k, token_mask, selection_bias, renormalize)


def _route_fake(
    logits: Tensor, top_k: int, token_mask: Tensor | None, selection_bias: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor]:
    gates = logits.new_empty(logits.shape[0], top_k, dtype=torch.float32)
    return gates, torch.empty_like(gates, dtype=torch.int64)


def _route_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, token_mask, _, ctx.renormalize = inputs
    ctx.save_for_backward(logits, output[1], token_mask)
    ctx.mark_non_differentiable(output[1])


def _route_autograd(ctx: Any, dgates: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, index, token_mask = ctx.saved_tensors
    return _route_backward(dgates, logits, index, token_mask, ctx.renormalize), None, None, None, None


def _route_backward(
    dgates: Tensor, logits: Tensor, index: Tensor, token_mask: Tensor | None, renormalize: bool
) -> Tensor:
    """Gradient of the logits. Through the gates' sum first, if they were divided by it, then through the softmax."""
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    index = index.clamp_max(logits.shape[1] - 1)  # of masked tokens, which have no gradient
    if token_mask is not None:
        dgates = dgates.masked_fill(~token_mask[:, None], 0.0)
    chosen = probs.gather(1, index)
    if renormalize:
        total = chosen.sum(-1, keepdim=True)
        smallest = torch.finfo(total.dtype).tiny
        divisor = total.clamp_min(smallest)
        through_sum = (dgates * chosen / divisor).sum(-1, keepdim=True)
        dgates = (dgates - through_sum.masked_fill(total < smallest, 0.0)) / divisor
    dprobs = torch.zeros_like(probs).scatter(1, index, dgates)
    dlogits = probs * (dprobs - (dgates * chosen).sum(-1, keepdim=True))
    return dlogits.to(logits.dtype)


def _dispatch_plan(top_k_index: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problems = {
        "cpp": lambda: routing_cpp.problem(top_k_index),
        "torch": lambda: None,
        "cuda": lambda: routing_cuda.plan_problem(top_k_index, num_experts),
    }
    implementations = {
        "cpp": routing_cpp.dispatch_plan,
        "torch": _sorted_plan,
        "cuda": routing_cuda.dispatch_plan,
    }
    name = choose_backend("dispatch_plan", backend, problems)
    if name != "cuda":
        _check_ids(top_k_index, num_experts)
    return implementations[name](top_k_index, num_experts)


def _check_ids(top_k_index: Tensor, num_experts: int) -> None:
    """On the CPU, where a look costs nothing."""
    if top_k_index.device.type == "cpu" and top_k_index.numel():
        least, most = (int(id) for id in top_k_index.aminmax())
        if least < 0 or most > num_experts:
            raise ValueError(f"expert ids must be 0 to {num_experts} (none), got {least if least < 0 else most}")


def _sorted_plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sorted_expert_ids, order = top_k_index.flatten().sort(dim=0, stable=True)
    experts = torch.arange(num_experts, device=top_k_index.device, dtype=top_k_index.dtype)
    # Counting by searching the sorted ids: no host sync (bincount has one), no atomics.
    offsets = torch.searchsorted(sorted_expert_ids, experts, right=True, out_int32=True)
    tokens_per_expert = offsets.clone()
    tokens_per_expert[1:] -= offsets[:-1]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return tokens_per_expert, offsets, order, inverse


def _dispatch_plan_fake(top_k_index: Tensor, num_experts: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = top_k_index.new_empty(num_experts, dtype=torch.int32)
    order = top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64)
    return counts, torch.empty_like(counts), order, torch.empty_like(order)


library.define(
    "route(Tensor logits, SymInt top_k, Tensor? token_mask, Tensor? selection_bias, bool renormalize)"
    " -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.impl("route", _route, "CompositeExplicitAutograd")
torch.library.register_fake("modmoe::route", _route_fake, lib=library)
torch.library.register_autograd("modmoe::route", _route_autograd, setup_context=_route_setup_context, lib=library)

library.define(
    "dispatch_plan(Tensor top_k_index, SymInt num_experts, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.impl("dispatch_plan", _dispatch_plan, "CompositeExplicitAutograd")
torch.library.register_fake("modmoe::dispatch_plan", _dispatch_plan_fake, lib=library)
