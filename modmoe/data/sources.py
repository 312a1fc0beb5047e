"""Sources of documents: embedded text, local files and anything `datasets` can load, behind one interface."""

import codecs
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO, cast

from transformers import PreTrainedTokenizerFast

from .config import SourceConfig
from .documents import Document, Split, cut_at_blank_lines, hash_unit, validation_threshold
from .embedded import EmbeddedReader
from .formats import RowFormat, row_format

# Plain text files are cut into documents of about this size, so that one file still has some to hold out.
_PIECE_CHARS = 16_384

_JSON_LINES = {".jsonl", ".ndjson", ".json"}


class Reader(Protocol):
    """Reads the raw documents of one place."""

    skipped: set[str]
    """What could not be read as text so far."""

    @property
    def own_validation(self) -> bool:
        """Whether the place has a validation split of its own."""

    def fingerprint(self) -> list[object]:
        """Describe the content, JSON-serialisable, without reading it."""

    def read(self, split: Split) -> Iterator[Document]:
        """Yield the documents of a split, always in the same order."""


class Source:
    """One configured domain: its documents for training and validation.

    Args:
        config: the domain.
        tokenizer: whose chat template conversations are written in; None if it is yet to be trained.

    Raises:
        FileNotFoundError: if a file, directory or pattern matches nothing.
        ValueError: if a file is given for training and for validation, or there is no chat template for conversations.
        ImportError: if the source needs the `datasets` package and it is not installed.
    """

    def __init__(self, config: SourceConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.config = config
        self._format = row_format(config, tokenizer)
        self.reader = _open_reader(config, self._format)

    @property
    def has_validation(self) -> bool:
        """Whether any document is meant for validation."""
        return self.reader.own_validation or self.config.validation_fraction > 0

    @cached_property
    def fingerprint(self) -> list[object]:
        """Everything that decides which documents come out, JSON-serialisable."""
        config = self.config
        limits = [config.max_bytes, config.validation_fraction, config.max_validation_bytes]
        return [self.reader.fingerprint(), self._format.fingerprint(), *limits]

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of a split, in the same order every time.

        Raises:
            ValueError: for a broken line, a row without what the format needs, or no text to train on.
        """
        if split == "validation":
            held_out = self._read(split) if self.reader.own_validation else self._hash_split(split)
            yield from limit_bytes(held_out, self.config.max_validation_bytes)
            return
        whole = self.reader.own_validation or self.config.validation_fraction == 0
        empty = True
        for document in self._read("train") if whole else self._hash_split("train"):
            empty = False
            yield document
        if empty:
            remedy = "" if whole else ", beside what is held out; add documents or set validation_fraction to 0"
            raise ValueError(
                f"source {self.config.name!r}: no text to train on{remedy} "
                f"(skipped as not readable UTF-8 text: {len(self.reader.skipped)})"
            )

    def _hash_split(self, split: Split) -> Iterator[Document]:
        for document in self._read("train"):
            if (hash_unit(document.key) <= self._threshold) == (split == "validation"):
                yield document

    @cached_property
    def _threshold(self) -> float:
        return validation_threshold(self._read("train"), self.config.validation_fraction)

    def _read(self, split: Split) -> Iterator[Document]:
        documents = (document for document in self.reader.read(split) if document.text)
        return limit_bytes(documents, self.config.max_bytes if split == "train" else None)


def limit_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """Yield documents until `max_bytes` of UTF-8 text are reached, the document that reaches it included."""
    num_bytes = 0
    for document in documents:
        yield document
        num_bytes += document.num_bytes
        if max_bytes is not None and num_bytes >= max_bytes:
            return


class FileReader:
    """Reads local files: JSON lines, parquet and plain text.

    Files that are damaged or not UTF-8 text are skipped as a whole and listed in `skipped`. Texts are their own keys.

    Args:
        config: a source with `files`.
        rows: what the rows of JSON lines and parquet mean.

    Raises:
        ValueError: if a file is among both `files` and `validation_files`, or is plain text where rows are needed.
    """

    def __init__(self, config: SourceConfig, rows: RowFormat) -> None:
        self._rows = rows
        self._files: dict[Split, list[Path]] = {
            "train": expand_paths(config.name, config.files),
            "validation": expand_paths(config.name, config.validation_files),
        }
        for path in (path for paths in self._files.values() for path in paths):
            if config.format != "text" and _suffix(path) not in {*_JSON_LINES, ".parquet"}:
                raise ValueError(
                    f"source {config.name!r}: format {config.format!r} needs rows, as JSON lines or parquet, and "
                    f"{path} is plain text"
                )
        train = {path.resolve() for path in self._files["train"]}
        for path in self._files["validation"]:
            if path.resolve() in train:
                raise ValueError(
                    f"source {config.name!r}: {path} is in both files and validation_files, so it would be trained on "
                    "and validated on; remove it from one of them"
                )
        self.own_validation = bool(config.validation_files)
        self._readable: dict[Path, bool] = {}
        self.skipped: set[str] = set()

    def fingerprint(self) -> list[object]:
        """Paths, sizes and times of the files."""
        return [
            [split, str(path), path.stat().st_size, path.stat().st_mtime_ns]
            for split, paths in self._files.items()
            for path in paths
        ]

    def read(self, split: Split) -> Iterator[Document]:
        """Yield the documents, file by file in the given order."""
        for path in self._files[split]:
            suffix = _suffix(path)
            if not self._is_readable(path, suffix):
                self.skipped.add(str(path))
            elif suffix == ".parquet":
                # Streamed, because otherwise datasets writes a copy of the file.
                options = {"data_files": str(path), "split": "train", "streaming": True}
                yield from _rows(_datasets().load_dataset("parquet", **options), self._rows, path)
            else:
                with _open_text(path) as file:
                    if suffix in _JSON_LINES:
                        yield from self._json_lines(file, path)
                    else:
                        yield from (Document(piece, piece) for piece in cut_at_blank_lines(file, _PIECE_CHARS))

    def _is_readable(self, path: Path, suffix: str) -> bool:
        if path not in self._readable:
            is_parquet = suffix == ".parquet"
            self._readable[path] = _is_sound_parquet(path, self._rows.columns) if is_parquet else _is_text_file(path)
        return self._readable[path]

    def _json_lines(self, file: TextIO, path: Path) -> Iterator[Document]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON ({error}); expected one object per line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected one JSON object per line, got {type(row).__name__}")
            document = self._rows.document(row, place)
            if _is_encodable(document.text):
                yield document
            else:
                self.skipped.add(place)


class HubReader:
    """Reads a dataset by hub name or local directory. Texts are their own keys.

    Args:
        config: a source with `dataset`.
        rows: what its rows mean.
    """

    def __init__(self, config: SourceConfig, rows: RowFormat) -> None:
        self._config = config
        self._rows = rows
        self.skipped: set[str] = set()

    @cached_property
    def _validation_split(self) -> str | None:
        if self._config.validation_split is not None:
            return self._config.validation_split
        names = _datasets().get_dataset_split_names(self._config.dataset, self._config.config)
        return "validation" if "validation" in names and self._config.split != "validation" else None

    @property
    def own_validation(self) -> bool:
        """Whether the dataset has, or was given, a validation split."""
        return self._validation_split is not None

    def fingerprint(self) -> list[object]:
        """The dataset, its splits and, unless streamed, what `datasets` calls their fingerprint."""
        config = self._config
        content = None if config.streaming else self._load("train")._fingerprint
        return [config.dataset, config.config, config.split, self._validation_split, content]

    def read(self, split: Split) -> Iterator[Document]:
        """Yield the rows in the dataset's order."""
        for document in _rows(self._load(split), self._rows, self._config.dataset):
            if _is_encodable(document.text):
                yield document
            else:
                self.skipped.add(f"a row of {self._config.dataset}")

    def _load(self, split: Split) -> Any:
        config = self._config
        name = config.split if split == "train" else self._validation_split
        return _datasets().load_dataset(config.dataset, name=config.config, split=name, streaming=config.streaming)


def expand_paths(name: str, patterns: Iterable[str]) -> list[Path]:
    """List the files behind paths, directories and glob patterns, sorted within each.

    Directories are searched recursively, without what is hidden behind a dot.

    Raises:
        FileNotFoundError: if a pattern matches no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.is_file() and not _is_hidden(item, path))
        elif path.is_file():
            found = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            found = sorted(match for match in matches if match.is_file())
        if not found:
            raise FileNotFoundError(f"source {name!r}: no file at {pattern!r} (looked from {Path.cwd()})")
        files.update(dict.fromkeys(found))
    return list(files)


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def stable_hash(value: object) -> str:
    """Hash a JSON-serialisable value into 16 hexadecimal digits, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _open_reader(config: SourceConfig, rows: RowFormat) -> Reader:
    if config.embedded:
        return EmbeddedReader(config.embedded)
    return FileReader(config, rows) if config.files else HubReader(config, rows)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("this source needs the datasets package: pip install datasets") from error
    return datasets


def _rows(dataset: Any, rows: RowFormat, place: object) -> Iterator[Document]:
    # Streams may not know their columns before the first row.
    if dataset.column_names is not None and set(rows.columns) <= set(dataset.column_names):
        dataset = dataset.select_columns(rows.columns)
    return (rows.document(row, place) for row in dataset)


def _is_encodable(text: str) -> bool:
    # JSON escapes can spell lone surrogates, which no UTF-8 text contains.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suffix(path: Path) -> str:
    """Return the suffix in lower case, that of the content where the file is gzipped."""
    return Path(path.stem).suffix.lower() if _is_gzipped(path) else path.suffix.lower()


def _is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open_binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if _is_gzipped(path) else path.open("rb")


def _open_text(path: Path) -> TextIO:
    # utf-8-sig drops the byte order mark that some editors write; newline="\n" keeps carriage returns as they are.
    return io.TextIOWrapper(_open_binary(path), encoding="utf-8-sig", newline="\n")


def _is_text_file(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _open_binary(path) as file:
            while chunk := file.read(1 << 20):
                decoder.decode(chunk)
                if b"\0" in chunk:
                    return False
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error):
        return False
    return True


def _is_sound_parquet(path: Path, columns: list[str]) -> bool:
    _datasets()  # brings pyarrow, or says what to install
    import pyarrow
    import pyarrow.parquet

    # Opened here, so that a file that may not be read is an error and not skipped as damaged.
    with path.open("rb") as file:
        try:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024, columns=columns):
                batch.validate(full=True)
        except (pyarrow.ArrowException, OSError):
            return False
    return True
