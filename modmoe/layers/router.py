"""Routers: hidden states -> logits over the experts of a layer -> the chosen experts and their gates.

Letters: N tokens, H hidden size, C context size, E experts, K experts per token, G router hidden size, R rows of
`weight`: E, and those of pruned experts that stay in the softmax.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from modmoe.ops import route


class RouterOutput(NamedTuple):
    """What a router decided; plain tensors, so that nothing is kept on the module between calls."""

    logits: torch.Tensor
    """(N, E) fp32: before the softmax. Without those of pruned experts, which cannot be chosen and are therefore
    neither balanced nor counted."""
    top_k_weights: torch.Tensor
    """(N, K) fp32: gates of the chosen experts; 0 for tokens that are not routed."""
    top_k_index: torch.Tensor
    """(N, K) int64: the chosen experts; E for tokens that are not routed."""


class Router(nn.Module):
    """
    Base of the router types. `weight` has one row per expert in all of them, so that adding or removing an expert
    is adding or removing a row. A removed expert may leave its row behind: it then takes its share of the softmax, as
    before, and is never chosen, so that the gates of the others are what they were.

    Scores are computed in fp32 whatever the model's dtype: a choice flips on differences that bf16 cannot hold.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = False,
        unit_gates: bool = False,
        sample_top_k: int = 0,
        selection_bias: bool = False,
        num_pruned: int = 0,
        context_size: int = 0,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_pruned = num_pruned
        self.top_k = top_k
        self.renormalize = renormalize
        self.unit_gates = unit_gates
        self.sample_top_k = sample_top_k
        rows = num_experts + num_pruned
        self.weight = nn.Parameter(torch.empty(rows, width))
        # (R, C), zero at first: what the document so far adds to the scores.
        self.context_weight: nn.Parameter | None
        self.register_parameter(
            "context_weight", nn.Parameter(torch.empty(rows, context_size)) if context_size else None
        )
        # (E,) ascending: the row of each expert, if other rows are those of pruned ones. Rows keep their places, for a
        # softmax over the same numbers in another order is another one in the last bit.
        self.expert_rows: torch.Tensor | None
        self.register_buffer("expert_rows", torch.arange(num_experts) if num_pruned else None)
        # Added to the probabilities for the choice only; moved by its own rule, never by a gradient.
        self.selection_bias: torch.Tensor | None
        self.register_buffer("selection_bias", torch.zeros(num_experts) if selection_bias else None)

    def scores(self, hidden_states: torch.Tensor, *more_rows: torch.Tensor) -> torch.Tensor:
        """(N, H) in fp32 or wider -> logits (N, R) in the same dtype; `more_rows` count in R."""
        raise NotImplementedError

    def _rows(self, more_rows: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """`weight` with more rows after its own."""
        return (torch.cat([self.weight, *more_rows]) if more_rows else self.weight).to(dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        more_rows: Sequence[torch.Tensor] = (),
        context: torch.Tensor | None = None,
    ) -> RouterOutput:
        """
        Args:
            hidden_states: (N, H).
            token_mask: (N,) bool; False tokens are not routed. All are if None.
            more_rows: of experts that were added, after those of `weight`; they count in E here.
            context: (N, C) of the tokens' documents, for a router that reads it.
        """
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            num_added = sum(len(rows) for rows in more_rows)
            logits = self.scores(hidden_states.to(dtype), *more_rows)
            if self.context_weight is not None:
                assert context is not None, "this router reads the context of documents: pass it"
                logits = logits + F.linear(context.to(dtype), self.context_weight.to(dtype))
            routing = route(
                logits,
                self.top_k,
                token_mask=token_mask,
                selection_bias=self._row_bias(num_added),
                renormalize=self.renormalize,
                sample_top_k=self.sample_top_k if self.training else 0,
            )
        gates = _unit_gates(logits, routing.top_k_index) if self.unit_gates else routing.top_k_weights
        if self.expert_rows is None:
            return RouterOutput(logits, gates, routing.top_k_index)
        expert_rows = self._expert_rows(self.expert_rows, num_added)
        index = torch.searchsorted(expert_rows, routing.top_k_index)  # R, which means none, becomes E
        return RouterOutput(logits.index_select(1, expert_rows), gates, index)

    def _expert_rows(self, own: torch.Tensor, num_added: int) -> torch.Tensor:
        """(E,): the row of each expert, those of added ones after all others."""
        rows = self.num_experts + self.num_pruned
        return torch.cat([own, torch.arange(rows, rows + num_added, device=own.device)])

    def _row_bias(self, num_added: int) -> torch.Tensor | None:
        """(R,): the selection bias, which routers with added rows do not have, and -inf for rows of pruned experts."""
        if self.expert_rows is None:
            return self.selection_bias
        bias = self.selection_bias
        if bias is None:
            bias = torch.zeros(self.num_experts + num_added, device=self.expert_rows.device)
        rows = bias.new_full((self.num_experts + self.num_pruned + num_added,), -torch.inf)
        return rows.index_copy(0, self._expert_rows(self.expert_rows, num_added), bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Keeps the selection bias in fp32: its steps are too small for a 16-bit number."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias is not None and self.selection_bias.dtype.itemsize < 4:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        pruned = f", num_pruned={self.num_pruned}" if self.num_pruned else ""
        return f"num_experts={self.num_experts}, top_k={self.top_k}{pruned}"


def _unit_gates(logits: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
    """(N, E), (N, K) -> (N, K): exactly 1 with the gradient of the log probability; 0 for no expert."""
    none = top_k_index == logits.shape[1]
    chosen = logits.log_softmax(-1).gather(1, top_k_index.masked_fill(none, 0))
    return (chosen - chosen.detach()).exp().masked_fill(none, 0.0)


class _WideLinear(nn.Linear):
    """Computes in the dtype of its input, also when its weights are stored in a narrower one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LinearRouter(Router):
    """logits = W x."""

    def __init__(
        self, hidden_size: int, router_hidden_size: int, num_experts: int, top_k: int, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)

    def scores(self, hidden_states: torch.Tensor, *more_rows: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self._rows(more_rows, hidden_states.dtype))


class MLPRouter(Router):
    """logits = W gelu(W0 x + b0), with the exact (erf) GELU. ModuleFormer's default."""

    def __init__(
        self, hidden_size: int, router_hidden_size: int, num_experts: int, top_k: int, **options: Any
    ) -> None:
        super().__init__(router_hidden_size, num_experts, top_k, **options)
        self.in_proj = _WideLinear(hidden_size, router_hidden_size)

    def scores(self, hidden_states: torch.Tensor, *more_rows: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self.in_proj(hidden_states))
        return F.linear(inner, self._rows(more_rows, inner.dtype))


class GMMRouter(Router):
    """logits = exp(log_temperature) * cos(W0 x, centroid_e); the rows of `weight` are the centroids. ModuleFormer."""

    def __init__(
        self, hidden_size: int, router_hidden_size: int, num_experts: int, top_k: int, **options: Any
    ) -> None:
        super().__init__(router_hidden_size, num_experts, top_k, **options)
        self.in_proj = _WideLinear(hidden_size, router_hidden_size, bias=False)
        self.log_temperature = nn.Parameter(torch.zeros(1))

    def scores(self, hidden_states: torch.Tensor, *more_rows: torch.Tensor) -> torch.Tensor:
        inner = F.normalize(self.in_proj(hidden_states), dim=-1)
        centroids = F.normalize(self._rows(more_rows, inner.dtype), dim=-1)
        return self.log_temperature.to(inner.dtype).exp() * F.linear(inner, centroids)


ROUTERS: dict[str, Callable[..., Router]] = {"linear": LinearRouter, "mlp": MLPRouter, "gmm": GMMRouter}
