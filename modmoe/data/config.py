"""Settings of the data: where text comes from and which tokenizer reads it.

Plain dataclasses of the standard library, so that any configuration system can embed them.
"""

import math
import re
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, ClassVar, Literal, get_args

from .embedded import EMBEDDED_DOMAINS

RowFormatName = Literal["text", "completion", "chat"]

# 256 bytes plus the two special tokens <|endoftext|> and <|pad|>.
MIN_VOCAB_SIZE = 258


@dataclass(frozen=True)
class SourceConfig:
    """One domain of text: exactly one of `embedded`, `dataset` and `files` says where it comes from."""

    # pydantic reads this when a run configuration embeds the class: unknown keys are errors.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    """Name of the domain in metrics and cache directories: letters, digits, ".", "_" and "-"."""
    embedded: str | None = None
    """Text found on every machine with Python: "python", "english" or "c"."""
    dataset: str | None = None
    """Name or local directory of a dataset for `datasets.load_dataset`."""
    files: list[str] = field(default_factory=list)
    """Local files, directories or glob patterns: .jsonl, .ndjson, .json (one object per line), .parquet,
    anything else is plain text; all but parquet may be gzipped (.gz)."""
    weight: float = 1.0
    """Share of the training blocks relative to the weights of the other sources; 0: only for validation."""
    format: RowFormatName = "text"
    """What rows of datasets, jsonl and parquet files hold: "text"; "completion", of which the prompt is read and the
    completion learned; "chat", of which the assistant's messages are learned, in the tokenizer's chat template."""
    text_field: str = "text"
    """Column that holds the text; format "text"."""
    prompt_field: str = "prompt"
    """Column that holds what is only read; format "completion"."""
    completion_field: str = "completion"
    """Column that holds what is learned; nothing is put between the two, so begin it with a space if there is to be
    one; format "completion"."""
    messages_field: str = "messages"
    """Column that holds a list of messages, each with a role and a content; format "chat"."""
    config: str | None = None
    """Configuration ("subset") of `dataset`."""
    split: str = "train"
    """Split of `dataset` that is trained on."""
    validation_split: str | None = None
    """Split of `dataset` for validation; default: "validation" if there is one, else a hold-out by hash."""
    validation_files: list[str] = field(default_factory=list)
    """Like `files`, for validation; default: documents are held out of `files` by hash."""
    streaming: bool = False
    """Tokenise the training text on the fly instead of caching it on disk (corpora larger than the disk)."""
    max_bytes: int | None = None
    """Stop reading with the document that reaches this many bytes of UTF-8 text; None: read everything."""
    validation_fraction: float = 0.05
    """Share of documents held out by hash, in [0, 1); 0: no validation for this source. Ignored where the
    source has a validation split of its own."""
    max_validation_bytes: int = 8_000_000
    """Validation text beyond this many bytes is left out (and not trained on either)."""

    def __post_init__(self) -> None:
        def require(condition: bool, field_name: str, allowed: str) -> None:
            if not condition:
                value = getattr(self, field_name)
                raise ValueError(f"source {self.name!r}: {field_name} must be {allowed}, got {value!r}")

        if not (isinstance(self.name, str) and re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", self.name)):
            raise ValueError(f'source name must consist of letters, digits, ".", "_" and "-", got {self.name!r}')
        for field_name in ("files", "validation_files"):
            value = getattr(self, field_name)
            is_list = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
            require(is_list, field_name, "a list of paths")
        for field_name in ("embedded", "dataset", "config", "validation_split"):
            require(isinstance(getattr(self, field_name), (str, NoneType)), field_name, "a string or None")
        given = [key for key in ("embedded", "dataset", "files") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"source {self.name!r}: give exactly one of embedded, dataset and files, "
                f"got {' and '.join(given) or 'none'}"
            )
        if self.embedded:
            require(self.embedded in EMBEDDED_DOMAINS, "embedded", f"one of {list(EMBEDDED_DOMAINS)}")
        require(self.format in get_args(RowFormatName), "format", f"one of {list(get_args(RowFormatName))}")
        require(not self.embedded or self.format == "text", "format", "'text' with embedded")
        if not self.dataset:
            require(self.config is None, "config", "unset without dataset")
            require(self.split == "train", "split", "unset without dataset")
            require(self.validation_split is None, "validation_split", "unset without dataset")
        if not self.files:
            require(not self.validation_files, "validation_files", "unset without files")
        require(is_number(self.weight) and 0 <= self.weight < math.inf, "weight", "a finite number >= 0")
        columns = ("text_field", "prompt_field", "completion_field", "messages_field")
        for field_name in (*columns, "split"):
            value, what = getattr(self, field_name), "split" if field_name == "split" else "column"
            require(isinstance(value, str) and bool(value), field_name, f"the name of a {what}")
        require(isinstance(self.streaming, bool), "streaming", "true or false")
        require(self.max_bytes is None or is_count(self.max_bytes), "max_bytes", "an integer > 0 or None")
        in_range = is_number(self.validation_fraction) and 0 <= self.validation_fraction < 1
        require(in_range, "validation_fraction", "in [0, 1)")
        require(is_count(self.max_validation_bytes), "max_validation_bytes", "an integer > 0")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: exactly one of `name` (an existing one) and `vocab_size` (train one on the data)."""

    # See SourceConfig.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str | None = None
    """Hub name or directory of any fast Hugging Face tokenizer that has an end-of-sequence token."""
    vocab_size: int | None = None
    """Vocabulary of a byte-level BPE trained on the training text of the sources, at least 258."""
    sample_bytes: int = 8_000_000
    """Text that the BPE is trained on, shared among the sources by weight; about 4 MB/s on one core."""

    def __post_init__(self) -> None:
        if (self.name is None) == (self.vocab_size is None):
            raise ValueError(
                f"tokenizer: give exactly one of name and vocab_size, got name={self.name!r}, "
                f"vocab_size={self.vocab_size!r}"
            )
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise ValueError(f"tokenizer: name must be a hub name or a directory, got {self.name!r}")
        if self.vocab_size is not None and not (is_count(self.vocab_size) and self.vocab_size >= MIN_VOCAB_SIZE):
            raise ValueError(
                f"tokenizer: vocab_size must be an integer >= {MIN_VOCAB_SIZE} "
                f"(256 bytes and 2 special tokens), got {self.vocab_size!r}"
            )
        if not is_count(self.sample_bytes):
            raise ValueError(f"tokenizer: sample_bytes must be an integer > 0, got {self.sample_bytes!r}")


def is_count(value: object) -> bool:
    """True for integers > 0, bools excluded."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """True for ints and floats, bools excluded."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
