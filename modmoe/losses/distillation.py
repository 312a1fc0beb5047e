"""What a student learns from a teacher.

    KL(teacher || student) = sum_v p_v log(p_v / q_v)      p, q: softmax of the logits over a temperature

in fp32 and per token, without the square of the temperature (arXiv:1503.02531). Letters: N tokens, V vocabulary, H
hidden size.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

_CHUNK_TOKENS = 1024


def forward_kl(logits: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    KL(teacher || student) of each token.

    Args:
        logits: (N, V) of the student.
        teacher: (N, V) logits.
        temperature: divides both.

    Returns:
        (N,) fp32.
    """
    log_q = (logits.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return kl_terms(log_p, log_q).sum(-1)


def kl_terms(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p log(p / q) from logarithms, elementwise; 0 where p is."""
    p = log_p.exp()
    return p * (log_p - log_q).masked_fill(p == 0, 0.0)


def summed_kl(
    logits: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """
    Sum of `forward_kl` over some tokens.

    Args:
        logits, teacher: (N, V).
        valid: (N,) bool, the tokens that count.
        temperature: divides both.

    Returns:
        () fp32.
    """

    def of_rows(rows: slice) -> torch.Tensor:
        return forward_kl(logits[rows], teacher[rows], temperature).masked_fill(~valid[rows], 0.0).sum()

    return sum_of_chunks(of_rows, len(logits))


def sum_of_chunks(of_rows: Callable[[slice], torch.Tensor], num_tokens: int) -> torch.Tensor:
    """
    Sum of a function of rows over all of them.

    Chunk by chunk, each computed again for the gradient: fp32 copies of all logits are never alive together.

    Args:
        of_rows: gives a sum over a slice of the tokens, any shape.
        num_tokens: at least 1.
    """
    chunks = (slice(start, start + _CHUNK_TOKENS) for start in range(0, num_tokens, _CHUNK_TOKENS))
    sums = [checkpoint(of_rows, rows, use_reentrant=False, preserve_rng_state=False) for rows in chunks]
    return torch.stack(sums).sum(0)


def hidden_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """
    ||s - t||^2 / ||t||^2 of each token (hints, arXiv:1412.6550); relative, because norms differ by orders of magnitude
    between tokens and depths.

    Args:
        student, teacher: (..., H).

    Returns:
        (...) fp32.
    """
    student, teacher = student.float(), teacher.float()
    smallest = torch.finfo(torch.float32).tiny
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(smallest)
