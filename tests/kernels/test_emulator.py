"""The emulator finds what it is there to find, under every schedule."""

import ctypes
import re

import pytest
import torch
from torch import Tensor

from .emulated import Emulator

MISTAKES = {
    "divergent_barriers": "divergence",
    "early_return": "returned while others wait|deadlock",
    "deadlock": "deadlock|divergence",
    "race": "race: (read after a write|write after a read)|read before it is written",
    "race_in_a_warp": "race: (read after a write|write after a read)|read before it is written",
    "write_after_read": "race: (write after a read|read after a write)",
    "blocks_race": "race: write after a write",
    "uninitialised": "read before it is written",
    "out_of_bounds": "past the end|out of bounds",
    "copy_not_awaited": "asynchronous copy may still be writing",
}


def run(broken: Emulator, kernel: str, out: Tensor, **how: object) -> str:
    """Run a kernel of broken_kernels.cpp; return what the emulator says."""
    with broken.running(**how):
        getattr(broken.library, kernel)(ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(out.numel()))
    return broken.error


@pytest.mark.parametrize("schedule", range(6))
@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistakes_are_found(kernel: str, schedule: int, broken: Emulator) -> None:
    out = torch.zeros(128 if kernel == "write_after_read" else 64, dtype=torch.int32)
    assert re.search(MISTAKES[kernel], run(broken, kernel, out, schedule=schedule))


@pytest.mark.parametrize("schedule", range(6))
def test_a_correct_kernel_passes(schedule: int, broken: Emulator) -> None:
    out = torch.arange(64, dtype=torch.int32)
    assert run(broken, "correct", out, schedule=schedule) == ""
    assert out.tolist() == list(range(63, -1, -1))
    assert len(broken.barriers) == 2


@pytest.mark.parametrize("index", [0, 1])
def test_deleting_a_barrier_of_a_correct_kernel(index: int, broken: Emulator) -> None:
    out = torch.arange(64, dtype=torch.int32)
    assert run(broken, "correct", out) == ""
    assert run(broken, "correct", out, deleted_barrier=broken.barriers[index])
