"""Which blocks belong to which stage. Ranges count blocks from 0 and exclude their end, as in Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Range = tuple[int, int]


@dataclass(frozen=True)
class StageSpec:
    """A stage of a model cut into contiguous stages."""

    index: int
    """Place in the model, from 0."""
    num_stages: int
    """Stages of the whole model."""
    start: int
    """First block."""
    stop: int
    """The block after the last one."""
    input_width: int
    """Width of the hidden states that come in."""
    output_width: int
    """Width of the hidden states that go out."""

    @property
    def is_first(self) -> bool:
        """Whether the embeddings come right before it."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the final norm and the head come right after it."""
        return self.index == self.num_stages - 1

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.stop - self.start


def stage_specs(ranges: Sequence[Range], width: int) -> list[StageSpec]:
    """The stages of a model of one width."""
    return [StageSpec(i, len(ranges), start, stop, width, width) for i, (start, stop) in enumerate(ranges)]


def even_ranges(num_blocks: int, num_stages: int) -> list[Range]:
    """
    Stages whose numbers of blocks differ by one at most; the longer ones come first.

    Raises:
        ValueError: for fewer blocks than stages.
    """
    _check_count(num_blocks, num_stages)
    short, longer = divmod(num_blocks, num_stages)
    bounds = [i * short + min(i, longer) for i in range(num_stages + 1)]
    return list(pairwise(bounds))


def balanced_ranges(sizes: Sequence[int], num_stages: int) -> list[Range]:
    """
    Contiguous stages whose largest sum is as small as it can be.

    Args:
        sizes: of every block, such as its number of parameters.
        num_stages: how many stages.

    Raises:
        ValueError: for fewer blocks than stages.
    """
    num_blocks = len(sizes)
    _check_count(num_blocks, num_stages)
    # best[stop]: (largest sum, bounds) of blocks[:stop] in the stages so far.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for stage in range(1, num_stages + 1):
        best = {
            stop: min(
                (max(best[start][0], sum(sizes[start:stop])), [*best[start][1], stop])
                for start in best
                if start < stop
            )
            for stop in range(stage, num_blocks - (num_stages - stage) + 1)
        }
    return list(pairwise(best[num_blocks][1]))


def checked_ranges(ranges: Sequence[Range], num_blocks: int) -> list[Range]:
    """
    Explicit ranges, if they cover every block exactly once and in order.

    Raises:
        ValueError: names the range that does not fit.
    """
    expected = 0
    for index, (start, stop) in enumerate(ranges):
        if start != expected or stop <= start:
            raise ValueError(
                f"stage {index} is the range {start}..{stop} (end excluded) and must begin at block {expected} and "
                "hold at least one block: ranges follow each other without gaps"
            )
        expected = stop
    if expected != num_blocks:
        raise ValueError(
            f"the stages end at block {expected} of {num_blocks}: the last range must end at {num_blocks}"
        )
    return [(start, stop) for start, stop in ranges]


def _check_count(num_blocks: int, num_stages: int) -> None:
    if not 1 <= num_stages <= num_blocks:
        raise ValueError(f"num_stages={num_stages} must be between 1 and the number of blocks, {num_blocks}")
