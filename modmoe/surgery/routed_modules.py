"""Finding the routers of a model with their experts, and watching them route.

FFN experts, our own and those of every transformers model on its experts interface, are called with
(hidden states, chosen experts, gates), and the router's output begins with its logits. Attention experts exist in
native models alone. Letters: N tokens, E experts, K experts per token, H hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modmoe.layers.added_experts import own_choices
from modmoe.layers.experts import AttentionExperts
from modmoe.layers.router import RouterOutput
from modmoe.ops import dispatch_plan

# What `use_experts_implementation` of transformers sets on the modules it decorates.
_DECORATED = ("has_gate", "has_bias", "is_transposed")
_ROUTER_NAMES = ("gate", "router")

Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""
Number of the routed module, logits (N, E), chosen experts (N, K), E for none, gates (N, K), norms of outputs (N, K).
"""


@dataclass(frozen=True)
class RoutedModule:
    """A router and its experts."""

    layer: int
    side: str
    """"attn" or "ffn"."""
    name: str
    """Dotted name of the module that holds both."""
    router: nn.Module
    experts: nn.Module
    num_experts: int


def find_routed_modules(model: nn.Module) -> list[RoutedModule]:
    """
    All routers of a model, layer by layer, attention before FFN; those of extensions are left out.

    Raises:
        ValueError: a model without routed experts, experts without a router beside them, or two in one place.
    """
    found = []
    for name, module in model.named_modules():
        is_attention = isinstance(module, AttentionExperts)
        if not is_attention and not all(hasattr(module, attribute) for attribute in _DECORATED):
            continue
        if ".extensions." in name:
            continue
        parent_name = name.rpartition(".")[0]
        router = _router_beside(model.get_submodule(parent_name))
        if router is None:
            if is_attention:  # one expert: a dense layer
                continue
            raise ValueError(f"{name} has no router beside it (looked for {' and '.join(_ROUTER_NAMES)})")
        count = module.num_experts if is_attention else module.down_proj.shape[0]
        side = "attn" if is_attention else "ffn"
        found.append(RoutedModule(_layer_number(parent_name), side, parent_name, router, module, int(count)))  # type: ignore[arg-type]
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"model type {kind!r} has no routed experts: give a ModMoE or MoLM model with more than one expert, or a "
            "transformers model on its experts interface such as Mixtral, Qwen3-MoE or OLMoE"
        )
    places = [(module.layer, module.side) for module in found]
    repeated = {place for place in places if places.count(place) > 1}
    if repeated:
        layer, side = min(repeated)
        raise ValueError(f"several {side} routers count as layer {layer}: give a part of the model with one stack")
    return sorted(found, key=lambda module: (module.layer, module.side))


def _router_beside(parent: nn.Module) -> nn.Module | None:
    return next((r for name in _ROUTER_NAMES if isinstance(r := getattr(parent, name, None), nn.Module)), None)


def _layer_number(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


@contextlib.contextmanager
def observing(modules: Sequence[RoutedModule], observer: Observer) -> Iterator[None]:
    """
    Call `observer` each time that one of the modules has routed tokens.

    The norm of each chosen expert's output is taken from a second pass through the experts, one slot after another,
    so that never more than (N, H) is held on top of what the model needs.
    """
    handles: list[RemovableHandle] = []
    try:
        for number, module in enumerate(modules):
            watch = _watch_attention if module.side == "attn" else _watch_ffn
            handles += watch(module, number, observer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_ffn(module: RoutedModule, number: int, observer: Observer) -> list[RemovableHandle]:
    routings: list[Any] = []

    def after_router(_: nn.Module, __: Any, output: Any) -> None:
        routings[:] = [output]

    def after_experts(experts: nn.Module, arguments: tuple, keywords: dict[str, Any], _: Any) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, arguments, strict=False)) | keywords
        hidden_states, index, gates = (given[name] for name in names)
        hidden_states = hidden_states.flatten(0, -2)
        # With one slot and a gate of one, the experts' sum is the output of the expert in that slot. `forward`, for
        # calling the module would call this hook again.
        one = torch.ones_like(gates[:, :1])
        norms = [_norm(experts.forward(hidden_states, slot, one)) for slot in _slots(index)]
        routing = routings.pop()
        if isinstance(routing, RouterOutput):  # what the experts are given may have another expert in place of none
            logits, index, gates = _own(routing, module.num_experts)
        else:
            logits = (routing[0] if isinstance(routing, tuple) else routing).flatten(0, -2)
        observer(number, logits, index, gates, torch.stack(norms, dim=-1))

    return [
        module.router.register_forward_hook(after_router),
        module.experts.register_forward_hook(after_experts, with_kwargs=True),
    ]


def _watch_attention(module: RoutedModule, number: int, observer: Observer) -> list[RemovableHandle]:
    routings: list[Any] = []

    def after_router(_: nn.Module, __: Any, output: Any) -> None:
        routings[:] = [output]

    def after_projection(projection: nn.Module, arguments: tuple, _: Any) -> None:
        logits, index, gates = _own(routings.pop(), module.num_experts)
        heads = arguments[0].unflatten(0, index.shape)
        norms = []
        for rows, slot in zip(heads.unbind(1), _slots(index), strict=True):
            plan = dispatch_plan(slot, module.num_experts)
            outputs = projection.forward(rows, plan, top_k=1, source="token", target="pair")
            norms.append(_norm(outputs))
        observer(number, logits, index, gates, torch.stack(norms, dim=-1))

    projection = module.experts.o_proj
    assert isinstance(projection, nn.Module)
    return [
        module.router.register_forward_hook(after_router),
        projection.register_forward_hook(after_projection),
    ]


def _own(routing: RouterOutput, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, choices and gates without the experts that an extension put into the same router."""
    return routing.logits[:, :num_experts], own_choices(routing.top_k_index, 0, num_experts), routing.top_k_weights


def _slots(index: Tensor) -> list[Tensor]:
    """(N, K) -> K times (N, 1)."""
    return [slot.contiguous() for slot in index.split(1, dim=-1)]


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
