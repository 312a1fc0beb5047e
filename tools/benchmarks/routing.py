"""What it costs to bring tokens to their experts, beside the whole layer that this is a part of.

Letters as in `experts.py`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import experts
from benchmarks.workload import Contender, Run, Workload
from modmoe.ops import DispatchPlan, dispatch_plan, grouped_linear_torch, route

Choose: TypeAlias = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Router logits (N, E) and K -> gates and index, (N, K)."""


class Inputs(NamedTuple):
    """logits (N, E), dgates (N, K), router (E, H) in float32; layer and the plan of its index."""

    logits: Tensor
    dgates: Tensor
    router: Tensor
    layer: experts.Inputs
    plan: DispatchPlan


def routing(shape: experts.Shape, backends: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Workload:
    """
    Three steps, each forward and backward: "route", from logits to gates and plan; "move", a layer without its
    products; and the layer from its input on, router included. `backends` are those of the layers.
    """

    def draw() -> Inputs:
        layer = experts.draw(shape, device, dtype)
        return Inputs(
            torch.randn(shape.tokens, shape.experts, device=device).requires_grad_(),
            torch.randn(shape.tokens, shape.top_k, device=device),
            (torch.randn(shape.experts, shape.hidden, device=device) * shape.hidden**-0.5).requires_grad_(),
            layer,
            dispatch_plan(layer.top_k_index, shape.experts),
        )

    choosers = dict.fromkeys(_chooser(backend) for backend in backends)
    exact_route, exact_layer = _exact_route(shape.top_k), _layer(_exact_choice, experts.one_by_one)
    return Workload(
        name=f"routing, {shape.tokens} tokens, {shape.hidden} wide, {shape.experts} experts, top-{shape.top_k}",
        draw=draw,
        contenders=(
            *(
                Contender(f"route, {name}", _route(name, shape.top_k), exact_route, "ours", whole=False)
                for name in choosers
            ),
            Contender("move, torch", _move, _exact_move, "ours", whole=False),
            *(
                Contender(f"layer, {name}", _layer(_choice(_chooser(name)), experts.ours(name)), exact_layer, "ours")
                for name in backends
            ),
        ),
        tokens=shape.tokens,
        flops=experts.layer_flops(shape) + 3 * 2 * shape.tokens * shape.hidden * shape.experts,
        bytes=experts.layer_bytes(shape, dtype),
        fractions=lambda seconds: _shares(seconds, backends),
    )


def _chooser(backend: str) -> str:
    """The backend of `route` and `dispatch_plan` that goes with one of `grouped_linear`."""
    return "cuda" if backend.startswith("cuda") else "torch"


def _shares(seconds: Mapping[str, float], backends: tuple[str, ...]) -> dict[str, float]:
    """Of each layer that could run. "cuda" moves rows inside its products, which cannot be told apart."""
    shares = {}
    for backend in backends:
        steps = [f"route, {_chooser(backend)}"] + (["move, torch"] if backend != "cuda" else [])
        if all(name in seconds for name in (*steps, f"layer, {backend}")):
            part = sum(seconds[step] for step in steps)
            shares[f"{' + '.join(steps)}: share of layer, {backend}"] = part / seconds[f"layer, {backend}"]
    return shares


# From logits to gates and plan.


def _route(backend: str, top_k: int) -> Run:
    def run(x: Inputs) -> dict[str, Tensor]:
        gates, index = route(x.logits, top_k, backend=backend)
        dispatch_plan(index, x.logits.shape[1], backend=backend)
        return _gates_and_gradient(gates, x)

    return run


def _exact_route(top_k: int) -> Run:
    return lambda x: _gates_and_gradient(x.logits.softmax(-1).topk(top_k).values, x)


def _gates_and_gradient(gates: Tensor, x: Inputs) -> dict[str, Tensor]:
    (dlogits,) = torch.autograd.grad(gates, x.logits, x.dgates)
    return {"gates": gates.detach(), "dlogits": dlogits}


# Rows to sorted order and back, as the layer in PyTorch moves them.

_NO_PRODUCTS = grouped_linear_torch.Products(
    multiply=lambda rows, weight, offsets: rows, outer=lambda left, right, offsets: left.new_empty(0)
)


@torch.no_grad()
def _move(x: Inputs) -> dict[str, Tensor]:
    tokens, gates, top_k = x.layer.x, x.layer.gates, x.layer.gates.shape[1]
    unused = (x.layer.up, x.plan.order, x.plan.inverse, x.plan.offsets)
    up = (*unused, None, top_k, "token", "sorted")
    down = (*unused, gates, top_k, "sorted", "token")
    rows = grouped_linear_torch.forward(tokens, *up, _NO_PRODUCTS)
    y = grouped_linear_torch.forward(rows, *down, _NO_PRODUCTS)
    drows, _, dgates = grouped_linear_torch.backward(x.layer.dy, rows, *down, True, True, True, _NO_PRODUCTS)
    dx, _, _ = grouped_linear_torch.backward(drows, tokens, *up, True, True, False, _NO_PRODUCTS)
    return {"y": y, "dx": dx, "dgates": dgates}


@torch.no_grad()
def _exact_move(x: Inputs) -> dict[str, Tensor]:
    total = x.layer.gates.sum(-1, keepdim=True)
    dgates = (x.layer.dy * x.layer.x).sum(-1, keepdim=True).expand_as(x.layer.gates)
    return {"y": x.layer.x * total, "dx": x.layer.dy * total, "dgates": dgates}


# The layer, router included.


def _choice(backend: str) -> Choose:
    def choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return route(logits, top_k, backend=backend)

    return choose


def _exact_choice(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    gates, index = logits.softmax(-1).topk(top_k)
    return gates, index


def _layer(choose: Choose, layer: experts.Layer) -> Run:
    def run(x: Inputs) -> dict[str, Tensor]:
        inputs = x.layer
        logits = F.linear(inputs.x.to(x.router.dtype), x.router)
        gates, index = choose(logits, inputs.top_k_index.shape[1])
        y = layer(inputs._replace(gates=gates, top_k_index=index))
        grads = torch.autograd.grad(y, (inputs.x, x.router, inputs.up, inputs.down), inputs.dy)
        return {"y": y.detach(), **dict(zip(("dx", "drouter", "dup", "ddown"), grads, strict=True))}

    return run
