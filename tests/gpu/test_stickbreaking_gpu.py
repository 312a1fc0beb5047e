"""The Triton kernels on a device: what the interpreter cannot say, which is bf16, real products, races and memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.ops import stickbreaking_attention, stickbreaking_triton
from modmoe.ops.paged import stickbreaking_paged_attention
from tests.unit.ops.test_stickbreaking_triton import (
    MASKS,
    NAMES,
    Attention,
    attend,
    check_golden,
    check_lengths,
    check_small_sigmoids,
    expected_results,
    make,
    results,
)

pytestmark = pytest.mark.gpu

# Relative L2 error against float64 from the same rounded inputs; the remainder is compared absolutely.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# (batch, query heads, key/value heads, queries, keys, head dim)
SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 3, 1, 129, 300, 24),
    (2, 4, 2, 700, 700, 64),
    (1, 4, 4, 515, 515, 128),
    (1, 2, 1, 200, 260, 256),
    (2, 6, 2, 1, 5000, 64),
    (1, 2, 2, 16, 3000, 80),
]


@pytest.fixture(autouse=True)
def on_device() -> Any:
    with torch.device("cuda"):
        yield


def close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert a.isfinite().all(), name
        difference = a.double() - b
        error = difference.abs().max() if name == "remainder" else difference.norm() / b.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: error {error:.1e}"


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape: tuple[int, ...], dtype: torch.dtype, attend_current: bool, masks: str) -> None:
    leaves, limits = make(shape, dtype, masks)
    expected = expected_results(leaves, limits, attend_current)
    for early_stop in (True, False):
        actual = results(*attend(leaves, limits, attend_current, early_stop), leaves)
        close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["strict", "current"])
@pytest.mark.parametrize("name", ["dense_small", "dense_t128", "dense_t1", "varlen", "extreme_x50"])
def test_recorded_numbers(name: str, form: str) -> None:
    check_golden(name, form, "cuda")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_small_sigmoids_add_up(dtype: torch.dtype) -> None:
    check_small_sigmoids(dtype, 1e-3)  # two bf16 parts of a log are right to 2 ** -17


def test_the_door() -> None:
    leaves, limits = make((1, 4, 2, 300, 300, 64), torch.bfloat16)
    out, remainder = stickbreaking_attention(*leaves, backend="triton")
    close(results(out, remainder, leaves), expected_results(leaves, limits), TOLERANCE[torch.bfloat16])
    compiled = torch.compile(stickbreaking_attention, fullgraph=True)
    assert torch.equal(compiled(*leaves, backend="triton")[0], out)


@pytest.mark.parametrize("num_queries", [1500, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_bitwise_rerun(dtype: torch.dtype, num_queries: int) -> None:
    leaves, limits = make((2, 4, 2, num_queries, 1500, 64), dtype, "both")
    runs = [results(*attend(leaves, limits), leaves) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("num_queries", [500, 1])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_early_stop_leaves_old_keys_alone(dtype: torch.dtype, num_queries: int) -> None:
    """Keys that nobody reads may hold anything."""
    leaves, limits = make((1, 2, 1, num_queries, 60000, 32), dtype, size=3.0)
    with torch.no_grad():
        for x in leaves[1:]:
            x[:, :, :1000] = torch.nan
    for tensor in results(*attend(leaves, limits), leaves):
        assert tensor.isfinite().all()
    assert attend(leaves, limits, early_stop=False)[0].isnan().all()


def peak_bytes(length: int) -> int:
    q, k, v = (torch.randn(1, heads, length, 64, dtype=torch.bfloat16) for heads in (16, 8, 8))
    options = (None, None, 0.125, True, True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, remainder = stickbreaking_triton.forward(q, k, v, *options)
    stickbreaking_triton.backward(out, remainder, q, k, v, *options)
    return torch.cuda.max_memory_allocated() - before


def test_memory_grows_linearly() -> None:
    assert peak_bytes(32768) <= 4.2 * peak_bytes(8192)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_paged_equals_contiguous(dtype: torch.dtype) -> None:
    lengths = [3000, 17, 1, 1025]
    q = torch.randn(4, 6, 1, 64).to(dtype)
    pages = [torch.randn(4 * 188, 16, 2, 64).to(dtype) for _ in range(2)]
    table = torch.randperm(4 * 188).view(4, 188)
    out, remainder = stickbreaking_paged_attention(q, *pages, table, torch.tensor(lengths), backend="triton")
    for b, length in enumerate(lengths):
        k, v = (x[table[b]].flatten(0, 1)[:length].transpose(0, 1)[None] for x in pages)
        expected = Attention.apply(q[b : b + 1], k, v, None, None, 0.125, True, True)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out[b : b + 1], expected[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(remainder[b : b + 1], expected[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_queries", [1, 3, 40])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_sequences_of_different_lengths(dtype: torch.dtype, num_queries: int) -> None:
    check_lengths(dtype, num_queries, True, "both", TOLERANCE[dtype])
