"""Grouped linear maps behind transformers' experts interface: `experts_implementation="modmoe"`.

Letters: N tokens, E experts, K experts per token, S = N * K pairs, H hidden size, I intermediate size. *Sorted* rows
are grouped by expert, see `modmoe.ops.DispatchPlan`.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from modmoe.ops import DispatchPlan, dispatch_plan, grouped_linear

NAME = "modmoe"

# A module decorated with `use_experts_implementation`: what it has depends on what its class says of itself.
Experts: TypeAlias = Any


def modmoe_experts_forward(self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """
    Gate-weighted sum over the chosen experts, by `modmoe.ops.grouped_linear`.

    Args:
        self: experts with `gate_up_proj` or `up_proj`, and `down_proj`; whether these are transposed, have biases or a
            norm after them follows from the attributes that `use_experts_implementation` sets.
        hidden_states: (N, H).
        top_k_index: (N, K) integer expert ids; E for a slot without an expert.
        top_k_weights: (N, K) gates, 0 for a slot without an expert.

    Returns:
        (N, H) in the dtype of `hidden_states`.
    """
    up_proj, down_proj = expert_weights(self)
    plan, top_k = dispatch_plan(top_k_index, up_proj.shape[0]), top_k_index.shape[-1]
    rows = grouped_linear(hidden_states, up_proj, plan, top_k=top_k, source="token", target="sorted")
    rows = activate(self, rows, plan, top_k_index)
    if self.has_bias or self.has_post_expert_norm:
        rows = grouped_linear(rows, down_proj, plan, top_k=top_k, source="sorted", target="sorted")
        output = combine(finish(self, rows, plan, top_k_index), plan, top_k_weights)
    else:
        # Nothing stands between the second product and the sum: one op does both.
        output = grouped_linear(
            rows, down_proj, plan, top_k=top_k, source="sorted", target="token", gates=top_k_weights
        )
    return output.to(hidden_states.dtype)


def expert_weights(experts: Experts) -> tuple[Tensor, Tensor]:
    """The first projection, (E, 2I, H) or without a gate (E, I, H), and the second, (E, H, I); views if transposed."""
    up_proj, down_proj = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    return (up_proj.mT, down_proj.mT) if experts.is_transposed else (up_proj, down_proj)


def activate(experts: Experts, rows: Tensor, plan: DispatchPlan, top_k_index: Tensor) -> Tensor:
    """Sorted rows (S, 2I or I) of the first projection -> (S, I): its bias, then gate or activation."""
    if experts.has_bias:
        bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        rows = rows + _sorted_bias(bias, plan, top_k_index)
    # How gate and up lie in a row (in halves or alternating) is the business of the class's own `_apply_gate`.
    return experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)


def finish(experts: Experts, rows: Tensor, plan: DispatchPlan, top_k_index: Tensor) -> Tensor:
    """Sorted rows (S, H) of the second projection -> (S, H): its bias and the norm after it, if any."""
    if experts.has_bias:
        rows = rows + _sorted_bias(experts.down_proj_bias, plan, top_k_index)
    return experts.post_expert_norm(rows) if experts.has_post_expert_norm else rows


def combine(rows: Tensor, plan: DispatchPlan, gates: Tensor) -> Tensor:
    """Sorted rows (S, H) and gates (N, K) -> (N, H): gate-weighted sum over slots, in fp32 or wider."""
    return weighted_sum(rows.index_select(0, plan.inverse).unflatten(0, gates.shape), gates)


def weighted_sum(slots: Tensor, gates: Tensor) -> Tensor:
    """Rows per slot (N, K, H) and gates (N, K) -> (N, H) in fp32 or wider, under autocast and with tf32 too."""
    dtype = torch.promote_types(slots.dtype, torch.float32)
    return (slots.to(dtype) * gates[..., None].to(dtype)).sum(1)


def _sorted_bias(bias: Tensor, plan: DispatchPlan, top_k_index: Tensor) -> Tensor:
    """(E, out) -> (S, out): each sorted row's own. A row without an expert gets any: its gate is 0."""
    expert = top_k_index.flatten().index_select(0, plan.order).clamp(max=bias.shape[0] - 1)
    return bias[expert]


ExpertsInterface.register(NAME, modmoe_experts_forward)
