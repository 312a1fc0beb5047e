"""Tokenised documents on disk: shards of bounded size, written once, resumable and checked.

A store is a directory of `shard-00000.npy`, ... (one-dimensional token arrays, every document followed by the
end-of-sequence token) and `manifest.json`, which lists the finished shards with their documents, size and
hash. All files appear complete or not at all, and their bytes depend on the documents and the tokenizer only,
so an interrupted run goes on where it stopped and processes that fill one store at the same time do not
disturb each other.
"""

import errno
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
from tqdm.auto import tqdm

from .documents import Document
from .tokenizer import DocumentEncoder

logger = logging.getLogger(__name__)

# 64 MB of uint16 ids; also what tokenising holds in memory.
SHARD_TOKENS = 2**25

# Documents are encoded in batches of about this many characters, enough to keep the tokenizer's threads busy.
_BATCH_CHARS = 4_000_000

STORE_FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One entry of the manifest: a run of consecutive documents."""

    file: str
    documents: int
    text_bytes: int
    tokens: int
    file_bytes: int
    sha256: str
    learned_tokens: int | None = None
    """How many of the tokens are to be predicted; None: all."""


@dataclass
class TokenStore:
    """The finished shards of one split of one source, read as one long token array.

    Attributes:
        directory: where the files are.
        shards: the finished shards in document order.
        complete: whether they hold every document.
        text_measures: figures of the text that cost a pass over it and are kept here, by name.
    """

    directory: Path
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    text_measures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._arrays: dict[int, np.ndarray] = {}
        self._ends = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)

    @classmethod
    def load(cls, directory: Path) -> "TokenStore":
        """Read a manifest; without a readable one the store is empty. Shards are not checked here."""
        path = directory / _MANIFEST
        try:
            manifest = json.loads(path.read_text())
            shards = [Shard(**entry) for entry in manifest["shards"]]
            return cls(directory, shards, manifest["complete"], manifest["text_measures"])
        except FileNotFoundError:
            return cls(directory)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): tokenising again", path, error)
            return cls(directory)

    def save_manifest(self) -> None:
        """Write the manifest, replacing the old one at once."""
        manifest = {
            "complete": self.complete,
            "text_measures": self.text_measures,
            "shards": [asdict(shard) for shard in self.shards],
        }
        content = json.dumps(manifest, indent=1).encode()
        _write_atomically(self.directory / _MANIFEST, lambda file: file.write(content))

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def num_text_bytes(self) -> int:
        """UTF-8 bytes of their texts, as far as these are to be predicted."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def num_learned_tokens(self) -> int | None:
        """Number of tokens that are to be predicted; None: all."""
        counts = [shard.learned_tokens for shard in self.shards]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the end-of-sequence token of each document included."""
        return sum(shard.tokens for shard in self.shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy tokens [start, stop) of the concatenated shards, with 0 <= start < stop <= num_tokens."""
        parts = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[index]) - self.shards[index].tokens
            end = min(stop, int(self._ends[index]))
            parts.append(self._array(index)[start - first : end - first])
            start, index = end, index + 1
        return np.concatenate(parts)

    def _array(self, index: int) -> np.ndarray:
        if index not in self._arrays:
            self._arrays[index] = np.load(self.directory / self.shards[index].file, mmap_mode="r")
        return self._arrays[index]

    def __getstate__(self) -> dict[str, object]:
        # Memory maps would be pickled as copies of their files; workers open their own.
        return self.__dict__ | {"_arrays": {}}


def build_store(
    directory: Path,
    documents: Callable[[], Iterator[Document]],
    encoder: DocumentEncoder,
    *,
    shard_tokens: int = SHARD_TOKENS,
    description: str = "",
) -> TokenStore:
    """Open a store, tokenising what is not there yet and remaking shards that are damaged.

    Of a complete store only the sizes of its files are looked at: every process opens it at every start, and hashing
    takes hours where there are hundreds of gigabytes.

    Args:
        directory: of the store; its name must change whenever the documents or the tokenizer do.
        documents: yields all documents, in the same order each time it is called.
        encoder: the tokenizer.
        shard_tokens: a shard ends with the document that reaches this many tokens.
        description: what the progress bar says.

    Returns:
        The complete store.

    Raises:
        OSError: if the disk is full; finished shards are kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    store = TokenStore.load(directory)
    _remake_damaged_shards(store, documents, encoder)
    if store.complete:
        return store

    if store.shards:
        logger.info("%s: going on after %d documents", directory, store.num_documents)
    shards = list(store.shards)
    remaining = islice(documents(), store.num_documents, None)
    with tqdm(desc=description, unit="B", unit_scale=True, initial=store.num_text_bytes, disable=None) as bar:
        for content in _shard_contents(remaining, encoder, shard_tokens, bar.update):
            shards.append(_write_shard(directory / f"shard-{len(shards):05d}.npy", content))
            TokenStore(directory, shards).save_manifest()
    store = TokenStore(directory, shards, complete=True)
    store.save_manifest()
    return store


def _remake_damaged_shards(
    store: TokenStore, documents: Callable[[], Iterator[Document]], encoder: DocumentEncoder
) -> None:
    first = 0
    for shard in store.shards:
        path = store.directory / shard.file
        reason = _damage(path, shard, compare_hash=not store.complete)
        if reason is not None:
            logger.warning("%s: %s, making it again", path, reason)
            run = islice(documents(), first, first + shard.documents)
            contents = _shard_contents(run, encoder, sys.maxsize)
            if [_write_shard(path, content) for content in contents] != [shard]:
                raise RuntimeError(
                    f"{path} was made of other text than its source holds now; "
                    f"delete {store.directory} to tokenise the source again"
                )
        first += shard.documents


def _damage(path: Path, shard: Shard, compare_hash: bool) -> str | None:
    if not path.exists():
        return "missing"
    if path.stat().st_size != shard.file_bytes:
        return f"{path.stat().st_size} bytes long instead of {shard.file_bytes}"
    if compare_hash and _sha256(path) != shard.sha256:
        return "content does not match its hash"
    return None


class _ShardContent(NamedTuple):
    tokens: np.ndarray
    documents: int
    text_bytes: int
    learned_tokens: int | None


def _shard_contents(
    documents: Iterator[Document],
    encoder: DocumentEncoder,
    shard_tokens: int,
    on_progress: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[_ShardContent]:
    buffer: list[np.ndarray] = []
    num_tokens = text_bytes = 0

    def content() -> _ShardContent:
        tokens = np.concatenate(buffer)
        return _ShardContent(tokens, len(buffer), text_bytes, encoder.num_learned(tokens))

    for batch in _batches(documents):
        encoded = encoder.encode_documents(batch)
        for document, tokens in zip(batch, encoded, strict=True):
            buffer.append(tokens)
            num_tokens += len(tokens)
            text_bytes += len(document.learned_text.encode())
            on_progress(document.num_bytes)
            if num_tokens >= shard_tokens:
                yield content()
                buffer, num_tokens, text_bytes = [], 0, 0
    if buffer:
        yield content()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_shard(path: Path, content: _ShardContent) -> Shard:
    _write_atomically(path, lambda file: np.save(file, content.tokens))
    return Shard(
        file=path.name,
        documents=content.documents,
        text_bytes=content.text_bytes,
        tokens=len(content.tokens),
        file_bytes=path.stat().st_size,
        sha256=_sha256(path),
        learned_tokens=content.learned_tokens,
    )


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # numpy reports a short write without a number.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, None):
            raise OSError(
                error.errno or errno.ENOSPC,
                f"no space left to write {path}: finished shards are kept and the next run goes on after "
                "them; free some space or choose another cache_dir",
            ) from error
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
