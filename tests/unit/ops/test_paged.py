"""Attention to a paged cache against attention to the same keys in one piece."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from modmoe.ops import reference, stickbreaking_triton
from modmoe.ops.paged import stickbreaking_paged_attention
from tests.unit.ops.triton_worker import Worker

# (lengths, query heads, key/value heads, new tokens, head dim, page size)
SHAPES = [
    ([1], 1, 1, 1, 4, 4),
    ([5, 12, 3], 4, 2, 3, 8, 4),
    ([17, 1, 30], 6, 2, 1, 16, 5),
    ([40, 64], 3, 1, 20, 16, 8),
]


def make(
    lengths: list[int], heads: int, kv_heads: int, num_queries: int, dim: int, page_size: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """A cache in shuffled pages, NaN wherever no key was written, and each sequence's keys and values in one piece."""
    torch.manual_seed(0)
    max_pages = math.ceil(max(lengths) / page_size) + 1
    num_pages = len(lengths) * max_pages
    k_pages, v_pages = (torch.full((num_pages, page_size, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    table = torch.randperm(num_pages).view(len(lengths), max_pages)
    sequences = []
    for row, length in zip(table, lengths, strict=True):
        k, v = (torch.randn(length, kv_heads, dim).to(dtype) for _ in range(2))
        for j in range(length):
            page, slot = row[j // page_size], j % page_size
            k_pages[page, slot], v_pages[page, slot] = k[j], v[j]
        row[math.ceil(length / page_size) :] = -1  # entries that are not used may hold anything
        sequences.append((k, v))
    q = torch.randn(len(lengths), heads, num_queries, dim).to(dtype)
    return [q, k_pages, v_pages, table, torch.tensor(lengths)], sequences


def expected(
    q: Tensor, sequences: list[tuple[Tensor, Tensor]], attend_current: bool, scale: float
) -> tuple[Tensor, Tensor]:
    results = [
        reference.stickbreaking_attention(
            row[None].double(), *(x.transpose(0, 1)[None].double() for x in kv), scale, attend_current, None, None
        )
        for row, kv in zip(q, sequences, strict=True)
    ]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


def check(backend: str, shape: tuple[Any, ...], dtype: torch.dtype, attend_current: bool) -> None:
    inputs, sequences = make(*shape, dtype)
    out, remainder = stickbreaking_paged_attention(*inputs, scale=0.4, attend_current=attend_current, backend=backend)
    assert out.dtype == dtype
    truth, rest = expected(inputs[0], sequences, attend_current, 0.4)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(remainder.double(), rest, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch(shape: tuple[Any, ...], attend_current: bool) -> None:
    check("torch", shape, torch.float64, attend_current)


@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(interpreter: Worker, shape: tuple[Any, ...], attend_current: bool) -> None:
    interpreter(check, "triton", shape, torch.float32, attend_current)


def check_splits() -> None:
    """Long enough for two launches, and lengths so different that some splits have no keys."""
    with mock.patch.object(stickbreaking_triton, "_multiprocessors", return_value=2):
        q = torch.empty(3, 1, 1, 1)
        assert len(stickbreaking_triton._split_keys(q, 3, math.ceil(23 * 16 / 32), True)) == 2
        check("triton", ([350, 20, 1], 2, 1, 1, 16, 16), torch.float32, True)
        check("triton", ([350, 20, 1], 2, 1, 1, 16, 16), torch.float16, False)


def test_split_keys(interpreter: Worker) -> None:
    interpreter(check_splits)


def test_auto_runs_everywhere() -> None:
    check("auto", SHAPES[1], torch.float32, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_well_behaved_op(dtype: torch.dtype) -> None:
    inputs, _ = make(*SHAPES[1], dtype)
    torch.library.opcheck(
        torch.ops.modmoe.stickbreaking_paged_attention, (*inputs, 0.5, True, True, "torch"), test_utils="test_schema"
    )
    torch.library.opcheck(
        torch.ops.modmoe.stickbreaking_paged_attention,
        (*inputs, 0.5, True, True, "torch"),
        test_utils="test_faketensor",
    )


def test_compiled_equals_eager() -> None:
    inputs, _ = make(*SHAPES[1], torch.float32)
    compiled = torch.compile(stickbreaking_paged_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs), stickbreaking_paged_attention(*inputs), strict=True):
        assert torch.equal(a, b)


def fails(error: type[Exception], match: str, inputs: list[Tensor], **options: Any) -> None:
    with pytest.raises(error, match=match):
        stickbreaking_paged_attention(*inputs, **options)


def test_errors_name_the_value() -> None:
    inputs, _ = make(*SHAPES[1], torch.float32)
    q, k_pages, v_pages, table, lengths = inputs
    fails(ValueError, r"got \(3, 4, 3, 4\), \(12, 4, 2, 8\)", [q[..., :4], *inputs[1:]])
    fails(ValueError, "got 3 query heads and pages", [q[:, :3], *inputs[1:]])
    fails(ValueError, r"lengths \(3,\), got \(3, 4\) and \(2,\)", [*inputs[:4], lengths[:2]])
    fails(ValueError, "a head dim, .* 4 query heads", [*(x[..., :0] for x in inputs[:3]), table, lengths])
    fails(TypeError, "torch.float64, torch.float32, torch.float32", [q.double(), *inputs[1:]])
    fails(TypeError, "got torch.float8_e5m2, ", [*(x.to(torch.float8_e5m2) for x in inputs[:3]), table, lengths])
    fails(TypeError, "lengths must be int32 or int64, got torch.float32", [*inputs[:4], lengths.float()])
    fails(
        ValueError,
        r"between the 3 queries and the 16 keys there is room for, got \[5, 12, 2\]",
        [*inputs[:4], lengths - (lengths == 3).long()],
    )
    fails(ValueError, r"got \[5, 12, 17\]", [*inputs[:4], torch.tensor([5, 12, 17])])
    wrong = table.clone()
    wrong[1, 0] = 12
    fails(ValueError, "there are 12 pages, block_table names .*12", [q, k_pages, v_pages, wrong, lengths])
    wrong[1, 0] = -1
    fails(ValueError, r"there are 12 pages, block_table names \[-1", [q, k_pages, v_pages, wrong, lengths])
    fails(RuntimeError, "call it under torch.no_grad", [q.clone().requires_grad_(), *inputs[1:]])
    fails(RuntimeError, "one device, got", [q.to("meta"), *inputs[1:]])
    fails(ValueError, "has no backend 'cuda'", inputs, backend="cuda")


def test_no_sequences() -> None:
    q, pages, table = torch.empty(0, 4, 1, 8), torch.empty(2, 16, 2, 8), torch.empty(0, 0, dtype=torch.int64)
    out, remainder = stickbreaking_paged_attention(q, pages, pages, table, torch.empty(0, dtype=torch.int64))
    assert (out.shape, remainder.shape) == ((0, 4, 1, 8), (0, 4, 1))
