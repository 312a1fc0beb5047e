"""Texts to measure a model on, as a command line names them, in batches.

Letters: B batch, T tokens of a sequence.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modmoe.data import EMBEDDED_DOMAINS, SourceConfig, TokenizerConfig, collate_packed
from modmoe.data.packing import pack_documents, packed_example
from modmoe.data.sources import Source
from modmoe.data.tokenizer import DocumentEncoder, load_tokenizer


def parse_domains(arguments: Sequence[str], text_field: str = "text") -> dict[str, Source]:
    """
    Open the domains of a command line, in its order.

    Args:
        arguments: NAME=PLACE each, where PLACE is embedded:DOMAIN, dataset:NAME or dataset:NAME:CONFIG (on the hub or
            a local directory), or a file, directory or pattern.
        text_field: column that holds the text in datasets, jsonl and parquet files.

    Raises:
        ValueError: a form that is not understood, or a name given twice.
        FileNotFoundError: no such file.
    """
    sources: dict[str, Source] = {}
    for argument in arguments:
        name, equals, place = argument.partition("=")
        if not equals or not name or not place:
            raise ValueError(
                f"{argument!r} is not NAME=PLACE: write for example python=embedded:python, mine=notes.jsonl or "
                "web=dataset:HuggingFaceFW/fineweb-edu"
            )
        if name in sources:
            raise ValueError(f"two domains are called {name!r}: give each its own name")
        sources[name] = Source(_source_config(name, place, text_field))
    return sources


def _source_config(name: str, place: str, text_field: str) -> SourceConfig:
    kind, colon, rest = place.partition(":")
    if colon and kind == "embedded":
        # Of these, the side of the split that models train on: their validation text stays unseen.
        return SourceConfig(name, embedded=rest)
    if colon and kind == "dataset":
        dataset, _, config = rest.partition(":")
        return SourceConfig(
            name,
            dataset=dataset,
            config=config or None,
            streaming=True,
            validation_fraction=0.0,
            text_field=text_field,
        )
    if place in EMBEDDED_DOMAINS and not Path(place).exists():
        raise FileNotFoundError(f"no file at {place!r}; the embedded text is written {name}=embedded:{place}")
    return SourceConfig(name, files=[place], validation_fraction=0.0, text_field=text_field)


def load_saved_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """
    The tokenizer that was saved with a model.

    Raises:
        ValueError: none there, a slow one, or one without an end-of-sequence token.
    """
    try:
        return load_tokenizer(TokenizerConfig(name=str(directory.absolute())), [], Path())
    except Exception as error:  # whatever the parsers of tokenizers and transformers stumble over
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise ValueError(
            f"{directory} holds no tokenizer that can be used ({reason}): save the model's there"
        ) from error


def text_batches(
    source: Source,
    encoder: DocumentEncoder,
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int,
    with_positions: bool,
) -> Iterator[dict[str, Tensor]]:
    """
    Batches of packed documents, read as they are needed.

    Args:
        source: the documents.
        encoder: the tokenizer.
        sequence_length: T, tokens of a block.
        batch_size: B, blocks of a batch; the last one may have fewer.
        max_tokens: blocks beyond this many tokens are left out, the first one excepted.
        with_positions: whether `position_ids` tell where documents begin.

    Yields:
        `input_ids` (B, T) int64, and `position_ids` likewise if wanted.

    Raises:
        ValueError: less text than one block, a broken line or a missing text field.
    """
    documents = (tokens for document in source.documents("train") for tokens in encoder.encode([document.text]))
    blocks = itertools.islice(pack_documents(documents, sequence_length), max(1, max_tokens // sequence_length))
    wanted = ("input_ids", "position_ids") if with_positions else ("input_ids",)
    empty = True
    while chunk := list(itertools.islice(blocks, batch_size)):
        empty = False
        batch = collate_packed([packed_example(block, encoder.eos_token_id) for block in chunk])
        yield {name: torch.as_tensor(batch[name]) for name in wanted}
    if empty:
        raise ValueError(
            f"domain {source.config.name!r} has fewer tokens than one sequence of {sequence_length}: give it more "
            "text or a shorter sequence length"
        )
