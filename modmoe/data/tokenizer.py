"""The tokenizer: a byte-level BPE trained on the data and cached, or any fast Hugging Face tokenizer."""

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .config import MIN_VOCAB_SIZE, TokenizerConfig
from .documents import Document
from .packing import packed_example
from .sources import Source, limit_bytes, stable_hash

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

_FORMAT = 1


def load_tokenizer(config: TokenizerConfig, sources: Sequence[Source], cache_dir: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer, training it first where that is asked for and not yet in the cache.

    Args:
        config: an existing tokenizer or the size of a new one.
        sources: what to train on, each for its share of `config.sample_bytes` by weight.
        cache_dir: trained tokenizers live below it, one directory per content and size.

    Returns:
        A fast tokenizer with an end-of-sequence token.

    Raises:
        ValueError: if the tokenizer is a slow one or has no end-of-sequence token.
        FileNotFoundError: if the tokenizer's name is a path and no directory is there.
    """
    if config.name is not None:
        return existing_tokenizer(config.name)
    assert config.vocab_size is not None  # TokenizerConfig holds one of the two
    parts = [[source.fingerprint, float(source.config.weight)] for source in sources]
    directory = cache_dir / stable_hash([_FORMAT, config.vocab_size, config.sample_bytes, parts])
    if directory.exists():
        try:
            return _existing(str(directory))
        except Exception as error:  # whatever the parsers of tokenizers and transformers stumble over
            logger.warning("%s is damaged (%s: %s), making it again", directory, type(error).__name__, error)
    logger.info("training a tokenizer of %d tokens", config.vocab_size)
    sample = _weighted_sample(sources, config.sample_bytes)
    _publish(train_bpe(sample, config.vocab_size), directory)
    return _existing(str(directory))


def existing_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from the hub or a directory; raises as `load_tokenizer` does."""
    return _existing(_checked_name(name))


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text encodes without unknown tokens and decodes to itself.

    `<|endoftext|>` (id 0) ends documents and begins text (eos and bos); `<|pad|>` (id 1) pads.

    Args:
        texts: the sample; the result depends on nothing else.
        vocab_size: number of tokens, special ones included; small samples may give fewer.

    Raises:
        ValueError: if `vocab_size` does not hold all bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be >= {MIN_VOCAB_SIZE} (256 bytes and 2 special tokens), got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


class DocumentEncoder:
    """Turns texts into token ids that end with the end-of-sequence token, which occurs nowhere else.

    Args:
        tokenizer: a fast tokenizer with an end-of-sequence token.

    Attributes:
        eos_token_id: the end of each document.
        dtype: the smallest of uint16 and uint32 that holds every id.
        fingerprint: changes whenever the ids could.
        make_example: turns a block of what `encode` gave into a training example; picklable.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # A copy, because text that spells a special token must stay text here and only here.
        self._backend: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_token_id: int = tokenizer.eos_token_id
        largest = max(self._backend.get_vocab(with_added_tokens=True).values())
        self.dtype = np.dtype(np.uint16 if largest < 2**16 else np.uint32)
        self.fingerprint = stable_hash([self._backend.to_str(), self.eos_token_id])
        self.make_example: Callable[[np.ndarray], dict[str, np.ndarray]]
        self.make_example = partial(packed_example, eos_token_id=self.eos_token_id)

    def encode_documents(self, documents: list[Document]) -> list[np.ndarray]:
        """Encode documents in parallel, each into an array of `dtype`."""
        return self.encode([document.text for document in documents])

    def num_learned(self, tokens: np.ndarray) -> int | None:
        """How many of the tokens that `encode_documents` gave are to be predicted; None: all."""
        return None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Encode texts in parallel, each into an array of `dtype` that ends with `eos_token_id`."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._terminated(np.array(encoding.ids, dtype=self.dtype)) for encoding in encodings]

    def _terminated(self, ids: np.ndarray) -> np.ndarray:
        return np.append(ids[ids != self.eos_token_id], self.dtype.type(self.eos_token_id))


def _checked_name(name: str) -> str:
    """Expand `~` and refuse paths that lead nowhere, which the hub would call malformed names."""
    path = Path(name).expanduser()
    # One separator is also what hub names have: then a parent directory that exists tells a path.
    is_path = name.startswith((".", os.sep, "~")) or name.count(os.sep) > 1
    is_path = is_path or (os.sep in name and path.parent.is_dir())
    if is_path and not path.is_dir():
        raise FileNotFoundError(
            f"{name} is not a directory with a tokenizer and, being a path, not the name of one on the hub "
            f"(looked from {Path.cwd()})"
        )
    return str(path) if is_path else name


def _existing(name: str) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {name!r} has no fast version ({type(tokenizer).__name__}); choose one that has")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos_token, which separates documents; set one and save it")
    return tokenizer


def _weighted_sample(sources: Sequence[Source], sample_bytes: int) -> Iterator[str]:
    total = sum(source.config.weight for source in sources)
    for source in sources:
        share = max(1, int(sample_bytes * source.config.weight / total))
        for document in limit_bytes(source.documents("train"), share):
            yield document.text


def _publish(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save into a directory that appears complete or not at all, whatever other processes do meanwhile.

    Where the directory is there already, finished by another process or damaged, its files are replaced.
    """
    temporary = directory.with_name(f".{directory.name}-{uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        tokenizer.save_pretrained(temporary)
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
            # File by file and at once, because other processes may be reading or replacing them with the same.
            for file in temporary.iterdir():
                file.replace(directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
