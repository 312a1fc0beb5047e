"""What a teacher says: logits, whole or their top k, and hidden states at boundaries of stages.

Letters: B batch, T tokens, V vocabulary, H teacher width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch


class TopK(NamedTuple):
    """The k most probable tokens at a temperature, and how much probability all others have together."""

    log_probs: torch.Tensor
    """(..., k) fp32, logarithms of softmax(logits / temperature), largest first."""
    indices: torch.Tensor
    """(..., k) int32, which tokens."""
    log_rest: torch.Tensor
    """(...) fp32, logarithm of the probability of all others; -inf if k is the vocabulary."""


def top_k(logits: torch.Tensor, k: int, temperature: float) -> TopK:
    """
    Args:
        logits: (..., V).
        k: how many to keep.
        temperature: at which the KL will be taken; a `TopK` serves no other one.

    Raises:
        ValueError: for a k outside 1..V.
    """
    vocabulary = logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"top_k={k} must be between 1 and the size of the vocabulary, {vocabulary}")
    log_probs = (logits.float() / temperature).log_softmax(-1)
    values, indices = log_probs.topk(k)
    log_rest = log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1)
    return TopK(values, indices.int(), log_rest)


@dataclass(frozen=True)
class TeacherSignals:
    """What a teacher says about one batch."""

    logits: torch.Tensor | TopK | None
    """(B, T, V), or (B, V) of images; or their top k; None from a teacher of hidden states alone."""
    boundaries: dict[int, torch.Tensor] = field(default_factory=dict)
    """Boundary -> (B, T, H): i is what goes into stage i, i + 1 what comes out of it."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name: what is stored, and what a data loader may put in a batch."""
        tensors = {f"boundary_{index}": states for index, states in self.boundaries.items()}
        if self.logits is None:
            return tensors
        return tensors | (self.logits._asdict() if isinstance(self.logits, TopK) else {"logits": self.logits})

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The inverse of `tensors`."""
        logits: torch.Tensor | TopK | None = tensors.get("logits")
        if "indices" in tensors:
            logits = TopK(*(tensors[name] for name in TopK._fields))
        states = {int(name.partition("_")[2]): t for name, t in tensors.items() if name.startswith("boundary_")}
        return cls(logits, states)
