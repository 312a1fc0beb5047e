"""Stick-breaking attention against a loop over queries and keys, and what it promises about memory and masks."""

import itertools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modmoe.ops import stickbreaking_attention, stickbreaking_cpp, stickbreaking_torch, use_backend
from modmoe.ops.build import cpu_problem

# (batch, query heads, key/value heads, queries, keys, head dim)
SHAPES = [(1, 1, 1, 1, 1, 3), (2, 3, 3, 7, 7, 5), (2, 4, 2, 5, 9, 4), (1, 6, 2, 1, 6, 3)]
NAMES = ("q", "k", "v")


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on both."""
    problem = cpu_problem(torch.empty(0)) if request.param == "cpp" else None
    if problem:
        pytest.skip(problem)
    with use_backend(request.param):
        yield request.param


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    batch, heads, kv_heads, num_queries, num_keys, dim = shape
    torch.manual_seed(seed)
    sizes = [(heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys)]
    return [torch.randn(batch, h, t, dim, dtype=torch.float64).mul(1.5).to(dtype).requires_grad_() for h, t in sizes]


def loop(
    q: Tensor, k: Tensor, v: Tensor, attend_current: bool, key_mask: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Break the stick key by key, nearest first."""
    batch, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    outs, remainders, weights = [], [], []
    for b, h, t in itertools.product(range(batch), range(heads), range(num_queries)):
        position = num_keys - num_queries + t
        kv = h // (heads // kv_heads)
        nothing = 0 * q[b, h, t]  # keeps the graph where a query sees no key
        rest, out, row = nothing.sum() + 1, nothing, [nothing.sum()] * num_keys
        for j in range(position if attend_current else position - 1, -1, -1):
            if (key_mask is not None and not key_mask[b, j]) or (start is not None and j < start[b, t]):
                continue
            beta = torch.sigmoid(q[b, h, t] @ k[b, kv, j] / math.sqrt(dim))
            row[j] = beta * rest
            out = out + row[j] * v[b, kv, j]
            rest = rest * (1 - beta)
        outs.append(out)
        remainders.append(rest)
        weights.append(torch.stack(row))
    shape = (batch, heads, num_queries)
    return (
        torch.stack(outs).view(*shape, dim),
        torch.stack(remainders).view(shape),
        torch.stack(weights).view(*shape, -1),
    )


def gradients(out: Tensor, remainder: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    do, drem = torch.randn(out.shape).to(out.dtype), torch.randn(remainder.shape).to(remainder.dtype)
    loss = (out * do).sum() + (remainder * drem).sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True, retain_graph=True)
    return dict(zip(NAMES, grads, strict=True))


def assert_same(
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    actual_leaves: list[Tensor],
    expected_leaves: list[Tensor],
) -> None:
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
    expected_grads = gradients(*expected, expected_leaves)
    for name, grad in gradients(*actual, actual_leaves).items():
        torch.testing.assert_close(grad, expected_grads[name], msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few queries and heads, so that small inputs meet every boundary."""
    monkeypatch.setattr(stickbreaking_torch, "_CPU_ROWS", 3)
    monkeypatch.setattr(stickbreaking_torch, "_CPU_ELEMENTS", 32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("masks", ["none", "key_mask", "document_start", "both"])
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_a_loop(shape: tuple[int, ...], attend_current: bool, masks: str) -> None:
    leaves = make(shape)
    batch, _, _, num_queries, num_keys, _ = shape
    key_mask = torch.rand(batch, num_keys) > 0.3 if masks in ("key_mask", "both") else None
    start = torch.randint(0, num_keys + 1, (batch, num_queries)) if masks in ("document_start", "both") else None
    *expected, weights = loop(*leaves, attend_current, key_mask, start)
    options = {"attend_current": attend_current, "key_mask": key_mask, "document_start": start}
    assert_same(stickbreaking_attention(*leaves, **options), tuple(expected), leaves, leaves)
    reference = stickbreaking_attention(*leaves, **options, return_weights=True, backend="reference")
    assert_same(reference[:2], tuple(expected), leaves, leaves)
    _, remainder, actual_weights = reference
    torch.testing.assert_close(actual_weights, weights)
    torch.testing.assert_close(actual_weights.sum(-1) + remainder, torch.ones_like(remainder))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 2, 150, 150, 17),
        (1, 6, 2, 37, 211, 64),
        (1, 3, 1, 2, 130, 40),
        # Decoding: one to four rows of a key/value head, with a D that fills vectors and one that does not.
        (2, 2, 2, 1, 200, 64),
        (2, 4, 2, 1, 200, 96),
        (1, 3, 1, 1, 130, 128),
        (1, 2, 1, 2, 130, 64),
        (1, 4, 1, 1, 130, 24),
    ],
    ids=str,
)
def test_many_blocks_against_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, attend_current: bool, masks: bool, early_stop: bool
) -> None:
    leaves = make(shape, dtype)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    batch, _, _, num_queries, num_keys, _ = shape
    options: dict[str, Any] = {"attend_current": attend_current, "early_stop": early_stop}
    if masks:
        options["key_mask"] = torch.rand(batch, num_keys) > 0.3
        options["document_start"] = torch.randint(0, num_keys, (batch, num_queries)).cummax(1).values
    actual = stickbreaking_attention(*leaves, **options)
    expected = stickbreaking_attention(*doubles, **options, backend="reference")
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    named = {"out": (actual[0], expected[0]), "remainder": (actual[1], expected[1])}
    truth = gradients(*expected, doubles)
    named |= {name: (grad, truth[name]) for name, grad in gradients(*actual, leaves).items()}
    for name, (a, b) in named.items():
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp_min(1), name


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Also when decoding, where some lanes of a tile have no row.
@pytest.mark.parametrize("heads_queries_dim", [(2, 64, 8), (2, 1, 64), (3, 1, 32), (1, 3, 16), (3, 1, 24)], ids=str)
def test_early_stop_leaves_old_keys_unread(
    implementation: str, heads_queries_dim: tuple[int, int, int], dtype: torch.dtype, early_stop: bool
) -> None:
    """Keys past the stop may be anything, even not numbers."""
    heads, num_queries, dim = heads_queries_dim
    q, k, v = (x.detach() for x in make((1, heads, 1, num_queries, 512, dim), dtype))
    k[:, :, :256] = v[:, :, :256] = math.nan
    out, remainder = stickbreaking_attention(q, k, v, early_stop=early_stop)
    unread = early_stop and implementation == "cpp"
    assert bool(out.isfinite().all()) == unread
    assert bool(remainder.isfinite().all()) == unread


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
def test_gradcheck(attend_current: bool) -> None:
    leaves = make((1, 2, 1, 4, 5, 2))
    key_mask = torch.tensor([[True, False, True, True, True]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: stickbreaking_attention(q, k, v, attend_current=attend_current, key_mask=key_mask),
        leaves,
    )


def test_no_second_derivative() -> None:
    leaves = make((1, 2, 1, 4, 5, 2))
    for backend in (None, "reference"):
        out, remainder = stickbreaking_attention(*leaves, backend=backend)
        first = torch.autograd.grad(out.square().sum() + remainder.sum(), leaves, create_graph=True)
        if backend == "reference":
            second = torch.autograd.grad(first[0].sum(), leaves)
            assert all(grad.abs().max() > 0 for grad in second)
        else:
            with pytest.raises(
                RuntimeError, match="stickbreaking_attention can be differentiated once; .*'reference'"
            ):
                torch.autograd.grad(first[0].sum(), leaves)


def test_scale() -> None:
    q, k, v = make((1, 2, 2, 6, 6, 4))
    out, _ = stickbreaking_attention(q, k, v, scale=0.7)
    expected, _ = stickbreaking_attention(q * 1.4, k, v)  # the default is 4 ** -0.5
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype) -> None:
    """Relative L2 error against float64 from the same rounded inputs."""
    leaves = make((2, 4, 2, 200, 200, 32), dtype)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out, remainder = stickbreaking_attention(*leaves)
    assert out.dtype == dtype
    assert remainder.dtype == torch.float32
    expected = stickbreaking_attention(*doubles, backend="reference")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = [("out", out, expected[0]), ("remainder", remainder, expected[1])]
    expected_grads = gradients(*expected, doubles)
    pairs += [(name, grad, expected_grads[name]) for name, grad in gradients(out, remainder, leaves).items()]
    for name, actual, truth in pairs:
        assert (actual.double() - truth).norm() <= tolerance * truth.norm(), name


@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
def test_large_logits_stay_finite(attend_current: bool) -> None:
    leaves = [x.detach().mul(1e3).requires_grad_() for x in make((1, 2, 2, 50, 50, 8), torch.float32)]
    out, remainder = stickbreaking_attention(*leaves, attend_current=attend_current)
    assert all(torch.isfinite(x).all() for x in (out, remainder, *gradients(out, remainder, leaves).values()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
def test_padding_equals_unpadded(side: str, attend_current: bool) -> None:
    short = make((1, 4, 2, 6, 6, 4))
    expected = stickbreaking_attention(*short, attend_current=attend_current)
    pad = (0, 0, 5, 0) if side == "left" else (0, 0, 0, 5)
    real = slice(5, 11) if side == "left" else slice(0, 6)
    padded = [torch.nn.functional.pad(x, pad, value=3.0) for x in short]
    mask = torch.zeros(1, 11, dtype=torch.bool)
    mask[:, real] = True
    out, remainder = stickbreaking_attention(*padded, attend_current=attend_current, key_mask=mask)
    assert_same((out[:, :, real], remainder[:, :, real]), expected, short, short)
    if side == "left":  # a query that sees nothing
        assert out[:, :, :5].abs().max() == 0
        assert remainder[:, :, :5].eq(1).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_separate(attend_current: bool, dtype: torch.dtype) -> None:
    leaves = make((2, 4, 2, 9, 9, 4))
    cu_seqlens = torch.tensor([0, 1, 5, 9, 16, 18], dtype=dtype)
    packed = stickbreaking_attention(*leaves, attend_current=attend_current, cu_seqlens=cu_seqlens)
    rows: list[list[tuple[Tensor, ...]]] = [[], []]
    for first, last in itertools.pairwise(cu_seqlens.tolist()):
        row, span = first // 9, slice(first % 9, last - first // 9 * 9)
        pieces = [x[row : row + 1, :, span] for x in leaves]
        rows[row].append(stickbreaking_attention(*pieces, attend_current=attend_current))
    expected = tuple(torch.cat([torch.cat([piece[i] for piece in row], dim=2) for row in rows]) for i in (0, 1))
    assert_same(packed, expected, leaves, leaves)


def test_a_document_may_begin_anywhere_in_a_block() -> None:
    leaves = make((1, 1, 1, 8, 100, 8))
    for start in range(101):
        document_start = torch.full((1, 8), start)
        expected = stickbreaking_attention(*leaves, document_start=document_start, backend="reference")
        assert_same(stickbreaking_attention(*leaves, document_start=document_start), expected, leaves, leaves)


@pytest.mark.parametrize("dim", [16, 5])
def test_threads_share_a_head(dim: int) -> None:
    leaves = make((1, 2, 1, 100, 100, dim))
    expected = stickbreaking_attention(*leaves, backend="reference")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert_same(stickbreaking_attention(*leaves), expected, leaves, leaves)
    finally:
        torch.set_num_threads(threads)


def test_starts_past_every_key() -> None:
    """Some beyond 32 bits, and beside them queries that see something."""
    leaves = make((1, 2, 1, 5, 5, 4), torch.float32)
    expected = None
    for nothing in (5, 2**31, 2**32, 2**63 - 1):
        start = torch.tensor([[0, nothing, -(2**63), nothing, 2]])
        actual = stickbreaking_attention(*leaves, document_start=start)
        assert actual[0][:, :, [1, 3]].abs().max() == 0
        assert actual[1][:, :, [1, 3]].eq(1).all()
        expected = expected or actual
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_more_keys_than_fit_32_bits(implementation: str) -> None:
    if implementation != "cpp":
        pytest.skip("only the compiled kernel counts keys in 32 bits")
    keys = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**31, 1)
    with pytest.raises(RuntimeError, match="at most 2147483647 keys, got 2147483648"):
        stickbreaking_attention(torch.zeros(1, 1, 1, 1), keys, keys)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decoding_equals_the_full_run(num_queries: int, attend_current: bool, dtype: torch.dtype) -> None:
    q, k, v = make((2, 4, 2, 70, 70, 8), dtype)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, :7] = False
    full = stickbreaking_attention(q, k, v, attend_current=attend_current, key_mask=mask)
    step = stickbreaking_attention(q[:, :, -num_queries:], k, v, attend_current=attend_current, key_mask=mask)
    for a, b in zip(full, step, strict=True):
        torch.testing.assert_close(a[:, :, -num_queries:], b)


@pytest.mark.parametrize("backend", ["chosen", "reference"])
@pytest.mark.parametrize("masks", ["none", "key_mask", "document_start", "both"])
@pytest.mark.parametrize("attend_current", [True, False], ids=["current", "strict"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 2, 1, 150, 64), (3, 2, 2, 1, 90, 24), (3, 3, 1, 21, 90, 16)], ids=str)
def test_sequences_of_different_lengths(
    shape: tuple[int, ...], dtype: torch.dtype, attend_current: bool, masks: str, backend: str
) -> None:
    """Each as if its keys were all there is; behind them there may be anything."""
    q, k, v = (x.detach() for x in make(shape, dtype))
    batch, _, _, num_queries, num_keys, _ = shape
    lengths = torch.tensor([num_queries, num_keys // 2, num_keys], dtype=torch.int32)
    key_mask = torch.rand(batch, num_keys) > 0.3 if masks in ("key_mask", "both") else None
    start = torch.randint(0, num_keys // 2, (batch, num_queries)) if masks in ("document_start", "both") else None
    for x, value in ((k, math.nan), (v, math.inf)):
        for row, length in zip(x, lengths, strict=True):
            row[:, length:] = value
    options = {"attend_current": attend_current, "backend": None if backend == "chosen" else backend}
    together = stickbreaking_attention(q, k, v, key_mask=key_mask, document_start=start, lengths=lengths, **options)
    for b, length in enumerate(lengths):
        limits = {
            "key_mask": None if key_mask is None else key_mask[b : b + 1, :length],
            "document_start": None if start is None else start[b : b + 1],
        }
        alone = stickbreaking_attention(
            q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length], **limits, **options
        )
        for a, e in zip(together, alone, strict=True):
            torch.testing.assert_close(a[b : b + 1], e)


@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 150, 64), (2, 4, 2, 1, 90, 24), (2, 3, 1, 21, 90, 16)], ids=str)
def test_a_bf16_cache_is_read_as_it_is(implementation: str, shape: tuple[int, ...]) -> None:
    """Nothing is rounded but the result."""
    if implementation != "cpp":
        pytest.skip("PyTorch's products round what is between")
    q, k, v = (x.detach() for x in make(shape, torch.bfloat16))
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # heads side by side, as projections make
    options = (None, None, 0.2, True, False)
    with LargestTensor() as mode:
        out, remainder = stickbreaking_cpp.forward(q, k, v, *options)
    assert mode.numel == q.numel()
    expected, expected_remainder = stickbreaking_cpp.forward(q.float(), k.float(), v.float(), *options)
    torch.testing.assert_close(out, expected.bfloat16())
    torch.testing.assert_close(remainder, expected_remainder)


@pytest.mark.parametrize("num_queries", [1, 9])
def test_keys_that_do_not_exist_are_not_read(implementation: str, num_queries: int) -> None:
    """Blocks of them, as padding makes. Others may be read, and then must be finite."""
    q, k, v = (x.detach() for x in make((1, 2, 2, num_queries, 300, 64), torch.float32))
    mask = torch.arange(300)[None] >= 128
    k[:, :, :64] = v[:, :, :64] = math.nan
    out, remainder = stickbreaking_attention(q, k, v, key_mask=mask, early_stop=False)
    assert bool(out.isfinite().all() and remainder.isfinite().all()) == (implementation == "cpp")


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def largest_tensor(length: int, implementation: ModuleType) -> int:
    q, k, v = make((2, 4, 2, length, length, 8), torch.float32)
    rest = (q, k, v, None, None, 0.35, True, True)
    with LargestTensor() as mode:
        # The bare functions: inside the registered op the mode would not see anything.
        implementation.forward(*rest)
        implementation.backward(torch.randn_like(q), torch.randn(q.shape[:3]), *rest)
    return mode.numel


def test_memory_grows_linearly(implementation: str) -> None:
    module = {"cpp": stickbreaking_cpp, "torch": stickbreaking_torch}[implementation]
    with torch.no_grad():
        sizes = {length: largest_tensor(length, module) for length in (512, 2048, 8192)}
    assert sizes[512] < 2 * 4 * 512 * 512 / 4
    assert sizes[8192] < 5 * sizes[2048]


def test_nothing_quadratic_is_saved() -> None:
    saved: list[int] = []
    leaves = make((1, 4, 2, 256, 256, 8), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        stickbreaking_attention(*leaves)
    assert saved
    assert sum(saved) <= sum(x.numel() for x in leaves)


def test_bitwise_rerun() -> None:
    leaves = make((2, 4, 2, 130, 130, 16), torch.float32)
    runs = []
    for _ in range(3):
        out, remainder = stickbreaking_attention(*leaves)
        runs.append([out, remainder, *gradients(out, remainder, leaves).values()])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_strided_inputs_and_stride_zero_gradients() -> None:
    leaves = make((2, 4, 2, 9, 9, 4))
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves]
    assert not strided[0].is_contiguous()
    expected, _ = stickbreaking_attention(*leaves)
    out, _ = stickbreaking_attention(*strided)
    assert torch.equal(out, expected)
    out.sum().backward()
    for name, a, b in zip(
        NAMES, strided, torch.autograd.grad(expected, leaves, torch.ones_like(expected)), strict=True
    ):
        torch.testing.assert_close(a.grad, b, msg=name)


def test_autocast() -> None:
    leaves = make((1, 2, 1, 20, 20, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, remainder = stickbreaking_attention(*leaves)
        grads = gradients(out, remainder, leaves)  # inside: nor may autocast touch what runs in the op
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected = stickbreaking_attention(*low)
    assert torch.equal(out, expected[0])
    assert torch.equal(remainder, expected[1])
    for name, grad in gradients(*expected, low).items():
        assert torch.equal(grads[name], grad.float()), name


def test_backward_under_autocast_keeps_the_precision_of_forward() -> None:
    leaves = make((1, 2, 1, 20, 20, 8), torch.float32)
    out, remainder = stickbreaking_attention(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(out, remainder, leaves)
    for name, grad in gradients(*stickbreaking_attention(*leaves), leaves).items():
        assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize(
    "shape", [(0, 4, 2, 3, 5, 4), (2, 0, 2, 3, 5, 4), (2, 4, 2, 0, 5, 4), (2, 4, 2, 0, 0, 4)], ids=str
)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    """No batch, no heads, no queries, no keys."""
    leaves = make(shape)
    out, remainder = stickbreaking_attention(*leaves)
    assert out.shape == leaves[0].shape
    assert remainder.shape == leaves[0].shape[:3]
    for name, grad in gradients(out, remainder, leaves).items():
        assert grad.eq(0).all(), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_well_behaved_op(implementation: str, masked: bool, dtype: torch.dtype) -> None:
    q, k, v = make((2, 4, 2, 4, 6, 4), dtype)
    key_mask = torch.rand(2, 6) > 0.3 if masked else None
    start = torch.randint(0, 3, (2, 4)) if masked else None
    options = (key_mask, start, 0.5, True, True, implementation)
    torch.library.opcheck(torch.ops.modmoe.stickbreaking_attention, (q, k, v, *options))
    cached = (q.detach(), k.detach(), v.detach(), *options, torch.tensor([4, 5]))
    torch.library.opcheck(torch.ops.modmoe.stickbreaking_attention, cached)
    out, remainder = torch.ops.modmoe.stickbreaking_attention(q, k, v, *options)
    torch.library.opcheck(
        torch.ops.modmoe.stickbreaking_attention_backward,
        (
            torch.randn(out.shape).to(dtype),
            torch.randn(remainder.shape),
            q.detach(),
            k.detach(),
            v.detach(),
            *options,
        ),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_equals_eager(packed: bool) -> None:
    cu_seqlens = torch.tensor([0, 4, 9, 18], dtype=torch.int32) if packed else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return stickbreaking_attention(q, k, v, cu_seqlens=cu_seqlens)

    leaves = make((2, 4, 2, 9, 9, 4), torch.float32)
    eager = run(*leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert_same(compiled, eager, leaves, leaves)


def fails(error: type[Exception], match: str) -> Callable[..., None]:
    def check(*args: Tensor, **options: Any) -> None:
        with pytest.raises(error, match=match):
            stickbreaking_attention(*args, **options)

    return check


def test_errors_name_the_value() -> None:
    q, k, v = (x.detach() for x in make((2, 4, 2, 3, 5, 4), torch.float32))
    fails(ValueError, r"got \(4, 3, 4\)")(q[0], k, v)
    fails(ValueError, r"share batch and a head dim of 1 or more, got \(2, 4, 3, 2\) and \(2, 2, 5, 4\)")(
        q[..., :2], k, v
    )
    fails(ValueError, "multiple of key/value heads, got 3 and 2")(q[:, :3], k, v)
    fails(ValueError, "got 5 queries, 3 keys")(k, q[:, :2], q[:, :2])
    fails(ValueError, r"got \(2, 4, 3, 0\) and \(2, 2, 5, 0\)")(q[..., :0], k[..., :0], v[..., :0])
    fails(TypeError, "torch.float64, torch.float32, torch.float32")(q.double(), k, v)
    fails(TypeError, "one dtype of .*, got torch.float8_e5m2, ")(*(x.to(torch.float8_e5m2) for x in (q, k, v)))
    fails(TypeError, "key_mask must be bool")(q, k, v, key_mask=torch.ones(2, 5))
    fails(ValueError, r"key_mask must have shape \(2, 5\), got \(2, 3\)")(q, k, v, key_mask=torch.ones(2, 3).bool())
    fails(ValueError, "as many queries as keys, got 3 and 5")(q, k, v, cu_seqlens=torch.tensor([0, 6]))
    fails(ValueError, r"1-D with 2 entries or more, got \(1,\)")(k, k, v, cu_seqlens=torch.tensor([0]))
    both = {"cu_seqlens": torch.tensor([0, 10]), "document_start": torch.zeros(2, 5, dtype=torch.int64)}
    fails(ValueError, "not both")(k, k, v, **both)
    fails(ValueError, r"document_start must have shape \(2, 3\)")(q, k, v, document_start=both["document_start"])
    fails(TypeError, "document_start must be int32 or int64")(q, k, v, document_start=torch.zeros(2, 3))
    fails(RuntimeError, "one device, got")(q, k.to("meta"), v)
    fails(TypeError, "lengths must be int32 or int64, got torch.float32")(q, k, v, lengths=torch.ones(2))
    fails(ValueError, r"lengths must have shape \(2,\), got \(1,\)")(q, k, v, lengths=torch.tensor([3]))
    for wrong in ([2, 5], [3, 6]):
        message = rf"between the 3 queries and the 5 keys there is room for, got \{wrong}"
        fails(ValueError, message)(q, k, v, lengths=torch.tensor(wrong))
    leaf = q.clone().requires_grad_()
    fails(RuntimeError, "has no gradient: call it under torch.no_grad")(leaf, k, v, lengths=torch.tensor([4, 5]))
