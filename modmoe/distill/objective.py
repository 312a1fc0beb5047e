"""What a student is taught with.

    loss = (1 - a) * CE(labels) + a * tau^2 * KL(teacher || student)  [+ hidden states, + relations]

CE and KL are means over valid tokens (real tokens whose next token is real and labelled), or over labelled images. The
KL is a sum over the vocabulary, at temperature tau, in fp32 (arXiv:1503.02531, arXiv:2402.16918). Neither depends on
padding, on how tokens are split into batches, or on unused vocabulary.

From a `TopK` the KL is that of distributions over its k tokens and "any other":

    sum_k p_k log(p_k / q_k) + p_rest log(p_rest / q_rest)

which by the log-sum inequality is never more than the whole KL, and equal to it if k is the vocabulary or the
student splits the rest as the teacher does.

Letters: B batch, T tokens, N = B * T, V vocabulary, H width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from modmoe.distill.signals import TopK
from modmoe.losses.distillation import forward_kl, hidden_error, kl_terms, sum_of_chunks
from modmoe.ops.backend import without_autocast

IGNORE_INDEX = -100

States = tuple[torch.Tensor, torch.Tensor]
"""Hidden states (B, T, .) of the student and of the teacher at one place."""


@dataclass(frozen=True)
class Objective:
    """
    Weights of the losses.

    Args:
        alpha: a above, 0 (labels alone) to 1 (teacher alone).
        temperature: tau above, greater than 0.
        teacher_targets: "soft" is the KL above; "hard" is the cross entropy to the teacher's most probable token
            in its place, without tau (arXiv:2012.12877 eq. 3).
        hidden_weight: of matching hidden states where a stage ends, ||s - t||^2 / ||t||^2, mean over real tokens
            (hints, arXiv:1412.6550; relative, because norms differ by orders of magnitude between tokens and depths).
            Training runs set 10.
        relation_weight: of matching relations between tokens where a stage ends, see `relation_loss`.
        relation_heads: parts of the width that have relations of their own; must divide both widths.

    Raises:
        ValueError: for values out of range.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    teacher_targets: Literal["soft", "hard"] = "soft"
    hidden_weight: float = 0.0
    relation_weight: float = 0.0
    relation_heads: int = 8

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha={self.alpha} must be between 0 (labels alone) and 1 (teacher alone)")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be greater than 0; 1 leaves logits as they are")
        if self.teacher_targets not in ("soft", "hard"):
            raise ValueError(f"teacher_targets={self.teacher_targets!r} must be 'soft' or 'hard'")
        for name in ("hidden_weight", "relation_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 (off) or more")
        if self.relation_heads < 1:
            raise ValueError(f"relation_heads={self.relation_heads} must be at least 1")

    def losses(
        self,
        logits: torch.Tensor | None,
        targets: torch.Tensor,
        teacher: torch.Tensor | TopK | None,
        *,
        hidden: Sequence[States] = (),
        relations: Sequence[States] = (),
        token_mask: torch.Tensor | None = None,
        num_items: torch.Tensor | int | None = None,
        num_tokens: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            logits: (..., V) of the student; None teaches by hidden states and relations alone.
            targets: (...) int64, -100 where there is nothing to predict.
            teacher: its logits (..., V), or their `TopK`; None only for alpha = 0 or without logits.
            hidden: places to match hidden states at; widths must be equal.
            relations: places to match relations at.
            token_mask: (B, T) bool, the real tokens of `hidden` and `relations`; None is all.
            num_items: valid tokens of the whole optimizer step; the loss is then this batch's share of the step's.
            num_tokens: likewise its real tokens, of which `hidden` and `relations` are means; without it they take the
                share of `num_items`.

        Returns:
            "loss" with gradient, and its parts by name without gradient or weights, each a mean of this batch.

        Raises:
            ValueError: for a teacher of another vocabulary.
        """
        loss: torch.Tensor | float = 0.0
        parts: dict[str, torch.Tensor] = {}
        if logits is not None:
            loss, parts = self._of_logits(logits, targets, teacher)
            loss = loss * share_of(targets != IGNORE_INDEX, num_items)

        def token_share(states: States) -> torch.Tensor | float:
            if num_tokens is None:
                return share_of(targets != IGNORE_INDEX, num_items)
            return share_of(_tokens(states, token_mask), num_tokens)

        if self.hidden_weight and hidden:
            parts["hidden"] = torch.stack([hidden_loss(*states, token_mask) for states in hidden]).mean()
            loss = loss + self.hidden_weight * token_share(hidden[0]) * parts["hidden"]
        if self.relation_weight and relations:
            values = [relation_loss(*states, token_mask, self.relation_heads) for states in relations]
            parts["relation"] = torch.stack(values).mean()
            loss = loss + self.relation_weight * token_share(relations[0]) * parts["relation"]
        return {"loss": torch.as_tensor(loss)} | {name: value.detach() for name, value in parts.items()}

    def _of_logits(
        self, logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | TopK | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean over valid tokens of what labels and the teacher's logits say, and its parts."""
        if self.alpha and teacher is None:
            raise ValueError(f"alpha={self.alpha} needs the teacher's logits; without a teacher set alpha=0")
        _check_vocabulary(logits, teacher)
        sums = self._sums(logits.flatten(0, -2), targets.flatten(), teacher if self.alpha else None)
        cross_entropy, taught = (x / (targets != IGNORE_INDEX).sum().clamp(min=1) for x in sums)
        parts = {"cross_entropy": cross_entropy}
        soft = self.teacher_targets == "soft"
        if self.alpha:
            parts["kl" if soft else "hard"] = taught
        scale = self.temperature**2 if soft else 1.0
        return (1 - self.alpha) * cross_entropy + self.alpha * scale * taught, parts

    def _sums(
        self, logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | TopK | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over valid tokens of the cross entropy and of what the teacher adds."""

        def of_rows(rows: slice) -> torch.Tensor:
            return torch.stack(self._sums_of(logits[rows].float(), targets[rows], _rows(teacher, rows)))

        cross_entropy, taught = sum_of_chunks(of_rows, len(logits))
        return cross_entropy, taught

    def _sums_of(
        self, logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | TopK | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cross_entropy = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        if teacher is None:
            return cross_entropy, torch.zeros_like(cross_entropy)
        valid = targets != IGNORE_INDEX
        if self.teacher_targets == "hard":
            best = teacher.indices[..., 0].long() if isinstance(teacher, TopK) else teacher.argmax(-1)
            hard = torch.where(valid, best, IGNORE_INDEX)
            return cross_entropy, F.cross_entropy(logits, hard, ignore_index=IGNORE_INDEX, reduction="sum")
        return cross_entropy, teacher_kl(logits, teacher, self.temperature).masked_fill(~valid, 0.0).sum()


def teacher_kl(logits: torch.Tensor, teacher: torch.Tensor | TopK, temperature: float) -> torch.Tensor:
    """
    KL(teacher || student) of each token, at a temperature, without its square.

    Args:
        logits: (N, V) of the student.
        teacher: (N, V) logits, or their `TopK` at this temperature.

    Returns:
        (N,) fp32.
    """
    if not isinstance(teacher, TopK):
        return forward_kl(logits, teacher, temperature)
    log_q = (logits.float() / temperature).log_softmax(-1)
    indices = teacher.indices.long()
    kl = kl_terms(teacher.log_probs, log_q.gather(-1, indices)).sum(-1)
    if indices.shape[-1] == log_q.shape[-1]:
        return kl
    return kl + kl_terms(teacher.log_rest, log_q.scatter(-1, indices, -torch.inf).logsumexp(-1))


def hidden_loss(student: torch.Tensor, teacher: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Relative squared error ||s - t||^2 / ||t||^2, mean over real tokens.

    Args:
        student, teacher: (B, T, H).
        token_mask: (B, T) bool; None is all.

    Returns:
        () fp32.
    """
    return _mean(hidden_error(student, teacher), token_mask)


def relation_loss(
    student: torch.Tensor, teacher: torch.Tensor, token_mask: torch.Tensor | None, num_heads: int
) -> torch.Tensor:
    """
    KL(teacher || student) of how much each token resembles the others of its row: softmax of scaled dot products of
    hidden states, per head; mean over real tokens and heads.

    MiniLMv2 (arXiv:2012.15828) relates queries, keys and values; hidden states are there in every family, need no
    attention weights (stick-breaking attention has none to match with a softmax teacher) and no common width. Each
    head is divided by its root mean square first, for a residual stream grows with depth.

    Args:
        student: (B, T, Hs).
        teacher: (B, T, Ht).
        token_mask: (B, T) bool; None is all.
        num_heads: parts that both widths are cut into.

    Returns:
        () fp32.

    Raises:
        ValueError: if `num_heads` does not divide the widths.
    """
    log_q, log_p = (_relations(states, token_mask, num_heads) for states in (student, teacher))
    return _mean(kl_terms(log_p, log_q).sum(-1).mean(1), token_mask)


@without_autocast
def _relations(states: torch.Tensor, token_mask: torch.Tensor | None, num_heads: int) -> torch.Tensor:
    """(B, T, H) -> (B, heads, T, T) log probabilities."""
    width = states.shape[-1]
    if width % num_heads:
        raise ValueError(f"relation_heads={num_heads} must divide the width {width} of teacher and student")
    heads = states.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)
    heads = F.rms_norm(heads, heads.shape[-1:])
    scores = heads @ heads.transpose(-1, -2) / math.sqrt(width // num_heads)
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1)


def _mean(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    if token_mask is None:
        return values.mean()
    return values.masked_fill(~token_mask, 0.0).sum() / token_mask.sum().clamp(min=1)


def _rows(teacher: torch.Tensor | TopK | None, rows: slice) -> torch.Tensor | TopK | None:
    """Some of its tokens, with the leading dimensions as one."""
    if teacher is None:
        return None
    if isinstance(teacher, TopK):
        return TopK(
            teacher.log_probs.flatten(0, -2)[rows],
            teacher.indices.flatten(0, -2)[rows],
            teacher.log_rest.flatten()[rows],
        )
    return teacher.flatten(0, -2)[rows]


def share_of(counted: torch.Tensor, of_the_step: torch.Tensor | int | None) -> torch.Tensor | float:
    """
    Args:
        counted: bool, what of a batch counts.
        of_the_step: how many count in the whole optimizer step; None if the batch is the step.

    Returns:
        the batch's share of the step: its part of the step's mean is its own mean times this.
    """
    if of_the_step is None:
        return 1.0
    count = of_the_step.clamp(min=1) if isinstance(of_the_step, torch.Tensor) else max(of_the_step, 1)
    return counted.sum() / count


def _tokens(states: States, token_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T) bool."""
    return token_mask if token_mask is not None else states[0].new_ones(states[0].shape[:2], dtype=torch.bool)


def _check_vocabulary(logits: torch.Tensor, teacher: torch.Tensor | TopK | None) -> None:
    if isinstance(teacher, torch.Tensor) and teacher.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"the teacher has {teacher.shape[-1]} logits and the student {logits.shape[-1]}: give the student the "
            "teacher's vocabulary and tokenizer, or its labels"
        )


def next_token_targets(batch: Mapping[str, Any]) -> torch.Tensor:
    """
    What each position of a causal language model is to predict.

    Args:
        batch: `labels` (B, T) aligned with the inputs, -100 where there is none; `attention_mask` (B, T) if there is
            padding.

    Returns:
        (B, T) int64; -100 at the last position, where the next token has no label, and at and before padding.

    Raises:
        ValueError: if there are no labels, or only one for each row.
    """
    if batch.get("labels") is None:
        raise ValueError("the batch has no labels; for plain text they are a copy of input_ids")
    labels = batch["labels"]
    if labels.ndim == 1:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} are classes, one for each row: give targets_of=class_targets"
        )
    mask = batch.get("attention_mask")
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return targets if mask is None else targets.masked_fill(mask == 0, IGNORE_INDEX)


def class_targets(batch: Mapping[str, Any]) -> torch.Tensor:
    """
    What a classifier is to predict.

    Args:
        batch: `labels` (B,), classes; -100 where there is none.

    Returns:
        (B,) int64.

    Raises:
        ValueError: if there are no labels, or not one for each row.
    """
    labels = batch.get("labels")
    if labels is None or labels.ndim != 1:
        found = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"a classifier needs labels of shape (batch,), one class for each row, got {found}")
    return labels


def real_tokens(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, T) bool, the tokens that are not padding; None is all."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()
