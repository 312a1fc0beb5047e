"""Each barrier of the kernels, deleted in turn: the emulator must notice."""

from collections.abc import Callable

import pytest
import torch

from modmoe.ops import dispatch_plan, grouped_linear, route

from .checks import make_plan
from .emulated import Emulator

SCHEDULES = range(4)


def survivors(emulator: Emulator, run: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Return all barriers that `run` meets, and those whose deletion no schedule shows."""
    with emulator.running():
        run()
    barriers = emulator.barriers

    def survives(barrier: str) -> bool:
        for schedule in SCHEDULES:
            with emulator.running(schedule=schedule, deleted_barrier=barrier):
                try:
                    run()
                except RuntimeError:
                    return False
        return True

    return barriers, [barrier for barrier in barriers if survives(barrier)]


def test_dispatch_plan(emulator: Emulator) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (700, 2))
    barriers, left = survivors(emulator, lambda: dispatch_plan(ids, 5, backend="cuda"))
    assert len(barriers) == 8
    assert not left


def test_gating_needs_no_barrier(emulator: Emulator) -> None:
    with emulator.running():
        route(torch.randn(5, 40), 3, backend="cuda")
    assert emulator.barriers == []


# A width of 200: the last step of so many is in the first stage, where the sums go next.
@pytest.mark.parametrize("size", [(30, 2, 3), (70, 2, 2)], ids=["narrow tiles", "wide tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grouped_linear(dtype: torch.dtype, size: tuple[int, int, int], emulator: Emulator) -> None:
    torch.manual_seed(0)
    plan = make_plan(*size)
    x, weight, gates = (
        torch.randn(size[0], 200).to(dtype),
        torch.randn(size[2], 72, 200).to(dtype),
        torch.rand(size[0], 2),
    )
    barriers, left = survivors(emulator, lambda: grouped_linear(x, weight, plan, top_k=2, gates=gates, backend="cuda"))
    assert len(barriers) == 6
    assert not left


def test_weight_gradient(emulator: Emulator) -> None:
    torch.manual_seed(0)
    plan = make_plan(100, 2, 2, masked=0.0)
    x, gates, dy = torch.randn(100, 24), torch.rand(100, 2), torch.randn(100, 16)
    arguments = (dy, x, torch.randn(2, 16, 24), plan.order, plan.offsets, gates, 2, "token", "token")
    barriers, left = survivors(
        emulator, lambda: torch.ops.modmoe_cuda.grouped_linear_backward(*arguments, False, True, False)
    )
    assert len(barriers) == 4
    assert not left
