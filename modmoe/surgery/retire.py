"""Experts that are in a model and cannot be chosen, as if they were removed; every tensor keeps its shape.

Letters: N tokens, E experts, K experts per token, R rows of a router: E, and perhaps those of experts that are gone.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F

from modmoe.layers.router import Router, RouterOutput

# Far below any logit, so that the softmax is exactly 0; and finite, so that 0 * log 0 is 0 in every loss.
_LOWEST = -1e4


def retire(router: Router, experts: Iterable[int], denominator: Literal["keep", "drop"]) -> None:
    """
    Make a router choose among its other experts alone, from now on, and those not even as a last resort.

    Gates, choices and losses are those of a model from which the experts were removed; but the Switch loss has a
    factor E, in which these still count. The choice goes by a selection bias of minus infinity, which no balancing
    moves.

    Args:
        router: of a native model.
        experts: all that are to be out of use, those that are already included.
        denominator: "drop" takes them out of the softmax as well, which raises the gates of the others; "keep" leaves
            them in it.

    Raises:
        ValueError: if none would be left, or fewer than a token draws.
    """
    retired = torch.zeros(router.num_experts, dtype=torch.bool, device=router.weight.device)
    retired[list(experts)] = True
    if retired.all():
        raise ValueError(f"all {router.num_experts} experts of a router would be retired: leave at least one")
    left = int((~retired).sum())
    if router.sample_top_k and left < router.top_k:
        raise ValueError(f"sample_topk={router.sample_top_k} cannot draw from {left} experts: keep {router.top_k}")
    if not isinstance(router, _Retiring):
        kind = type(router)
        router.__class__ = type(f"Retiring{kind.__name__}", (_Retiring, kind), {"__module__": __name__})
        router.register_buffer("retired", retired, persistent=False)
        if router.selection_bias is None:
            router.register_buffer("selection_bias", torch.zeros_like(retired, dtype=torch.float32), persistent=False)
    router.retired = retired
    router.in_softmax = denominator == "keep"  # type: ignore[assignment]
    bias: Any = router.selection_bias
    bias.masked_fill_(retired, -torch.inf)


class _Retiring:
    """What a router becomes; `super()` is the router's own class."""

    expert_rows: torch.Tensor | None
    retired: torch.Tensor
    in_softmax: bool
    renormalize: bool

    def scores(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super().scores(*args, **kwargs)  # type: ignore[misc]
        return logits if self.in_softmax else self._without(logits)

    def forward(self, *args: Any, **kwargs: Any) -> RouterOutput:
        output: RouterOutput = super().forward(*args, **kwargs)  # type: ignore[misc]
        gone = self.retired.nonzero().flatten()
        # A token that uses more experts than there are left has slots without one.
        nobody = torch.isin(output.top_k_index, gone)
        gates = output.top_k_weights.masked_fill(nobody, 0.0)
        if self.renormalize:
            gates = F.normalize(gates, p=1, dim=-1, eps=torch.finfo(gates.dtype).tiny)
        return RouterOutput(
            output.logits.index_fill(1, gone, _LOWEST),
            gates,
            output.top_k_index.masked_fill(nobody, output.logits.shape[1]),
        )

    def _without(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, R) with the rows of retired experts at the lowest."""
        gone = self.retired.nonzero().flatten() if self.expert_rows is None else self.expert_rows[self.retired]
        return logits.index_fill(1, gone, _LOWEST)
