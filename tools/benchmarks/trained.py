"""What early stop saves on trained weights: attention alone, on what a model makes of text.

The text is Python source files that the default training data hold out. Letters as in `attention.py`.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import attention
from benchmarks.workload import Workload
from modmoe.data.documents import hash_unit
from modmoe.data.embedded import EmbeddedReader
from modmoe.layers import stickbreaking

Layer: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""q (1, Hq, T, D), k and v (1, Hkv, T, D)."""

_HELD_OUT = 0.05  # share of the default data's files
# A block is read or not: those of the C++ kernel with AVX-512, and about the size of those of the others.
_ROWS, _KEYS = 32, 24


def trained(
    directory: Path, length: int, backend: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Workload]:
    """
    One workload per layer; queries, keys and values are the same in all rounds.

    Args:
        directory: of a causal LM with stick-breaking attention and its tokenizer.
        length: of the text, in tokens.
        backend: the one with early stop.

    Raises:
        ValueError: `directory` holds no such model, or there is not enough text.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json: give the directory of a trained model")
    config = AutoConfig.from_pretrained(directory)
    stickbreaking.check_declared(config)
    for number, layer in enumerate(capture(directory, length, device, dtype)):
        yield _workload(f"trained attention, T {length}, layer {number}", layer, backend, config.attend_current)


def _workload(name: str, layer: Layer, backend: str, attend_current: bool) -> Workload:
    q, k, _ = layer

    def draw() -> attention.Inputs:
        inputs = (x.clone().requires_grad_() for x in layer)
        return attention.Inputs(*inputs, torch.randn_like(q), torch.randn(q.shape[:3], device=q.device))

    shape = attention.Shape(q.shape[1], k.shape[1], q.shape[3], q.shape[2], k.shape[2])
    stop, read_all = attention.ours(attention.forward_backward, backend, attend_current)
    workload = attention.training_on(name, draw, shape, q.dtype, (stop, replace(read_all, role="baseline")))
    share = share_of_key_blocks_read(q, k, attend_current)
    return replace(workload, fractions=lambda seconds: {"key blocks read": share})


@functools.cache
def capture(directory: Path, length: int, device: torch.device, dtype: torch.dtype) -> list[Layer]:
    """q, k and v of each layer, while the model reads `length` tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    ids = torch.tensor([held_out_tokens(directory, length)], device=device)
    seen: list[Layer] = []
    attend = stickbreaking.stickbreaking_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        seen.append((q, k, v))
        return attend(q, k, v, **options)

    with torch.no_grad(), patch.object(stickbreaking, "stickbreaking_attention", record):
        model(ids, use_cache=False, logits_to_keep=1)
    return seen


def held_out_tokens(directory: Path, length: int) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids: list[int] = []
    for document in EmbeddedReader("python").read("validation"):
        if hash_unit(document.key) <= _HELD_OUT:
            ids += tokenizer(document.text).input_ids
        if len(ids) >= length:
            return ids[:length]
    raise ValueError(f"there are only {len(ids)} tokens of held-out text, {length} are asked for")


def share_of_key_blocks_read(q: Tensor, k: Tensor, attend_current: bool = True) -> float:
    """
    Of the blocks of keys before or at some query of a block of rows, those read until all its sticks are used up.

    A row is a query of one head; rows of the heads that share a key/value head lie side by side.
    """
    # The rule of the kernels: what is left of the stick cannot show in the dtype.
    log_stop = float(torch.tensor(torch.finfo(q.dtype).eps / 64).log())
    groups = q.shape[1] // k.shape[1]
    read = total = 0
    for head in range(k.shape[1]):
        rows = q[0, head * groups : (head + 1) * groups].transpose(0, 1).flatten(0, 1).float()
        query = torch.arange(len(rows), device=q.device) // groups
        for start in range(0, len(rows), _ROWS):
            block, positions = rows[start : start + _ROWS], query[start : start + _ROWS]
            keys = k[0, head, : int(positions[-1]) + 1].float()
            z = block @ keys.T * q.shape[-1] ** -0.5
            visible = torch.arange(len(keys), device=q.device) < positions[:, None] + attend_current
            newest_first = torch.where(visible, -F.softplus(z), 0).flip(-1)
            sums = F.pad(newest_first, (0, -len(keys) % _KEYS)).unflatten(-1, (-1, _KEYS)).sum(-1)
            left = sums.cumsum(-1).amax(0)  # log of the longest stick after each block
            read += 1 + int((left[:-1] >= log_stop).sum())
            total += len(left)
    return read / total
