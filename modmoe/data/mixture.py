"""Weighted mixtures of domains whose order follows from the index and the seed alone."""

import itertools
from collections.abc import Iterator, Mapping
from zlib import crc32

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .dataset import Example, PackedDataset, PackedStream

# Blocks over which every domain has its share exactly, up to rounding.
_WINDOW = 4096


class MixtureSchedule:
    """Which domain gives block i of a training run, and how many blocks it has given before.

    Both follow from the index, so a run resumes anywhere without other state. Every window of about 4096
    blocks holds each domain in proportion to its weight, at least once, in random order.

    Args:
        weights: positive share of each domain.
        seed: of the order.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.names = list(weights)
        self._seed = seed
        total = sum(weights.values())
        self._quotas = np.array([max(1, round(weight / total * _WINDOW)) for weight in weights.values()])
        self._sorted_window = np.repeat(np.arange(len(self._quotas)), self._quotas)
        self._shuffled: tuple[int, np.ndarray] = (-1, self._sorted_window)

    def locate(self, index: int) -> tuple[str, int]:
        """Return the domain of block `index` and how many blocks it has given before."""
        window, position = divmod(index, len(self._sorted_window))
        domains = self._window(window)
        domain = domains[position]
        draw = window * self._quotas[domain] + np.count_nonzero(domains[:position] == domain)
        return self.names[domain], int(draw)

    def counts(self, num_blocks: int) -> dict[str, int]:
        """Return how many of the first `num_blocks` blocks each domain gives."""
        window, position = divmod(num_blocks, len(self._sorted_window))
        rest = np.bincount(self._window(window)[:position], minlength=len(self.names))
        return dict(zip(self.names, (window * self._quotas + rest).tolist(), strict=True))

    def _window(self, window: int) -> np.ndarray:
        if self._shuffled[0] != window:
            generator = np.random.default_rng([self._seed, window])
            self._shuffled = window, generator.permutation(self._sorted_window)
        return self._shuffled[1]


class EpochShuffle:
    """A new random order of a domain's blocks for each epoch.

    Args:
        name: of the domain.
        num_blocks: in the domain.
        seed: of the order.
    """

    def __init__(self, name: str, num_blocks: int, seed: int) -> None:
        self._num_blocks = num_blocks
        self._key = [seed, crc32(name.encode())]
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    def block(self, draw: int) -> int:
        """Return the block of the domain's draw number `draw`, counted from 0 over all epochs."""
        epoch, position = divmod(draw, self._num_blocks)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([*self._key, epoch]).permutation(self._num_blocks)
        return int(self._order[1][position])


class MixtureDataset(Dataset[Example]):
    """The blocks of a training run, drawn from several domains by weight.

    A domain is gone through in a new random order each epoch, as often as its weight asks for. Example i
    depends on i and the arguments only, and the order is random already: read it in sequence.

    Args:
        domains: the blocks of each domain.
        weights: positive share of each domain.
        num_blocks: length of the dataset.
        seed: of the order.

    Attributes:
        fields: domain -> what its examples hold besides; nothing unless it is set.
    """

    fields: Mapping[str, Example] = {}

    def __init__(
        self, domains: Mapping[str, PackedDataset], weights: Mapping[str, float], num_blocks: int, seed: int
    ) -> None:
        self._domains = dict(domains)
        self._schedule = MixtureSchedule(weights, seed)
        self._shuffles = {name: EpochShuffle(name, len(domain), seed) for name, domain in domains.items()}
        self._num_blocks = num_blocks

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, index: int) -> Example:
        """Return example `index` as `packed_example` makes it, with the `fields` of its domain."""
        name, block = self.locate(index)
        return self._domains[name][block] | self.fields.get(name, {})

    def locate(self, index: int) -> tuple[str, int]:
        """Return the domain of example `index` and the block within the domain."""
        if not 0 <= index < self._num_blocks:
            raise IndexError(f"example {index} of {self._num_blocks}")
        name, draw = self._schedule.locate(index)
        return name, self._shuffles[name].block(draw)

    @property
    def epochs(self) -> dict[str, float]:
        """How often each domain is gone through."""
        counts = self._schedule.counts(self._num_blocks)
        return {name: counts[name] / len(domain) for name, domain in self._domains.items()}


class StreamingMixture(IterableDataset[Example]):
    """Like `MixtureDataset`, where at least one domain is tokenised on the fly.

    Domain order and content are the same in every run. Its position is not saved: a resuming trainer reads the
    examples it has already seen again and drops them, which costs their tokenisation. Streams keep the order of their
    source. With several data workers each reads everything and gives every n-th batch.

    Args:
        domains: blocks of each domain, stored or streamed.
        weights: positive share of each domain.
        num_blocks: examples in all.
        seed: of the order.

    Attributes:
        fields: as of `MixtureDataset`.
        batch_size: of the `DataLoader`, which takes a batch of each worker in turn; examples come in the same order
            with any number of them.
    """

    fields: Mapping[str, Example] = {}
    batch_size = 1

    def __init__(
        self,
        domains: Mapping[str, PackedDataset | PackedStream],
        weights: Mapping[str, float],
        num_blocks: int,
        seed: int,
    ) -> None:
        self._domains = dict(domains)
        self._schedule = MixtureSchedule(weights, seed)
        self._num_blocks = num_blocks
        self._seed = seed

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        if worker is None:
            return self._examples()
        turns = (index // self.batch_size % worker.num_workers for index in itertools.count())
        return (example for turn, example in zip(turns, self._examples(), strict=False) if turn == worker.id)

    def _examples(self) -> Iterator[Example]:
        sequences = {name: self._endless(name) for name in self._domains}
        for index in range(self._num_blocks):
            name = self._schedule.locate(index)[0]
            yield next(sequences[name]) | self.fields.get(name, {})

    def _endless(self, name: str) -> Iterator[Example]:
        domain = self._domains[name]
        if isinstance(domain, PackedStream):
            yield from domain
        else:
            shuffle = EpochShuffle(name, len(domain), self._seed)
            for draw in itertools.count():
                yield domain[shuffle.block(draw)]
