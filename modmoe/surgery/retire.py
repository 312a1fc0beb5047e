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
        if router.selection_bias is None:
            router.register_buffer("selection_bias", torch.zeros_like(retired, dtype=torch.float32), persistent=False)
    rows = torch.zeros(len(router.weight), dtype=torch.bool, device=router.weight.device)
    if denominator == "drop":
        rows[retired.nonzero().flatten() if router.expert_rows is None else router.expert_rows[retired]] = True
    # Masks, with which a forward pass on a GPU waits for nothing.
    router.register_buffer("retired", retired, persistent=False)
    router.register_buffer("rows_out_of_softmax", rows, persistent=False)
    bias: Any = router.selection_bias
    bias.masked_fill_(retired, -torch.inf)


class _Retiring:
    """What a router becomes; `super()` is the router's own class."""

    retired: torch.Tensor
    rows_out_of_softmax: torch.Tensor
    renormalize: bool

    def scores(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super().scores(*args, **kwargs)  # type: ignore[misc]
        return logits.masked_fill(self.rows_out_of_softmax, _LOWEST)

    def forward(self, *args: Any, **kwargs: Any) -> RouterOutput:
        output: RouterOutput = super().forward(*args, **kwargs)  # type: ignore[misc]
        # A token that uses more experts than there are left has slots without one; those that are empty hold E.
        nobody = F.pad(self.retired, (0, 1))[output.top_k_index]
        gates = output.top_k_weights.masked_fill(nobody, 0.0)
        if self.renormalize:
            gates = F.normalize(gates, p=1, dim=-1, eps=torch.finfo(gates.dtype).tiny)
        return RouterOutput(
            output.logits.masked_fill(self.retired, _LOWEST),
            gates,
            output.top_k_index.masked_fill(nobody, output.logits.shape[1]),
        )
