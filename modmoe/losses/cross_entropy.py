"""The cross entropy of a language model, without full-size copies of the logits.

PyTorch's own makes up to four tensors as large as the logits, in float32: the cast, the log-softmax and a gradient of
each. Here the logits are read in chunks of rows, once forward and once backward, and the gradient is the only new
tensor of their size, in their dtype. Letters: N tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers in a chunk: on a CPU few enough to stay in its cache, on other devices enough to keep them busy.
_CPU_CHUNK, _DEVICE_CHUNK = 2**19, 2**25


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of next tokens, as transformers' `ForCausalLMLoss` and with its arguments.

    Args:
        logits: (..., T, V), any floating dtype; sums are taken in float32 (float64 for float64).
        labels: (..., T), the tokens themselves; position t is to predict label t + 1.
        vocab_size: V.
        num_items_in_batch: divides the sum over tokens; without it the loss is the mean over them.
        ignore_index: label of tokens that do not count.
        shift_labels: (..., T), already shifted; used instead of `labels`.
        kwargs: not used.

    Returns:
        () float32 (float64). The mean over no tokens is NaN, and its gradient 0.

    Raises:
        ValueError, IndexError: as `summed_cross_entropy`.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    total = summed_cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index)
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def summed_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum of -log softmax(logits)[target] over the tokens whose target is not `ignore_index`.

    Can be differentiated once (for more, set `model.loss_function` to transformers' `ForCausalLMLoss`). Under
    `torch.compile` it is PyTorch's own, which the compiler fuses.

    Args:
        logits: (N, V), any floating dtype.
        targets: (N,) int64.
        ignore_index: target of tokens that do not count.

    Returns:
        () float32 (float64 for float64).

    Raises:
        ValueError: another number of targets than of logits.
        IndexError: on the CPU, a target that is neither `ignore_index` nor in 0..V - 1.
    """
    if torch.compiler.is_compiling():
        return _pytorch(logits, targets, ignore_index)
    if len(logits) != len(targets):
        raise ValueError(f"there must be a target for each of {len(logits)} rows of logits, got {len(targets)}")
    total: Tensor = _SummedCrossEntropy.apply(logits, targets, ignore_index)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.ignore_index = ignore_index
        total = logits.new_zeros((), dtype=_work_dtype(logits))
        for rows in _chunks(logits):
            total += _pytorch(logits[rows], targets[rows], ignore_index)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        valid = (targets != ctx.ignore_index)[:, None]
        chosen = targets[:, None].where(valid, 0)
        scale = dtotal.where(valid, 0.0)  # not a product: of no tokens, dtotal may be infinite
        for rows in _chunks(logits):
            probs = logits[rows].softmax(-1, dtype=dtotal.dtype)
            probs.scatter_add_(1, chosen[rows], probs.new_full((len(probs), 1), -1.0))
            if probs.dtype == dlogits.dtype:
                torch.mul(probs, scale[rows], out=dlogits[rows])
            else:
                dlogits[rows] = probs.mul_(scale[rows])
        return dlogits, None, None


def _pytorch(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(logits.to(_work_dtype(logits)), targets, ignore_index=ignore_index, reduction="sum")


def _chunks(logits: Tensor) -> list[slice]:
    size = _CPU_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, size // max(1, logits.shape[1]))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def _work_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
