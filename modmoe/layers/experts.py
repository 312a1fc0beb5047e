"""Pools of experts: feed-forward networks and attention heads.

Letters: N tokens, E experts, K experts per token, H hidden size, I intermediate size, A width of all query heads
of one attention expert. Expert weights are stacked as (E, out, in).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from modmoe.ops import DispatchPlan, dispatch_plan, grouped_linear


def expert_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The one expert of a dense layer: x (..., in), weight (1, out, in) -> (..., out)."""
    return F.linear(x, weight.squeeze(0))


class _FFNExperts(nn.Module):
    """
    E feed-forward networks behind transformers' experts contract; one expert is a dense FFN.

    A subclass names its first projection and applies the activation.
    """

    up_name: str

    def __init__(self, config: PreTrainedConfig, num_experts: int, up_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        up = nn.Parameter(torch.empty(num_experts, up_size, config.hidden_size))
        self.register_parameter(self.up_name, up)
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, intermediate_size))

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def dense(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, H) through the only expert."""
        up = expert_linear(hidden_states, getattr(self, self.up_name))
        return expert_linear(self.activate(up), self.down_proj)

    def routed(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(N, H), (N, K), (N, K) -> (N, H): gate-weighted sum over the chosen experts; index E means none."""
        plan = dispatch_plan(top_k_index, self.num_experts)
        top_k = top_k_index.shape[-1]
        up = grouped_linear(
            hidden_states, getattr(self, self.up_name), plan, top_k=top_k, source="token", target="sorted"
        )
        return grouped_linear(
            self.activate(up),
            self.down_proj,
            plan,
            top_k=top_k,
            source="sorted",
            target="token",
            gates=top_k_weights,
        )


@use_experts_implementation
class GatedExperts(_FFNExperts):
    """act(gate) * up, both halves in one projection `gate_up_proj` (E, 2I, H)."""

    up_name = "gate_up_proj"

    def __init__(self, config: PreTrainedConfig, num_experts: int, intermediate_size: int) -> None:
        super().__init__(config, num_experts, 2 * intermediate_size, intermediate_size)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        gate, up = up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.routed(hidden_states, top_k_index, top_k_weights)


@use_experts_implementation(has_gate=False)
class PlainExperts(_FFNExperts):
    """Two layers without a gate, `up_proj` (E, I, H); MoLM's FFN."""

    up_name = "up_proj"

    def __init__(self, config: PreTrainedConfig, num_experts: int, intermediate_size: int) -> None:
        super().__init__(config, num_experts, intermediate_size, intermediate_size)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(up)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.routed(hidden_states, top_k_index, top_k_weights)


class AttentionExperts(nn.Module):
    """
    E pairs of query and output projections (mixture of attention heads). Keys and values are not part of an
    expert: all experts of a layer share them, so the cache does not grow with E or K.
    """

    def __init__(self, hidden_size: int, num_experts: int, query_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.q_proj = nn.Parameter(torch.empty(num_experts, query_size, hidden_size))
        self.o_proj = nn.Parameter(torch.empty(num_experts, hidden_size, query_size))

    def map(self, hidden_states: torch.Tensor, plan: DispatchPlan | None, top_k: int) -> torch.Tensor:
        """(N, H) -> queries (N * K, A), in token order; `plan` is None in a dense layer."""
        if plan is None:
            return expert_linear(hidden_states, self.q_proj)
        return grouped_linear(hidden_states, self.q_proj, plan, top_k=top_k, source="token", target="pair")

    def reduce(
        self, heads: torch.Tensor, plan: DispatchPlan | None, top_k: int, gates: torch.Tensor | None
    ) -> torch.Tensor:
        """(N * K, A) -> (N, H): output projections, weighted by the gates (N, K) and summed over the chosen experts."""
        if plan is None:
            return expert_linear(heads, self.o_proj)
        return grouped_linear(heads, self.o_proj, plan, top_k=top_k, source="pair", target="token", gates=gates)
