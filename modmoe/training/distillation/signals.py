"""Teacher signals from the disk: written once for each block of text, and handed out with the training examples."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from modmoe.data import MixtureDataset, collate_packed
from modmoe.distill.cache import SignalCache
from modmoe.distill.frame import Batch
from modmoe.distill.pair import StagePair
from modmoe.distill.signals import TeacherSignals, top_k
from modmoe.training.checkpoints.checkpoint import writing
from modmoe.training.errors import ConfigError, RunError
from modmoe.training.run_config import RunConfig

logger = logging.getLogger(__name__)

_PREFIX = "signals/"
_DIGESTED = 64


def split_signals(inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch without the signals in it, and the signals."""
    signals = {name.removeprefix(_PREFIX): t for name, t in inputs.items() if name.startswith(_PREFIX)}
    return {name: t for name, t in inputs.items() if not name.startswith(_PREFIX)}, signals


class CachedSignals:
    """
    The cache of one pair.

    Args:
        directory: of the cache.
        pair: with its teacher, which is asked for what is not there yet.
        identity: of what the teacher's signals follow from, but for the text, top k and temperature.
        top_k: tokens whose logits are kept, unless the pair is local.
        max_bytes: size that the cache may grow to.
    """

    def __init__(
        self, directory: Path, pair: StagePair, identity: Mapping[str, Any], top_k: int, max_bytes: int
    ) -> None:
        self._directory = directory
        self._pair = pair
        self._top_k = 0 if pair.is_local else top_k
        self._identity = dict(identity) | {"top_k": self._top_k, "temperature": pair.objective.temperature}
        self._identity |= {"boundaries": self._boundaries}
        self._max_bytes = max_bytes

    def attach(self, data: Any, run: RunConfig, world_size: int) -> "WithSignals":
        """
        Write what is missing, put the signals beside the text, and let the teacher go.

        Args:
            data: the training text.
            run: as which the pair is trained; the teacher reads as many blocks at a time.
            world_size: processes of this run.

        Raises:
            ConfigError: for text that is streamed, a cache of something else that may not be overwritten, or one that
                would be too large.
            RunError: if it is incomplete and several processes would write it.
        """
        if not isinstance(data, MixtureDataset):
            raise ConfigError("distillation.pairs.signals.cache needs text that is stored: remove 'streaming'")
        # The same block may come again, in a later epoch.
        first = {data.locate(i): i for i in reversed(range(len(data)))}
        blocks = sorted(first, key=lambda block: first[block])
        examples = [first[block] for block in blocks]
        size = run.optimization.micro_batch_size
        try:
            self._check_size(len(blocks), len(data[0]["input_ids"]))
            cache = self._open(self._identity | {"text": _digest(data, examples)}, run.overwrite_output)
            if len(cache) < len(blocks):
                if world_size > 1:
                    raise RunError(
                        f"the cache in {self._directory} holds {len(cache)} of {len(blocks)} blocks: let one process "
                        "write it first, or set distillation.pairs.signals.cache to false"
                    )
                logger.info("writing the teacher's signals of %d blocks to %s", len(blocks), self._directory)
                chunks = (examples[at : at + size] for at in range(len(cache), len(blocks), size))
                with writing(self._directory, run.output_dir):
                    cache.fill((collate_packed([data[i] for i in chunk]) for chunk in chunks), self._ask)
        except ValueError as error:
            raise ConfigError(f"distillation.pairs.signals: {error}") from None
        self._pair.forget_teacher()
        return WithSignals(data, cache, {block: row for row, block in enumerate(blocks)})

    def _open(self, identity: Mapping[str, Any], overwrite: bool) -> SignalCache:
        try:
            return SignalCache(self._directory, identity, self._max_bytes)
        except ValueError as error:
            if not overwrite:
                raise ValueError(f"{error}, or pass --overwrite_output true") from None
        shutil.rmtree(self._directory)
        return SignalCache(self._directory, identity, self._max_bytes)

    def _check_size(self, num_blocks: int, length: int) -> None:
        width = self._pair.spec.input_width
        logits = 8 * self._top_k + 4 if self._top_k else 0
        needed = num_blocks * length * (logits + 4 * width * len(self._boundaries))
        if needed > self._max_bytes:
            raise ValueError(
                f"{num_blocks} blocks of {length} tokens need {needed:,} bytes, and max_bytes={self._max_bytes:,}: "
                f"raise it, {'lower top_k, ' if self._top_k else ''}or ask the teacher online (cache: false)"
            )

    @property
    def _boundaries(self) -> list[int]:
        """What the pair's losses look at."""
        spec, objective = self._pair.spec, self._pair.objective
        behind = objective.relation_weight or (objective.hidden_weight and not spec.is_last)
        return ([] if spec.is_first else [spec.index]) + ([spec.index + 1] if behind else [])

    def _ask(self, batch: Batch) -> TeacherSignals:
        device = next(self._pair.parameters()).device
        given = self._pair.teacher_signals({name: tensor.to(device) for name, tensor in batch.items()})
        kept = {boundary: given.boundaries[boundary] for boundary in self._boundaries}
        if given.logits is None:
            return TeacherSignals(None, kept)
        assert isinstance(given.logits, torch.Tensor)
        return TeacherSignals(top_k(given.logits, self._top_k, self._pair.objective.temperature), kept)


class WithSignals(Dataset):
    """
    Training examples with the teacher's signals among their inputs.

    Args:
        data: the examples.
        cache: the signals.
        rows: (domain, block) -> number in the cache.
    """

    def __init__(self, data: MixtureDataset, cache: SignalCache, rows: Mapping[tuple[str, int], int]) -> None:
        self._data = data
        self._cache = cache
        self._rows = rows

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        signals = self._cache.read([self._rows[self._data.locate(index)]])
        tensors = {_PREFIX + name: tensor[0].numpy() for name, tensor in signals.tensors().items()}
        return dict(self._data[index]) | tensors

    def locate(self, index: int) -> tuple[str, int]:
        """As of `MixtureDataset`."""
        return self._data.locate(index)


def _digest(data: MixtureDataset, examples: list[int]) -> str:
    """Of which blocks there are, and of the tokens of some."""
    digest = hashlib.sha256(json.dumps([data.locate(i) for i in examples]).encode())
    for i in examples[:: max(1, len(examples) // _DIGESTED)]:
        digest.update(data[i]["input_ids"].tobytes())
    return digest.hexdigest()[:16]
