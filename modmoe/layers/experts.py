"""Pools of experts: feed-forward networks and attention heads.

Letters: N tokens, E experts, K experts per token, H hidden size, I intermediate size, A width of all query heads
of one attention expert. Expert weights are stacked as (E, out, in).
"""

from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from modmoe.ops import DispatchPlan, dispatch_plan, grouped_linear

# The same function as one kernel instead of eight.
_FUSED = {"gelu_new": "gelu_pytorch_tanh"}


class ExpertLinear(nn.Module):
    """One linear map per expert, `weight` (E, out, in)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x: torch.Tensor, plan: DispatchPlan | None, **layout: Any) -> torch.Tensor:
        """As `grouped_linear`; without a plan (a dense layer) every row goes through expert 0."""
        if plan is None:
            return F.linear(x, self.weight.squeeze(0))
        return grouped_linear(x, self.weight, plan, **layout)


class AttentionExperts(nn.Module):
    """
    E pairs of query and output projections (mixture of attention heads). Keys and values are not part of an expert:
    all experts of a layer share them, so the cache does not grow with E or K.
    """

    def __init__(self, hidden_size: int, num_experts: int, query_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.q_proj = ExpertLinear(num_experts, hidden_size, query_size)
        self.o_proj = ExpertLinear(num_experts, query_size, hidden_size)

    def plan(self, top_k_index: torch.Tensor) -> DispatchPlan:
        """(N, K) expert ids, E for none -> what `map` and `reduce` take."""
        return dispatch_plan(top_k_index, self.num_experts)

    def map(self, hidden_states: torch.Tensor, plan: DispatchPlan | None, top_k: int) -> torch.Tensor:
        """(N, H) -> queries (N * K, A), in token order; `plan` is None in a dense layer."""
        return self.q_proj(hidden_states, plan, top_k=top_k, source="token", target="pair")

    def reduce(
        self, heads: torch.Tensor, plan: DispatchPlan | None, top_k: int, gates: torch.Tensor | None
    ) -> torch.Tensor:
        """(N * K, A) -> (N, H): output projections, weighted by gates (N, K) and summed over the chosen experts."""
        return self.o_proj(heads, plan, top_k=top_k, source="pair", target="token", gates=gates)


class _FFN(nn.Module):
    """E feed-forward networks; a subclass names the first projection and applies the activation."""

    up_name: str

    def __init__(self, config: PreTrainedConfig, num_experts: int, up_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.act_fn = ACT2FN[_FUSED.get(config.hidden_act, config.hidden_act)]
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(num_experts, up_size, config.hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, intermediate_size))
        self.bias_name = f"{self.up_name}_bias"
        for name, size in ((self.bias_name, up_size), ("down_proj_bias", config.hidden_size)):
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, size)) if config.ffn_bias else None)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        (N, H), (N, K), (N, K) -> (N, H): gate-weighted sum over the chosen experts; index E means none.

        One expert after another: what `experts_implementation="eager"` runs, and what the others must equal. Without
        choices (a dense layer) every token goes through expert 0.
        """
        names = (self.up_name, self.bias_name, "down_proj", "down_proj_bias")
        stacked: list[Any] = [getattr(self, name) for name in names]
        if top_k_index is None or top_k_weights is None:
            own: list[Any] = [None if w is None else w.squeeze(0) for w in stacked]
            return self._transform(hidden_states, *own)
        output = torch.zeros_like(hidden_states)
        experts = zip(*(repeat(None) if w is None else w.unbind() for w in stacked), strict=False)
        for expert, weights in enumerate(experts):
            token, slot = torch.where(top_k_index == expert)
            rows = self._transform(hidden_states[token], *weights) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, rows.to(output.dtype))
        return output

    def _transform(
        self,
        rows: torch.Tensor,
        up_proj: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_proj: torch.Tensor,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return F.linear(self.activate(F.linear(rows, up_proj, up_bias)), down_proj, down_bias)


class GatedFFN(_FFN):
    """act(gate) * up, both halves in one projection `gate_up_proj` (E, 2I, H)."""

    up_name = "gate_up_proj"

    def __init__(self, config: PreTrainedConfig, num_experts: int, intermediate_size: int) -> None:
        super().__init__(config, num_experts, 2 * intermediate_size, intermediate_size)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        gate, up = up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class PlainFFN(_FFN):
    """Two layers without a gate, `up_proj` (E, I, H); MoLM's FFN."""

    up_name = "up_proj"

    def __init__(self, config: PreTrainedConfig, num_experts: int, intermediate_size: int) -> None:
        super().__init__(config, num_experts, intermediate_size, intermediate_size)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(up)


# A routed pool stands behind transformers' experts contract; a dense FFN has nothing to choose there.


@use_experts_implementation
class GatedExperts(GatedFFN):
    """`GatedFFN` whose implementation can be chosen with `experts_implementation`."""


@use_experts_implementation(has_gate=False)
class PlainExperts(PlainFFN):
    """`PlainFFN` whose implementation can be chosen with `experts_implementation`."""
