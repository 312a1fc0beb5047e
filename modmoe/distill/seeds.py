"""Random numbers that depend on a run's seed and on a stage alone, so that the order of stages changes nothing."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def stage_seed(seed: int, purpose: str, stage: int) -> int:
    """A seed for one purpose in one stage, 0 to 2^63 - 1."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{stage}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def stage_random_state(seed: int, purpose: str, stage: int) -> Iterator[None]:
    """Seed PyTorch's random state for a stage inside the block, and restore the previous state after it."""
    with torch.random.fork_rng():
        torch.manual_seed(stage_seed(seed, purpose, stage))
        yield
