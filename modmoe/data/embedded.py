"""Text that every machine with Python has, as three domains.

    python    source files of the running interpreter's standard library, without its tests
    english   the language reference behind `help()` (`pydoc_data.topics`)
    c         C headers of Python and of the system; where there are none, the C++ headers inside torch

Documents come in hash order of their names, so that the first `max_bytes` of a domain are a fair sample.
Identical texts are taken once.
"""

import hashlib
import importlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from .documents import Document, Split, cut_at_blank_lines, hash_unit

# Development machines have 100 MB of headers and slim ones 1 MB; more than this is not read.
MAX_DOMAIN_BYTES = 16_000_000

# Documents of the English domain are cut to about this size.
_TOPIC_CHARS = 8192

_SYSTEM_HEADERS = (Path(sysconfig.get_paths()["include"]), Path("/usr/include"))

_EXCLUDED_DIRECTORIES = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "__pycache__",
}


def _python_files() -> Iterator[tuple[str, Path | str]]:
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), ".py")


def _c_files() -> Iterator[tuple[str, Path | str]]:
    roots = list(_SYSTEM_HEADERS)
    if not any(next(_files(root, ".h"), None) for root in roots):
        spec = importlib.util.find_spec("torch")
        roots = [Path(spec.origin).parent / "include"] if spec and spec.origin else []
    for root in roots:
        yield from _files(root, ".h")


def _files(root: Path, suffix: str) -> Iterator[tuple[str, Path]]:
    for directory, subdirectories, names in os.walk(root):
        # Not entered, rather than filtered: site-packages can be a hundred times the rest.
        subdirectories[:] = [name for name in subdirectories if name not in _EXCLUDED_DIRECTORIES]
        for path in (Path(directory, name) for name in names if name.endswith(suffix)):
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def _english_topics() -> Iterator[tuple[str, Path | str]]:
    for name, topic in importlib.import_module("pydoc_data.topics").topics.items():
        # A few topics hold a third of the text; whole, they would leave validation to chance.
        for number, piece in enumerate(cut_at_blank_lines(topic.splitlines(keepends=True), _TOPIC_CHARS)):
            yield f"{name}/{number}", piece


# Each yields names with a file to read or the text itself.
_DOMAINS: dict[str, Callable[[], Iterator[tuple[str, Path | str]]]] = {
    "python": _python_files,
    "english": _english_topics,
    "c": _c_files,
}
EMBEDDED_DOMAINS = tuple(_DOMAINS)


class EmbeddedReader:
    """Reads one embedded domain.

    Args:
        domain: one of `EMBEDDED_DOMAINS`.

    Raises:
        ValueError: for an unknown domain.
    """

    own_validation = False

    def __init__(self, domain: str) -> None:
        if domain not in _DOMAINS:
            raise ValueError(f"embedded domain must be one of {list(EMBEDDED_DOMAINS)}, got {domain!r}")
        self._domain = domain
        self.skipped: set[str] = set()

    @cached_property
    def _contents(self) -> list[tuple[str, Path | str]]:
        return sorted(_DOMAINS[self._domain](), key=_reading_order)

    def fingerprint(self) -> list[object]:
        """Describe the content: names, sizes and times of the files, or the texts' hashes."""
        entries = [(name, _version(content)) for name, content in self._contents]
        digest = hashlib.sha256(repr(entries).encode()).hexdigest()
        return ["embedded", self._domain, MAX_DOMAIN_BYTES, digest]

    def read(self, split: Split) -> Iterator[Document]:
        """Yield the documents in hash order of their names; files that are not UTF-8 go to `skipped`."""
        seen: set[bytes] = set()
        num_bytes = 0
        for name, content in self._contents:
            if num_bytes >= MAX_DOMAIN_BYTES:
                return
            raw = content.read_bytes() if isinstance(content, Path) else content.encode()
            digest = hashlib.sha256(raw).digest()
            if digest in seen:
                continue
            seen.add(digest)
            text = decode_text(raw)
            if text is None:
                self.skipped.add(name)
                continue
            num_bytes += len(raw)
            yield Document(name, text)


def _reading_order(item: tuple[str, Path | str]) -> tuple[float, str]:
    name, content = item
    return hash_unit(name, salt=b"order"), str(content)


def decode_text(raw: bytes) -> str | None:
    """Decode UTF-8 text; None for anything else, binary data with NUL bytes included."""
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _version(content: Path | str) -> object:
    if isinstance(content, Path):
        status = content.stat()
        return status.st_size, status.st_mtime_ns
    return hashlib.sha256(content.encode()).hexdigest()
