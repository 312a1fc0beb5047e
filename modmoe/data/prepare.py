"""From a list of sources to the datasets of a pretraining run."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from .config import SourceConfig, TokenizerConfig
from .dataset import PackedDataset, PackedStream
from .documents import Split
from .marked import MarkedEncoder
from .mixture import MixtureDataset, StreamingMixture
from .sources import Source, stable_hash
from .statistics import DomainStatistics, SplitStatistics, byte_unigram_entropy, gzip_bits_per_byte
from .store import STORE_FORMAT, TokenStore, build_store
from .tokenizer import DocumentEncoder, existing_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """What a trainer needs of the data.

    Attributes:
        tokenizer: to be saved with the model.
        train: `num_train_blocks` examples, a `MixtureDataset`, or a `StreamingMixture` if any source streams.
        validation: the validation blocks of each domain that has some.
        statistics: sizes and yardsticks of each domain.
    """

    tokenizer: PreTrainedTokenizerFast
    train: MixtureDataset | StreamingMixture
    validation: dict[str, PackedDataset]
    statistics: dict[str, DomainStatistics]


def prepare_data(
    sources: Sequence[SourceConfig],
    tokenizer: TokenizerConfig,
    sequence_length: int,
    cache_dir: Path,
    seed: int,
    num_train_blocks: int,
) -> PreparedData:
    """Read, tokenise and pack text, from the cache where it is there already.

    All processes of a run must share `cache_dir` (or be given an existing tokenizer), because the embedded
    domains and so a tokenizer trained on them differ between machines. Processes may call this at the same
    time; to do the work once, let one go first.

    Args:
        sources: the domains, with distinct names.
        tokenizer: an existing tokenizer, or the size of one to train.
        sequence_length: tokens per block, at least 2.
        cache_dir: tokenizers and token shards are kept below it.
        seed: of the training order.
        num_train_blocks: length of the training set, usually optimizer steps times blocks per step.

    Returns:
        Tokenizer, datasets and statistics.

    Raises:
        ValueError: if a setting, a document or the amount of text does not fit; the message says how.
        FileNotFoundError: if a source's file does not exist.
        OSError: if the disk is full; what is finished is kept.
    """
    _check_arguments(sources, sequence_length, seed, num_train_blocks)
    cache_dir = Path(cache_dir)
    existing = None if tokenizer.name is None else existing_tokenizer(tokenizer.name)
    opened = {config.name: Source(config, existing) for config in sources}
    trained_on = [source for source in opened.values() if source.config.weight > 0]
    loaded_tokenizer = existing or load_tokenizer(tokenizer, trained_on, cache_dir / "tokenizers")
    encoders = {format_: _encoder(format_, loaded_tokenizer) for format_ in {config.format for config in sources}}

    train: dict[str, PackedDataset | PackedStream] = {}
    validation: dict[str, PackedDataset] = {}
    statistics: dict[str, DomainStatistics] = {}
    for name, source in opened.items():
        held_out = train_store = None
        encoder = encoders[source.config.format]
        if source.has_validation:
            held_out = _store(source, "validation", encoder, cache_dir)
            validation[name] = _blocks(held_out, name, "validation", sequence_length, encoder)
        if source.config.weight == 0:
            if not source.has_validation:
                raise ValueError(f"source {name!r}: weight is 0 and no text is held out: give it one of the two")
        elif source.config.streaming:
            train[name] = PackedStream(source, encoder, sequence_length)
        else:
            train_store = _store(source, "train", encoder, cache_dir)
            train[name] = _blocks(train_store, name, "train", sequence_length, encoder)
        statistics[name] = _statistics(source, train_store, held_out)
        _log_skipped(source)
    # Data workers forked from here on must not use the thread pool that the tokenizer has started.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    weights = {source.config.name: float(source.config.weight) for source in trained_on}
    return PreparedData(loaded_tokenizer, _mixture(train, weights, num_train_blocks, seed), validation, statistics)


def _encoder(format_: str, tokenizer: PreTrainedTokenizerFast) -> DocumentEncoder:
    if format_ == "text":
        return DocumentEncoder(tokenizer)
    return MarkedEncoder(tokenizer, reads_special_tokens=format_ == "chat")


def _check_arguments(sources: Sequence[SourceConfig], sequence_length: int, seed: int, num_train_blocks: int) -> None:
    names = [config.name for config in sources]
    if not names:
        raise ValueError("give at least one source of text, got none")
    if not any(config.weight for config in sources):
        raise ValueError(f"weight is 0 for all sources, {', '.join(names)}: give one to train on a weight above 0")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"source names must differ, got {repeated} more than once")
    if sequence_length < 2:
        raise ValueError(f"sequence_length must be >= 2, got {sequence_length}")
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    if num_train_blocks < 1:
        raise ValueError(f"num_train_blocks must be >= 1, got {num_train_blocks}")


def _store(source: Source, split: Split, encoder: DocumentEncoder, cache_dir: Path) -> TokenStore:
    name = source.config.name
    key = stable_hash([STORE_FORMAT, source.fingerprint, encoder.fingerprint])
    directory = cache_dir / "tokens" / f"{name}-{split}-{key}"
    return build_store(directory, lambda: source.documents(split), encoder, description=f"tokenising {name} {split}")


def _blocks(
    store: TokenStore, name: str, split: Split, sequence_length: int, encoder: DocumentEncoder
) -> PackedDataset:
    if store.num_tokens < sequence_length:
        remedy = ", raise validation_fraction or set it to 0" if split == "validation" else ""
        raise ValueError(
            f"source {name!r}: {split} text has {store.num_tokens} tokens, fewer than one block of "
            f"{sequence_length}; add text, lower sequence_length{remedy}"
        )
    return PackedDataset(store, sequence_length, encoder.make_example)


def _statistics(source: Source, train: TokenStore | None, validation: TokenStore | None) -> DomainStatistics:
    measures: dict[str, float] = {}
    if validation is not None:
        if not validation.text_measures:
            text = "".join(document.learned_text for document in source.documents("validation")).encode()
            validation.text_measures = {
                "byte_unigram_entropy": byte_unigram_entropy(text),
                "gzip_bits_per_byte": gzip_bits_per_byte(text),
            }
            validation.save_manifest()
        measures = validation.text_measures
    return DomainStatistics(
        train=None if train is None else _size(train),
        validation=None if validation is None else _size(validation),
        byte_unigram_entropy=measures.get("byte_unigram_entropy"),
        gzip_bits_per_byte=measures.get("gzip_bits_per_byte"),
    )


def _size(store: TokenStore) -> SplitStatistics:
    return SplitStatistics(store.num_documents, store.num_text_bytes, store.num_tokens, store.num_learned_tokens)


def _log_skipped(source: Source) -> None:
    skipped = sorted(source.reader.skipped)
    if skipped:
        listed = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        logger.warning(
            "source %r: skipped %d that are not readable UTF-8 text: %s", source.config.name, len(skipped), listed
        )


def _mixture(
    domains: dict[str, PackedDataset | PackedStream], weights: dict[str, float], num_blocks: int, seed: int
) -> MixtureDataset | StreamingMixture:
    stored = {name: domain for name, domain in domains.items() if isinstance(domain, PackedDataset)}
    if len(stored) < len(domains):
        return StreamingMixture(domains, weights, num_blocks, seed)
    mixture = MixtureDataset(stored, weights, num_blocks, seed)
    for name, epochs in mixture.epochs.items():
        logger.info("source %r: %.2f epochs of %d blocks", name, epochs, len(stored[name]))
    return mixture
