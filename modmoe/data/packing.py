"""Packing: documents one after another in blocks of fixed length, with no padding.

Letters: T sequence length, B blocks. A document may start anywhere in a block and go on in the next one.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


def document_positions(tokens: np.ndarray, eos_token_id: int) -> np.ndarray:
    """Number the tokens of a block from 0, starting again after each end-of-sequence token.

    Positions of 0 are how the model finds document boundaries. A document continued from the block before
    starts at 0 too, because its beginning cannot be seen.

    Args:
        tokens: (T,) ids.
        eos_token_id: the last token of every document.

    Returns:
        (T,) int64.
    """
    return _positions(np.append(True, tokens[:-1] == eos_token_id))


def _positions(first: np.ndarray) -> np.ndarray:
    """(T,) bool, the first tokens of documents -> (T,) int64, each token's number in its document."""
    index = np.arange(len(first))
    return index - np.maximum.accumulate(np.where(first, index, 0))


def packed_example(tokens: np.ndarray, eos_token_id: int) -> dict[str, np.ndarray]:
    """Make a training example of one block.

    Args:
        tokens: (T,) ids of any integer type.
        eos_token_id: the last token of every document.

    Returns:
        `input_ids`, `position_ids` and `labels`, each (T,) int64. Labels are the inputs (models shift them)
        with -100 at the first token of each document, which nothing before it can predict.
    """
    input_ids = tokens.astype(np.int64)
    position_ids = document_positions(tokens, eos_token_id)
    labels = np.where(position_ids == 0, IGNORE_INDEX, input_ids)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


# Of the 32 bits that a token of a document with parts to be predicted is stored in, the two highest are marks.
LEARNED = np.uint32(1 << 31)
"""To be predicted."""
FIRST = np.uint32(1 << 30)
"""The first of its document: end-of-sequence tokens may stand within one, after each turn of a conversation."""


def marked_example(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Make a training example of one block of marked tokens.

    Args:
        tokens: (T,) uint32, ids with marks.

    Returns:
        As `packed_example`; labels are also -100 where a token is not to be predicted.
    """
    input_ids = (tokens & ~(LEARNED | FIRST)).astype(np.int64)
    position_ids = _positions((tokens & FIRST) != 0)
    learned = ((tokens & LEARNED) != 0) & (position_ids > 0)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": np.where(learned, input_ids, IGNORE_INDEX),
    }


def pack_documents(documents: Iterable[np.ndarray], sequence_length: int) -> Iterator[np.ndarray]:
    """Cut a stream of token arrays into blocks of (T,); what is left at the end is dropped."""
    buffer: list[np.ndarray] = []
    size = 0
    for document in documents:
        buffer.append(document)
        size += len(document)
        if size >= sequence_length:
            tokens = np.concatenate(buffer)
            size = len(tokens) % sequence_length
            yield from tokens[: len(tokens) - size].reshape(-1, sequence_length)
            buffer = [tokens[len(tokens) - size :]]


def collate_packed(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Stack examples of one length into a batch.

    Args:
        examples: results of `packed_example`.

    Returns:
        The same keys, each (B, T) int64, and (B,) what a mixture's `fields` add. There is no attention mask because
        there is no padding.

    Raises:
        ValueError: if the blocks differ in length.
    """
    lengths = sorted({len(example["input_ids"]) for example in examples})
    if len(lengths) != 1:
        raise ValueError(f"packed blocks must have one length, got {lengths}; nothing is padded here")
    return {key: torch.from_numpy(np.stack([example[key] for example in examples])) for key in examples[0]}
