"""The CUDA kernels of the grouped linear map, run by the emulator."""

import pytest
import torch
from torch import Tensor

from modmoe.ops import DispatchPlan, grouped_linear
from modmoe.ops.grouped_linear import LAYOUTS

from .checks import DTYPES, EDGES, check_all_masked, check_grouped_linear, check_misaligned, make_plan
from .emulated import Emulator


@pytest.mark.parametrize("size", [(41, 2, 4), (75, 2, 2)], ids=["narrow tiles", "wide tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(24, 72), (37, 13)], ids=["vectors", "scalars"])
def test_against_float64(
    widths: tuple[int, int], dtype: torch.dtype, size: tuple[int, int, int], emulator: Emulator
) -> None:
    """Rows that are no multiple of a tile; an empty expert; masked tokens."""
    with emulator.running(schedule=2):
        check_grouped_linear(size, widths, dtype)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_layouts(source: str, target: str, gated: bool, emulator: Emulator) -> None:
    if target == "token" and not gated:
        pytest.skip("a sum over slots needs gates")
    with emulator.running():
        check_grouped_linear((7, 3, 5), (16, 24), torch.bfloat16, source, target, gated)


@pytest.mark.parametrize("size", EDGES.values(), ids=EDGES)
def test_edges(size: tuple[int, int, int], emulator: Emulator) -> None:
    with emulator.running(schedule=1):
        check_grouped_linear(size, (8, 16), torch.float16, masked=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(136, 264), (150, 131)], ids=["vectors", "scalars"])
def test_several_tiles_each_way(widths: tuple[int, int], dtype: torch.dtype, emulator: Emulator) -> None:
    with emulator.running(schedule=3):
        check_grouped_linear((301, 2, 3), widths, dtype)


@pytest.mark.parametrize("target", LAYOUTS)
def test_all_tokens_masked(target: str, emulator: Emulator) -> None:
    with emulator.running():
        check_all_masked(target)


def test_misaligned_and_non_contiguous(emulator: Emulator) -> None:
    with emulator.running():
        check_misaligned()


@pytest.mark.parametrize("wanted", ["x", "weight", "gates"])
def test_only_needed_gradients(wanted: str, emulator: Emulator) -> None:
    torch.manual_seed(0)
    plan = make_plan(9, 2, 3)
    leaves = {"x": torch.randn(9, 8), "weight": torch.randn(3, 16, 8), "gates": torch.rand(9, 2)}
    leaves[wanted].requires_grad_()
    grads = []
    for backend in ("cuda", "reference"):
        with emulator.running():
            y = grouped_linear(**leaves, plan=plan, top_k=2, backend=backend)
            grads += torch.autograd.grad(y.square().sum(), leaves[wanted])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("size", [(20, 2, 3), (70, 2, 2)], ids=["narrow tiles", "wide tiles"])
def test_same_bits_under_every_schedule(size: tuple[int, int, int], emulator: Emulator) -> None:
    torch.manual_seed(0)
    plan = make_plan(*size)
    x, weight, gates = torch.randn(size[0], 40), torch.randn(size[2], 20, 40), torch.rand(size[0], 2)
    results: list[tuple[Tensor, ...]] = []
    for schedule in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, weight, gates)]
        with emulator.running(schedule=schedule):
            y = grouped_linear(leaves[0], leaves[1], plan, top_k=2, gates=leaves[2], backend="cuda")
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "offsets", [[9, 4, 40], [-5, 3, 7], [2**31 - 1, 0, -1], [0, 0, 0]], ids=["down", "negative", "huge", "empty"]
)
def test_senseless_plans_stay_in_bounds(offsets: list[int], emulator: Emulator) -> None:
    """The emulator fails on any access outside of the tensors. Groups that overlap are written twice."""
    order = torch.tensor([5, -1, 2**40, 3, 0, 0, 99, 12, 1, 2, 3, 4])
    plan = DispatchPlan(order[:3], torch.tensor(offsets, dtype=torch.int32), order, order)
    x, weight, gates = torch.randn(6, 8), torch.randn(3, 16, 8, requires_grad=True), torch.rand(6, 2)
    with emulator.running(races_allowed=True):
        grouped_linear(x, weight, plan, top_k=2, gates=gates, backend="cuda").sum().backward()


def test_what_the_kernels_refuse(emulator: Emulator) -> None:
    """The raw ops check for themselves: Python may change."""
    plan = make_plan(6, 2, 3)

    def call(**changes: object) -> None:
        arguments = {
            "x": torch.randn(6, 8),
            "weight": torch.randn(3, 16, 8),
            "order": plan.order,
            "offsets": plan.offsets,
            "gates": torch.rand(6, 2),
            "top_k": 2,
            "source": "token",
            "target": "token",
        }
        torch.ops.modmoe_cuda.grouped_linear(**(arguments | changes))

    with emulator.running():
        call()
        with pytest.raises(RuntimeError, match="x must be Float, got Half"):
            call(x=torch.randn(6, 8).half())
        with pytest.raises(RuntimeError, match="x must have size 8 in dimension 1, got 4"):
            call(x=torch.randn(6, 4))
        with pytest.raises(RuntimeError, match="offsets must have size 3 in dimension 0, got 2"):
            call(offsets=plan.offsets[:2])
        with pytest.raises(RuntimeError, match="offsets must be Int, got Long"):
            call(offsets=plan.offsets.long())
        with pytest.raises(RuntimeError, match="gates must be Float, got Double"):
            call(gates=torch.rand(6, 2).double())
        with pytest.raises(RuntimeError, match="a layout is 'token', 'pair' or 'sorted', got 'expert'"):
            call(source="expert")
        with pytest.raises(RuntimeError, match="top_k must divide the 12 pairs of the plan, got 5"):
            call(top_k=5)
        with pytest.raises(RuntimeError, match="must be float32, float16 or bfloat16, got Double"):
            call(x=torch.randn(6, 8).double(), weight=torch.randn(3, 16, 8).double())
