"""A document, its place in hash order, and the train/validation split that follows from it."""

import heapq
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Literal, NamedTuple

Split = Literal["train", "validation"]
Span = tuple[int, int]
"""Characters of a text, from the first to the one after the last."""

# A validation split holds at least this much text, or this share of the corpus where that is less: evaluation
# on two or three documents says nothing.
VALIDATION_FLOOR_BYTES = 32_768
VALIDATION_FLOOR_SHARE = 0.2


class Document(NamedTuple):
    """A text and the key that decides its split: a relative file name, or the text itself."""

    key: str
    text: str
    learned: tuple[Span, ...] | None = None
    """What is to be predicted, ascending; the rest is only read. None: all of it."""

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def learned_text(self) -> str:
        """The parts that are to be predicted."""
        return "".join(text for text, learned in self.segments() if learned)

    def segments(self) -> Iterator[tuple[str, bool]]:
        """The text in parts, and whether each is to be predicted."""
        end = 0
        for start, stop in ((0, len(self.text)),) if self.learned is None else self.learned:
            yield self.text[end:start], False
            yield self.text[start:stop], True
            end = stop
        yield self.text[end:], False


def hash_unit(key: str, salt: bytes = b"") -> float:
    """Map a key to [0, 1), uniformly and the same way on every machine."""
    digest = blake2b(key.encode(), digest_size=8, salt=salt).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def cut_at_blank_lines(lines: Iterable[str], num_chars: int) -> Iterator[str]:
    """Cut a text into pieces that end with the first blank line after `num_chars` characters.

    Where no blank line follows within four times that length, a piece ends with any line.

    Args:
        lines: of the text, line ends included.
        num_chars: wanted size of a piece.
    """
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= 4 * num_chars or (size >= num_chars and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def validation_threshold(documents: Iterator[Document], fraction: float) -> float:
    """Find the t for which the documents with `hash_unit(key) <= t` are the validation split.

    t is `fraction`, or for small corpora the smallest value that yields `VALIDATION_FLOOR_BYTES` of text (or
    `VALIDATION_FLOOR_SHARE` of it all). It depends on the set of documents only, not on their order, and
    reading stops as soon as `fraction` is known to be enough.

    Args:
        documents: the corpus.
        fraction: share of documents to hold out, in (0, 1).

    Returns:
        The threshold in [0, 1).
    """
    total = below = 0
    # The documents of lowest hash (a max-heap), never much more than the floor.
    lowest: list[tuple[float, int]] = []
    lowest_bytes = 0
    for document in documents:
        position, size = hash_unit(document.key), document.num_bytes
        total += size
        if position <= fraction:
            below += size
            if below >= VALIDATION_FLOOR_BYTES:
                return fraction
        heapq.heappush(lowest, (-position, size))
        lowest_bytes += size
        while lowest_bytes - lowest[0][1] >= VALIDATION_FLOOR_BYTES:
            lowest_bytes -= heapq.heappop(lowest)[1]
    floor = min(VALIDATION_FLOOR_BYTES, VALIDATION_FLOOR_SHARE * total)
    threshold, held_out = fraction, 0
    for negative, size in sorted(lowest, reverse=True):
        if held_out >= floor:
            break
        threshold = max(threshold, -negative)
        held_out += size
    return threshold
