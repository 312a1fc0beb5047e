"""Blocks of one domain: a dataset over a token store, and an endless stream tokenised on the fly."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Dataset

from .packing import pack_documents
from .sources import Source
from .store import TokenStore
from .tokenizer import DocumentEncoder

Example = dict[str, np.ndarray]


class PackedDataset(Dataset[Example]):
    """All blocks of one split of one domain, in document order; the last incomplete block is dropped.

    Args:
        store: the tokens.
        sequence_length: tokens per block.
        make_example: of the encoder that made the tokens.
    """

    def __init__(self, store: TokenStore, sequence_length: int, make_example: Callable[[np.ndarray], Example]) -> None:
        self._store = store
        self._sequence_length = sequence_length
        self._make_example = make_example

    def __len__(self) -> int:
        return self._store.num_tokens // self._sequence_length

    def __getitem__(self, index: int) -> Example:
        """Return block `index` as `packed_example` or `marked_example` does."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self._sequence_length
        return self._make_example(self._store.read(start, start + self._sequence_length))


class PackedStream:
    """Blocks of a source that is tokenised on the fly, pass after pass.

    Args:
        source: the documents.
        encoder: the tokenizer.
        sequence_length: tokens per block.
    """

    def __init__(self, source: Source, encoder: DocumentEncoder, sequence_length: int) -> None:
        self._source = source
        self._encoder = encoder
        self._sequence_length = sequence_length

    def __iter__(self) -> Iterator[Example]:
        while True:
            block = None
            for block in pack_documents(self._tokens(), self._sequence_length):
                yield self._encoder.make_example(block)
            if block is None:
                raise ValueError(
                    f"source {self._source.config.name!r}: training text is shorter than one block of "
                    f"{self._sequence_length} tokens; add text or lower sequence_length"
                )

    def _tokens(self) -> Iterator[np.ndarray]:
        for document in self._source.documents("train"):
            yield from self._encoder.encode_documents([document])
