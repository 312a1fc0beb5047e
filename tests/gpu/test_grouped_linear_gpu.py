"""The CUDA kernels of the grouped linear map on a device: the checks that the emulator also runs, and larger sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modmoe.ops import BACKENDS, grouped_linear, grouped_linear_sm90
from modmoe.ops.grouped_linear import LAYOUTS
from tests.kernels.checks import DTYPES, EDGES, check_all_masked, check_grouped_linear, check_misaligned, make_plan

from .cuda_kernels import require_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def kernels() -> None:
    require_kernels()


@pytest.mark.parametrize("size", [(41, 2, 4), (75, 2, 2), (3000, 4, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(24, 72), (37, 13), (264, 136)], ids=str)
def test_against_float64(widths: tuple[int, int], dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    check_grouped_linear(size, widths, dtype, device="cuda")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, source: str, target: str, gated: bool) -> None:
    if target == "token" and not gated:
        pytest.skip("a sum over slots needs gates")
    check_grouped_linear((300, 3, 5), (48, 88), dtype, source, target, gated, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", EDGES.values(), ids=EDGES)
def test_edges(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_grouped_linear(size, (8, 16), dtype, masked=0.0, device="cuda")


@pytest.mark.parametrize("target", LAYOUTS)
def test_all_tokens_masked(target: str) -> None:
    check_all_masked(target, device="cuda")


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_misaligned_and_non_contiguous(backend: str) -> None:
    check_misaligned("cuda", backend)


def test_in_a_graph() -> None:
    """Replayed with other rows and another plan."""
    torch.manual_seed(0)
    plans = [make_plan(200, 2, 6, device="cuda") for _ in range(2)]
    rows, weight = torch.randn(2, 200, 48, device="cuda"), torch.randn(6, 80, 48, device="cuda")
    gates = torch.rand(200, 2, device="cuda")
    x, plan = rows[0].clone(), type(plans[0])(*(t.clone() for t in plans[0]))

    def run() -> torch.Tensor:
        return grouped_linear(x, weight, plan, top_k=2, gates=gates, backend="cuda")

    run()  # built and loaded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run()
    for other, other_plan in zip(rows, plans, strict=True):
        x.copy_(other)
        for old, new in zip(plan, other_plan, strict=True):
            old.copy_(new)
        graph.replay()
        torch.testing.assert_close(actual, run())


@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_same_bits_every_time(backend: str) -> None:
    torch.manual_seed(0)
    plan = make_plan(2000, 4, 16, device="cuda")
    tensors = (torch.randn(2000, 256), torch.randn(16, 384, 256), torch.rand(2000, 4))
    results = []
    for _ in range(5):
        x, weight, gates = (t.to("cuda", torch.bfloat16).requires_grad_() for t in tensors)
        y = grouped_linear(x, weight, plan, top_k=4, gates=gates, backend=backend)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, weight, gates))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", [(75, 2, 2), (3000, 4, 16), *EDGES.values()], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [(24, 72), (264, 136)], ids=str)
def test_hopper_products(widths: tuple[int, int], dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    """Empty experts, experts with one row, and rows of nobody included."""
    if "cuda_sm90" not in BACKENDS:
        pytest.skip("backend 'cuda_sm90' is not offered")
    weight = torch.empty(1, widths[1], widths[0], dtype=dtype, device="cuda")
    if problem := grouped_linear_sm90.problem(weight[0], weight):
        pytest.skip(problem)
    check_grouped_linear(size, widths, dtype, device="cuda", backend="cuda_sm90")


@pytest.mark.slow
def test_intermediate_code_of_compute_80() -> None:
    """A library for 8.0 alone runs on a newer card by its PTX, which the driver compiles: the way of future cards.

    CUDA_FORCE_PTX_JIT would do the same to PyTorch's kernels, which bring no PTX for most cards.
    """
    if torch.cuda.get_device_capability()[0] == 8:
        pytest.skip("this card runs the machine code of 8.0")
    if os.environ.get("MODMOE_CUDA_ARCHS") == "80":
        pytest.skip("this is the run it starts")
    folder = Path(__file__).parent
    files = [str(folder / name) for name in ("test_routing_gpu.py", "test_grouped_linear_gpu.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", *files],
        env={**os.environ, "MODMOE_CUDA_ARCHS": "80"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
