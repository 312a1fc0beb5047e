"""The grouped linear map against a loop over tokens and slots, forward and backward."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modmoe.ops import (
    DispatchPlan,
    dispatch_plan,
    grouped_linear,
    grouped_linear_sm90,
    use_backend,
)
from modmoe.ops.build import cpu_problem
from modmoe.ops.grouped_linear import LAYOUTS
from modmoe.ops.grouped_linear_torch import _multiply_on_device, _outer_on_device, _pad_matrix, _spans

# (tokens, top_k, experts, in, out)
SIZES = [(1, 1, 1, 3, 5), (1, 2, 32, 4, 4), (7, 2, 3, 5, 3), (23, 3, 6, 7, 9), (4, 2, 3, 0, 5), (4, 2, 3, 5, 0)]
# Widths that fill vectors: the C++ kernel takes these itself.
SIZES += [(1, 1, 1, 8, 16), (1, 2, 32, 8, 8), (7, 2, 3, 40, 8), (23, 3, 6, 16, 72), (4, 2, 3, 0, 8), (4, 2, 3, 8, 0)]
NARROW_AND_WIDE = pytest.mark.parametrize("widths", [(4, 5), (32, 64)], ids=str)


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on both."""
    problem = cpu_problem(torch.empty(0)) if request.param == "cpp" else None
    if problem:
        pytest.skip(problem)
    with use_backend(request.param):
        yield request.param


def make(size: tuple[int, ...], source: str, dtype: torch.dtype = torch.float64, masked: float = 0.3) -> tuple:
    num_tokens, top_k, num_experts, width_in, width_out = size
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    index[torch.rand(num_tokens) < masked] = num_experts
    index[index == 1] = 0 if top_k == 1 else num_experts  # expert 1, where there is one, is empty
    plan = dispatch_plan(index, num_experts)
    x = torch.randn(num_tokens if source == "token" else num_tokens * top_k, width_in, dtype=dtype)
    weight = torch.randn(num_experts, width_out, width_in, dtype=dtype)
    gates = torch.rand(num_tokens, top_k, dtype=dtype if dtype == torch.float64 else torch.float32)
    return x, weight, gates, plan, index


def loop(
    x: Tensor,
    weight: Tensor,
    gates: Tensor | None,
    plan: DispatchPlan,
    index: Tensor,
    source: str,
    target: str,
) -> Tensor:
    """One token and slot at a time."""
    num_tokens, top_k = index.shape
    zero = torch.zeros(weight.shape[1], dtype=x.dtype)
    pairs = []
    for token, slot in itertools.product(range(num_tokens), range(top_k)):
        pair, expert = token * top_k + slot, int(index[token, slot])
        row = {"token": token, "pair": pair, "sorted": int(plan.inverse[pair])}[source]
        y = zero if expert == len(weight) else weight[expert] @ x[row]
        pairs.append(y if gates is None else y * gates[token, slot])
    if target == "sorted":
        return torch.stack([pairs[pair] for pair in plan.order.tolist()])
    result = torch.stack(pairs)
    return result if target == "pair" else result.view(num_tokens, top_k, -1).sum(1)


def gradients(function: Callable[..., Tensor], *leaves: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = [None if leaf is None else leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*inputs)
    torch.manual_seed(1)
    (out * torch.randn(out.shape).to(out.dtype)).sum().backward()
    return out, {
        name: leaf.grad for name, leaf in zip(("x", "weight", "gates"), inputs, strict=True) if leaf is not None
    }


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    ("target", "gated"), [("sorted", False), ("pair", False), *((target, True) for target in LAYOUTS)]
)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_a_loop(size: tuple[int, ...], source: str, target: str, gated: bool, backend: str | None) -> None:
    x, weight, gates, plan, index = make(size, source)
    gates = gates if gated else None

    def run(x: Tensor, weight: Tensor, gates: Tensor | None) -> Tensor:
        return grouped_linear(
            x, weight, plan, top_k=size[1], source=source, target=target, gates=gates, backend=backend
        )

    actual, actual_grads = gradients(run, x, weight, gates)
    expected, expected_grads = gradients(
        lambda x, weight, gates: loop(x, weight, gates, plan, index, source, target), x, weight, gates
    )
    torch.testing.assert_close(actual, expected)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(actual_grads[name], grad, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)]
)
# bfloat16's is for gradients of few gates: PyTorch's path rounds a factor of these dot products, which may cancel.
# Also the fewest rows that can be, and many, so that the cut of low-precision products is met.
@pytest.mark.parametrize(
    "size",
    [
        *((301, 2, 3, *widths) for widths in [(17, 33), (48, 80), (64, 96)]),
        *((1, 1, 1, 32, 64), (1, 2, 32, 64, 32), (7, 2, 3, 32, 96), (23, 3, 6, 96, 32)),
    ],
    ids=str,
)
@pytest.mark.parametrize(("source", "target"), [("token", "sorted"), ("sorted", "token"), ("pair", "token")])
def test_precision(source: str, target: str, size: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    x, weight, gates, plan, _ = make(size, source, dtype, masked=0.3 if size[0] > 1 else 0.0)

    def run(x: Tensor, weight: Tensor, gates: Tensor) -> Tensor:
        return grouped_linear(x, weight, plan, top_k=size[1], source=source, target=target, gates=gates)

    assert_precise(run, (x, weight, gates), tolerance)


def assert_precise(run: Callable[..., Tensor], leaves: tuple[Tensor, ...], tolerance: float) -> None:
    """Errors of results and gradients are relative L2, to the reference in float64."""
    actual, actual_grads = gradients(run, *leaves)
    assert actual.dtype == leaves[0].dtype
    with use_backend("reference"):
        expected, expected_grads = gradients(run, *(leaf.double() for leaf in leaves))
    for name, a, b in [("out", actual, expected), *((n, actual_grads[n], g) for n, g in expected_grads.items())]:
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("tokens", [577, 1090, 2051])
@pytest.mark.parametrize(("source", "target"), [("token", "sorted"), ("sorted", "token"), ("pair", "pair")])
def test_more_than_a_block(source: str, target: str, tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    """Rows, depth and columns that do not fit into one block of the C++ kernel, with every kind of rest."""
    if dtype == torch.bfloat16:
        widths = (1056, 1088) if tokens < 1000 else (64, 544)
    else:
        widths = (520, 536) if tokens < 2000 else (40, 72)
    x, weight, gates, plan, _ = make((tokens, 2, 3, *widths), source, dtype, masked=0.0)

    def run(x: Tensor, weight: Tensor, gates: Tensor) -> Tensor:
        return grouped_linear(x, weight, plan, top_k=2, source=source, target=target, gates=gates)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # else no unit has as many rows as one may have
        assert_precise(run, (x, weight, gates), tolerance)
    finally:
        torch.set_num_threads(threads)


def test_spans_come_back_in_few_shapes() -> None:
    offsets = torch.tensor([3, 3, 80, 144], dtype=torch.int32)
    rows = torch.empty(144, 1)
    assert list(_spans(offsets, rows)) == [(0, 0, 3), (2, 3, 80), (3, 80, 144)]
    assert list(_spans(offsets, rows.bfloat16())) == [(0, 0, 3), (2, 3, 67), (2, 67, 80), (3, 80, 144)]


@NARROW_AND_WIDE
def test_gradcheck(widths: tuple[int, int]) -> None:
    x, weight, gates, plan, _ = make((5, 2, 4, *widths), "token")
    for tensor in (x, weight, gates):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight, gates: grouped_linear(x, weight, plan, top_k=2, gates=gates), (x, weight, gates)
    )


def test_no_second_derivative() -> None:
    x, weight, gates, plan, _ = make((5, 2, 4, 3, 2), "token")
    out = grouped_linear(x.requires_grad_(), weight, plan, top_k=2, gates=gates)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_linear can be differentiated once; .* 'reference'"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@NARROW_AND_WIDE
def test_all_tokens_masked(widths: tuple[int, int], dtype: torch.dtype, source: str, target: str) -> None:
    x, weight, gates, plan, _ = make((6, 2, 3, *widths), source, dtype, masked=1.1)
    x[:] = float("nan")  # rows that nobody owns are never read
    out, grads = gradients(
        lambda x, weight, gates: grouped_linear(x, weight, plan, top_k=2, source=source, target=target, gates=gates),
        x,
        weight,
        gates,
    )
    assert out.abs().max() == 0
    assert all(grad.abs().max() == 0 for grad in grads.values())


@NARROW_AND_WIDE
def test_stride_zero_and_non_contiguous(widths: tuple[int, int]) -> None:
    x, weight, gates, plan, _ = make((6, 2, 3, *widths), "token")
    contiguous = grouped_linear(x, weight, plan, top_k=2, gates=gates)
    strided = grouped_linear(
        x.T.contiguous().T, weight.mT.contiguous().mT, plan, top_k=2, gates=gates.T.contiguous().T
    )
    torch.testing.assert_close(contiguous, strided)
    for target in LAYOUTS:
        leaf = weight.clone().requires_grad_()
        grouped_linear(x, leaf, plan, top_k=2, gates=gates, target=target).sum().backward()
        ones = weight.clone().requires_grad_()
        y = grouped_linear(x, ones, plan, top_k=2, gates=gates, target=target)
        y.backward(torch.ones_like(y))
        torch.testing.assert_close(leaf.grad, ones.grad)


@NARROW_AND_WIDE
def test_only_needed_gradients(widths: tuple[int, int], implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen experts cost no weight gradient, and the gate's gradient does not depend on who else wants one."""
    x, weight, gates, plan, _ = make((9, 2, 3, *widths), "token")
    out, full = gradients(lambda x, w, g: grouped_linear(x, w, plan, top_k=2, gates=g), x, weight, gates)
    torch.manual_seed(1)
    dy = torch.randn(out.shape).to(out.dtype)
    plan_and_gates = (plan.order, plan.inverse, plan.offsets, gates)
    for needs in itertools.product((True, False), repeat=3):
        grads = torch.ops.modmoe.grouped_linear_backward(
            dy, x, weight, *plan_and_gates, 2, "token", "token", "auto", *needs
        )
        for needed, grad, name in zip(needs, grads, ("x", "weight", "gates"), strict=True):
            if needed:
                torch.testing.assert_close(grad, full[name], msg=name)
            else:
                assert grad.numel() == 0, name

    asked = []
    module = sys.modules[f"modmoe.ops.grouped_linear_{implementation}"]
    backward = module.backward
    monkeypatch.setattr(module, "backward", lambda *arguments: asked.append(arguments[-3:]) or backward(*arguments))
    grouped_linear(x.requires_grad_(), weight, plan, top_k=2, gates=gates).sum().backward()
    assert asked == [(True, False, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NARROW_AND_WIDE
def test_bitwise_rerun(widths: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, gates, plan, _ = make((200, 2, 4, *widths), "token", dtype)
    runs = [
        gradients(lambda x, w, g: grouped_linear(x, w, plan, top_k=2, gates=g), x, weight, gates) for _ in range(3)
    ]
    for out, grads in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert all(torch.equal(grad, runs[0][1][name]) for name, grad in grads.items())


@NARROW_AND_WIDE
def test_autocast(widths: tuple[int, int]) -> None:
    x, weight, gates, plan, _ = make((9, 2, 3, *widths), "token", torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_linear(x, weight, plan, top_k=2, gates=gates)
        (grad,) = torch.autograd.grad(out.sum(), weight)  # inside: nor may autocast touch what runs in the op
    low = weight.detach().bfloat16().requires_grad_()
    expected = grouped_linear(x.bfloat16(), low, plan, top_k=2, gates=gates)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), low)[0].float())


@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NARROW_AND_WIDE
def test_well_behaved_op(widths: tuple[int, int], dtype: torch.dtype, source: str, target: str) -> None:
    x, weight, gates, plan, _ = make((4, 2, 3, *widths), source, dtype)
    tensors = (x.requires_grad_(), weight.requires_grad_(), plan.order, plan.inverse, plan.offsets)
    arguments = (*tensors, gates.requires_grad_(), 2, source, target, "auto")
    out = torch.ops.modmoe.grouped_linear(*arguments)
    torch.library.opcheck(torch.ops.modmoe.grouped_linear, arguments)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    for needs in [(True, True, True), (True, False, False), (False, True, False)]:
        torch.library.opcheck(torch.ops.modmoe.grouped_linear_backward, (torch.randn_like(out), *detached, *needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NARROW_AND_WIDE
def test_compiled_equals_eager(widths: tuple[int, int], dtype: torch.dtype) -> None:
    def run(x: Tensor, up: Tensor, down: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        plan = dispatch_plan(index, len(up))
        hidden = grouped_linear(x, up, plan, top_k=2, target="sorted").relu()
        return grouped_linear(hidden, down, plan, top_k=2, source="sorted", gates=gates)

    x, up, gates, _, index = make((9, 2, 3, *widths), "token", dtype)
    leaves = [t.requires_grad_() for t in (x, up, torch.randn(3, *widths).to(dtype), gates)]
    eager = run(*leaves, index)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves, index)
    assert torch.equal(eager, compiled)
    grads = [torch.autograd.grad(out.float().square().sum(), leaves) for out in (eager, compiled)]
    for name, a, b in zip(("x", "up", "down", "gates"), *grads, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("widths", [(8, 16), (5, 3), (17, 24)], ids=str)
def test_device_products(widths: tuple[int, int]) -> None:
    """What runs off the CPU, run on the CPU (grouped_mm has a kernel there too): odd widths, empty experts, tails."""
    torch.manual_seed(0)
    offsets = torch.tensor([3, 3, 10], dtype=torch.int32)
    left, right = torch.randn(12, widths[1]).bfloat16(), torch.randn(12, widths[0]).bfloat16()
    weight = torch.randn(3, widths[1], widths[0]).bfloat16()
    groups = [slice(0, 3), slice(3, 3), slice(3, 10)]
    for matrix, rows in (
        (weight.mT, right),
        (weight, left),
    ):  # as the forward and the backward pass have them
        out = _multiply_on_device(rows, matrix, offsets)
        expected = torch.cat(
            [*(rows[g] @ w for g, w in zip(groups, matrix, strict=True)), rows.new_zeros(2, matrix.shape[2])]
        )
        torch.testing.assert_close(out, expected)
    outer = _outer_on_device(left, right, offsets)
    torch.testing.assert_close(outer, torch.stack([left[g].T @ right[g] for g in groups]))


def test_device_products_of_tensors_at_odd_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of a flat buffer (ZeRO's parameters are) begin anywhere; on a GPU, both products refuse such memory."""

    def refusing(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(a: Tensor, b: Tensor, *rest: object, **options: object) -> Tensor:
            assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0
            return product(a, b, *rest, **options)

        return run

    def multiply_sm90(rows: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
        assert weight.is_contiguous()
        return F.grouped_mm(rows, weight if transposed else weight.mT, offs=offsets)

    def outer_sm90(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(left.T, right, offs=offsets)

    monkeypatch.setattr(F, "grouped_mm", refusing(F.grouped_mm))
    hopper = SimpleNamespace(multiply_sm90=refusing(multiply_sm90), outer_sm90=refusing(outer_sm90))
    monkeypatch.setattr(torch.ops, "modmoe_cuda", hopper)

    def odd(*size: int) -> Tensor:
        return torch.randn(math.prod(size) + 1).bfloat16()[1:].view(size)

    torch.manual_seed(0)
    left, right, weight = odd(12, 16), odd(12, 8), odd(3, 16, 8)
    offsets = torch.tensor([3, 3, 12], dtype=torch.int32)
    groups = [slice(0, 3), slice(3, 3), slice(3, 12)]
    for multiply, outer in ((_multiply_on_device, _outer_on_device), grouped_linear_sm90._PRODUCTS):
        for matrix, rows in ((weight.mT, right), (weight, left)):
            expected = torch.cat([rows[g] @ w for g, w in zip(groups, matrix, strict=True)])
            torch.testing.assert_close(multiply(rows, matrix, offsets), expected)
        torch.testing.assert_close(outer(left, right, offsets), torch.stack([left[g].T @ right[g] for g in groups]))


def test_the_compiled_kernels_say_why_they_cannot_run() -> None:
    x, weight, gates, plan, _ = make((6, 2, 3, 4, 5), "token", torch.float32)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used: it is for CUDA, the tensors are on 'cpu'"):
        grouped_linear(x, weight, plan, top_k=2, gates=gates, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used: it has no torch.float64"):
        grouped_linear(x.double(), weight.double(), plan, top_k=2, gates=gates, backend="cuda")


def test_errors_name_the_value() -> None:
    x, weight, gates, plan, _ = make((6, 2, 3, 4, 5), "token", torch.float32)
    with pytest.raises(ValueError, match="source='expert'"):
        grouped_linear(x, weight, plan, top_k=2, source="expert", gates=gates)
    with pytest.raises(ValueError, match="needs gates"):
        grouped_linear(x, weight, plan, top_k=2)
    with pytest.raises(ValueError, match=r"got \(6, 3\) and \(3, 5, 4\)"):
        grouped_linear(x[:, :3], weight, plan, top_k=2, gates=gates)
    with pytest.raises(TypeError, match=r"torch.float32 and torch.float64"):
        grouped_linear(x, weight.double(), plan, top_k=2, gates=gates)
    with pytest.raises(TypeError, match=r"one dtype of .*, got torch.float8_e5m2 and torch.float8_e5m2"):
        grouped_linear(x.to(torch.float8_e5m2), weight.to(torch.float8_e5m2), plan, top_k=2, gates=gates)
    with pytest.raises(ValueError, match="source 'pair' needs 12 rows for this plan and top_k=2, got 6"):
        grouped_linear(x, weight, plan, top_k=2, source="pair", gates=gates)
    with pytest.raises(ValueError, match="the plan is for 3 experts but weight has 2"):
        grouped_linear(x, weight[:2], plan, top_k=2, gates=gates)
    with pytest.raises(ValueError, match=r"gates must have shape \(6, 2\), got \(6, 1\)"):
        grouped_linear(x, weight, plan, top_k=2, gates=gates[:, :1])
    with pytest.raises(TypeError, match=r"gates must be floating point, got torch.int64"):
        grouped_linear(x, weight, plan, top_k=2, gates=gates.long())
    for broken, message in (
        (plan._replace(offsets=plan.offsets.long()), r"got torch.int64, \(12,\) and \(12,\)"),
        (plan._replace(inverse=plan.inverse[:6]), r"got torch.int32, \(6,\) and \(12,\)"),
    ):
        with pytest.raises(ValueError, match=f"int32 offsets, and an inverse as long as its order, {message}"):
            grouped_linear(x, weight, broken, top_k=2, gates=gates)
    with pytest.raises(ValueError, match="top_k must divide the 12 pairs of the plan, got 5"):
        grouped_linear(x, weight, plan, top_k=5, gates=gates)
    with pytest.raises(RuntimeError, match="one device, got"):
        grouped_linear(x.to("meta"), weight, plan, top_k=2, gates=gates)
    with pytest.raises(RuntimeError, match="one device, got"):
        grouped_linear(x, weight, plan._replace(offsets=plan.offsets.to("meta")), top_k=2, gates=gates)


@pytest.mark.parametrize(
    ("offsets", "message"), [([3, 2, 14], "got 2 for expert 1"), ([3, 5, 99], "got 99 for expert 2")]
)
@NARROW_AND_WIDE
def test_offsets_that_do_not_fit(widths: tuple[int, int], offsets: list[int], message: str) -> None:
    """On the CPU the products look at the offsets before they read by them."""
    x, weight, gates, plan, _ = make((7, 2, 3, *widths), "token", torch.float32)
    broken = plan._replace(offsets=torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=f"offsets must rise from 0 to at most 14 rows, {message}"):
        grouped_linear(x, weight, broken, top_k=2, gates=gates)


@NARROW_AND_WIDE
def test_orders_that_are_not_permutations(widths: tuple[int, int]) -> None:
    x, weight, gates, plan, _ = make((7, 2, 3, *widths), "pair", torch.float32)
    for broken in (-1, 14):
        order = plan.order.clone()
        order[3] = broken
        with pytest.raises((RuntimeError, IndexError), match="out of range|each of 14 pairs once, got .* in row 3"):
            grouped_linear(x, weight, plan._replace(order=order), top_k=2, source="pair", gates=gates)


def test_a_pair_in_two_rows(implementation: str) -> None:
    """Two threads would write to it."""
    if implementation != "cpp":
        pytest.skip("PyTorch's own indexing gives wrong rows, but one thread does not disturb another")
    x, weight, gates, plan, _ = make((7, 2, 3, 16, 32), "pair", torch.float32)
    order = plan.order.clone()
    order[3] = order[9]
    with pytest.raises(RuntimeError, match=f"each of 14 pairs once, got {order[9]} in row 9"):
        grouped_linear(x, weight, plan._replace(order=order), top_k=2, source="pair", gates=gates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_of_another_dtype(dtype: torch.dtype) -> None:
    x, weight, gates, plan, _ = make((9, 2, 3, 16, 32), "token", dtype)
    other = gates.to(torch.float64 if dtype == torch.float32 else torch.float32)

    def run(x: Tensor, weight: Tensor, gates: Tensor) -> Tensor:
        return grouped_linear(x, weight, plan, top_k=2, gates=gates)

    (expected, expected_grads), (actual, grads) = (gradients(run, x, weight, g) for g in (other.to(dtype), other))
    torch.testing.assert_close(actual, expected)
    assert grads["gates"].dtype == other.dtype
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name].to(dtype), grad, rtol=1e-5, atol=1e-5, msg=name)


def test_tensors_at_odd_places() -> None:
    """Views of a flat buffer begin anywhere, also where no vector does."""

    def odd(tensor: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    x, weight, gates, plan, _ = make((70, 2, 3, 48, 32), "token", torch.float32)

    def run(x: Tensor, weight: Tensor, gates: Tensor) -> Tensor:
        return grouped_linear(x, weight, plan, top_k=2, gates=gates)

    expected, expected_grads = gradients(run, x, weight, gates)
    leaves = [odd(tensor).requires_grad_() for tensor in (x, weight, gates)]
    assert all(leaf.data_ptr() % 16 == 4 for leaf in leaves)
    out = run(*leaves)
    assert torch.equal(out, expected)
    torch.manual_seed(1)
    for grad, name in zip(torch.autograd.grad(out, leaves, odd(torch.randn(out.shape))), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grads[name], msg=name)


@NARROW_AND_WIDE
def test_inference_mode(widths: tuple[int, int], implementation: str) -> None:
    """Its tensors may not be written to from a thread that is outside."""
    x, weight, gates, plan, _ = make((64, 2, 3, *widths), "token", torch.float32)
    expected = grouped_linear(x, weight, plan, top_k=2, gates=gates)
    with torch.inference_mode():
        inside = make((64, 2, 3, *widths), "token", torch.float32)
        assert torch.equal(grouped_linear(*inside[:2], inside[3], top_k=2, gates=inside[2]), expected)


@pytest.mark.parametrize("threads", [1, 2, 7])
@NARROW_AND_WIDE
def test_any_number_of_threads(widths: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    x, weight, gates, plan, _ = make((301, 2, 3, *widths), "token", torch.float32)

    def run(x: Tensor, weight: Tensor, gates: Tensor) -> Tensor:
        return grouped_linear(x, weight, plan, top_k=2, gates=gates)

    with use_backend("reference"):
        expected, expected_grads = gradients(run, x.double(), weight.double(), gates.double())
    try:
        torch.set_num_threads(threads)
        actual, grads = gradients(run, x, weight, gates)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name].double(), grad, rtol=1e-4, atol=1e-4, msg=name)


def test_matrices_of_any_strides_become_what_grouped_mm_takes() -> None:
    wide = torch.randn(3, 32, 16)
    for weight in (wide, wide.mT, wide[:, ::2, ::2], wide[:, 1:, :], torch.randn(8, 1).T[None]):
        padded = _pad_matrix(weight)
        assert torch.equal(padded[:, : weight.shape[1], : weight.shape[2]], weight)
        assert 1 in padded.stride()[1:]
        assert max(padded.stride()[1:]) % 4 == 0  # 16 bytes


def test_compiled_graphs_do_not_capture_it() -> None:
    """Its products may wait for the host, which a CUDA graph cannot."""
    for op in (torch.ops.modmoe.grouped_linear.default, torch.ops.modmoe.grouped_linear_backward.default):
        assert torch.Tag.cudagraph_unsafe in op.tags
