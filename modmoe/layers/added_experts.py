"""How experts that were added to a trained model are chosen.

Either by a router of their own, whose first row is the *null* choice: to use none of them. Or together with the old
ones, by new rows in their router. Letters: N tokens, E new experts, K slots.
"""

import torch
from torch import nn

from modmoe.layers.router import RouterOutput


def decline(routing: RouterOutput) -> RouterOutput:
    """
    Turn what a router over [null, new experts] has chosen into choices of new experts.

    Experts that rank below null are not used: a token may decline all of them, whatever K. Gates stay shares of the
    softmax that null has a share of; what null is given, the experts lack.

    Args:
        routing: logits (N, 1 + E); choices (N, K) from best to worst, 0 for null.

    Returns:
        the same logits; gates and choices of the new experts: gate 0 and choice E for a slot without an expert.
    """
    num_experts = routing.logits.shape[-1] - 1
    declined = (routing.top_k_index == 0).cumsum(-1) > 0
    return RouterOutput(
        routing.logits,
        routing.top_k_weights.masked_fill(declined, 0.0),
        (routing.top_k_index - 1).masked_fill(declined, num_experts),
    )


def own_choices(top_k_index: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """(N, K) choices from several pools in a row -> of the pool of `count` experts from `start`; `count` for none."""
    index = top_k_index - start
    return index.masked_fill((index < 0) | (index >= count), count)


class RouterRows(nn.Module):
    """Rows that join those of a router; calling it gives them, (E, width)."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self) -> torch.Tensor:
        return self.weight
