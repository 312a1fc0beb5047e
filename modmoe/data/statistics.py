"""How much text a domain holds, and what simple compressors make of it."""

import gzip
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SplitStatistics:
    """Size of one split; `tokens` counts the end-of-sequence token of each document."""

    documents: int
    text_bytes: int
    tokens: int
    learned_tokens: int | None = None
    """Those that are to be predicted, and whose text `text_bytes` counts; None: all."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, of what is to be predicted."""
        return self.text_bytes / (self.tokens if self.learned_tokens is None else self.learned_tokens)


@dataclass(frozen=True)
class DomainStatistics:
    """Size of a domain's splits and yardsticks for its validation text, in bits per byte.

    Attributes:
        train: None for streamed sources.
        validation: None for sources without validation.
        byte_unigram_entropy: of the validation text; a model that knows byte frequencies and nothing else.
        gzip_bits_per_byte: of the validation text; `gzip -9`.
    """

    train: SplitStatistics | None
    validation: SplitStatistics | None
    byte_unigram_entropy: float | None
    gzip_bits_per_byte: float | None

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Convert a mean validation loss in nats per token to bits per byte of text.

        First tokens of documents and blocks are never predicted; they count as costing the mean.

        Raises:
            ValueError: if the domain has no validation text.
        """
        if self.validation is None:
            raise ValueError("bits per byte need a validation split, which this domain does not have")
        return nats_per_token / math.log(2) / self.validation.bytes_per_token


def byte_unigram_entropy(text: bytes) -> float:
    """Entropy of the byte frequencies of a non-empty text, in bits per byte."""
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8))
    shares = counts[counts > 0] / len(text)
    return float(-(shares * np.log2(shares)).sum())


def gzip_bits_per_byte(text: bytes) -> float:
    """Size of a non-empty text after `gzip -9`, in bits per byte of it."""
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
