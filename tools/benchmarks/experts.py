"""The feed-forward experts of a layer, forward and backward: two grouped products, with the gather before them, the
activation between them and the gate-weighted sum after them.

Letters: N tokens, K experts per token, E experts, H hidden size, I intermediate size.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, NemotronHConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import modmoe.layers.megablocks  # noqa: F401  (registers the experts implementation of that name)
from benchmarks.products import draw_weight
from benchmarks.workload import Contender, Run, Workload
from modmoe.ops import dispatch_plan, grouped_linear

# transformers' "batched_mm" is not among them: it copies the weights of an expert for each of its tokens.
CPU_IMPLEMENTATIONS = ("eager", "grouped_mm")
GPU_IMPLEMENTATIONS = (*CPU_IMPLEMENTATIONS, "sonicmoe", "megablocks")


class Inputs(NamedTuple):
    """x, dy (N, H), gates (N, K) in float32, up (E, 2I or I, H), down (E, H, I), top_k_index (N, K)."""

    x: Tensor
    gates: Tensor
    up: Tensor
    down: Tensor
    dy: Tensor
    top_k_index: Tensor


class Shape(NamedTuple):
    """`gated`: SwiGLU, so that `up` has 2I rows; else GELU."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gated: bool

    @property
    def up_size(self) -> int:
        return 2 * self.intermediate if self.gated else self.intermediate


Layer = Callable[[Inputs], Tensor]


def expert_layer(
    shape: Shape,
    backends: tuple[str, ...],
    implementations: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[Contender, ...] = (),
) -> Workload:
    """`backends` of ours beside "torch", `implementations` of transformers, and other `peers`."""
    exact = forward_backward(one_by_one)
    theirs = [
        Contender(f"transformers {name}", forward_backward(TransformersExperts(shape, name)), exact)
        for name in implementations
    ]
    return Workload(
        name=f"expert layer, {shape.tokens} tokens, {shape.hidden} -> {shape.intermediate}"
        f"{' gated' if shape.gated else ''}, {shape.experts} experts, top-{shape.top_k}",
        draw=lambda: draw(shape, device, dtype),
        contenders=(
            *(Contender(name, forward_backward(ours(name)), exact, "ours") for name in backends),
            Contender("torch", forward_backward(ours("torch")), exact, "baseline"),
            *theirs,
            *peers,
        ),
        tokens=shape.tokens,
        flops=layer_flops(shape),
        bytes=layer_bytes(shape, dtype),
    )


def layer_flops(shape: Shape) -> float:
    pairs = shape.tokens * shape.top_k
    return 3 * 2 * pairs * shape.hidden * (shape.up_size + shape.intermediate)


def layer_bytes(shape: Shape, dtype: torch.dtype) -> float:
    """The rows that enter and leave are counted once for a token, as if gather and sum were part of the products."""
    weights = shape.experts * shape.hidden * (shape.up_size + shape.intermediate)
    rows = 2 * shape.tokens * shape.hidden + shape.tokens * shape.top_k * (shape.up_size + shape.intermediate)
    return 3 * (weights + rows) * dtype.itemsize


def draw(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    scores = torch.rand(shape.tokens, shape.experts, device=device)
    gates, index = scores.softmax(-1).topk(shape.top_k)
    return Inputs(
        x=torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype).requires_grad_(),
        gates=(gates / gates.sum(-1, keepdim=True)).requires_grad_(),
        up=draw_weight(shape.experts, shape.up_size, shape.hidden, device, dtype),
        down=draw_weight(shape.experts, shape.hidden, shape.intermediate, device, dtype),
        dy=torch.randn(shape.tokens, shape.hidden, device=device, dtype=dtype),
        top_k_index=index,
    )


def forward_backward(layer: Layer) -> Run:
    def run(x: Inputs) -> dict[str, Tensor]:
        y = layer(x)
        grads = torch.autograd.grad(y, (x.x, x.gates, x.up, x.down), x.dy)
        return {"y": y.detach(), **dict(zip(("dx", "dgates", "dup", "ddown"), grads, strict=True))}

    return run


def _is_gated(x: Inputs) -> bool:
    return x.up.shape[1] != x.down.shape[2]


def _activate(rows: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(rows, approximate="tanh")
    gate, up = rows.chunk(2, dim=-1)
    return F.silu(gate) * up


def ours(backend: str) -> Layer:
    """The dispatch plan is part of what is timed, as sorting is in the other implementations."""

    def layer(x: Inputs) -> Tensor:
        top_k = x.top_k_index.shape[1]
        plan = dispatch_plan(x.top_k_index, x.up.shape[0], backend="cuda" if backend.startswith("cuda") else "torch")
        rows = grouped_linear(x.x, x.up, plan, top_k=top_k, source="token", target="sorted", backend=backend)
        rows = _activate(rows, _is_gated(x))
        return grouped_linear(
            rows, x.down, plan, top_k=top_k, source="sorted", target="token", gates=x.gates, backend=backend
        )

    return layer


class TransformersExperts:
    """transformers' own module of experts on the weights of the inputs; "eager" is Mixtral's or Nemotron-H's loop."""

    def __init__(self, shape: Shape, implementation: str) -> None:
        self.shape = shape
        self.implementation = implementation

    @functools.cached_property
    def module(self) -> nn.Module:
        shape = self.shape
        config: MixtralConfig | NemotronHConfig
        if shape.gated:
            make = MixtralExperts
            config = MixtralConfig(
                num_local_experts=shape.experts,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                hidden_act="silu",
            )
        else:
            make = NemotronHExperts
            config = NemotronHConfig(
                n_routed_experts=shape.experts,
                hidden_size=shape.hidden,
                moe_intermediate_size=shape.intermediate,
                mlp_hidden_act="gelu_pytorch_tanh",
            )
        config._experts_implementation = self.implementation
        with torch.device("meta"):
            return make(config)

    def __call__(self, x: Inputs) -> Tensor:
        weights = {"gate_up_proj" if self.shape.gated else "up_proj": x.up, "down_proj": x.down}
        y: Tensor = torch.func.functional_call(self.module, weights, (x.x, x.top_k_index, x.gates))
        return y


def scattermoe() -> Contender:
    """https://github.com/shawntan/scattermoe"""
    return Contender("scattermoe", forward_backward(_scattermoe), forward_backward(one_by_one))


def _scattermoe(x: Inputs) -> Tensor:
    from scattermoe import flatten_sort_count, parallel_linear

    plan = flatten_sort_count(x.top_k_index, num_experts=x.up.shape[0])
    rows = parallel_linear(x.x, x.up.mT, x.top_k_index.shape[1], *plan, grouped_out=True)
    rows = _activate(rows, _is_gated(x))
    y: Tensor = parallel_linear(rows, x.down.mT, 1, *plan, gates=x.gates.to(rows.dtype), grouped_in=True)
    return y


def one_by_one(x: Inputs) -> Tensor:
    """The layer again, one expert after another."""
    y = torch.zeros_like(x.x)
    for expert, (up, down) in enumerate(zip(x.up.unbind(), x.down.unbind(), strict=True)):
        token, slot = torch.where(x.top_k_index == expert)
        rows = _activate(x.x[token] @ up.T, _is_gated(x)) @ down.T
        y = y.index_add(0, token, rows * x.gates[token, slot, None])
    return y
