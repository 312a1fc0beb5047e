"""Routing and the dispatch plan against loops in plain Python."""

import math

import pytest
import torch

from modmoe.ops import dispatch_plan, route, routing_cpp, routing_cuda
from modmoe.ops.build import cpu_problem
from modmoe.ops.routing import _route_backward
from tests.operations import Operations

SIZES = [(1, 1, 1), (1, 5, 2), (7, 4, 4), (33, 6, 3), (64, 32, 2)]


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_route_against_a_loop(num_tokens: int, num_experts: int, top_k: int, renormalize: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64)
    bias = torch.randn(num_experts, dtype=torch.float64)
    mask = torch.rand(num_tokens) > 0.3
    weights, index = route(logits, top_k, token_mask=mask, selection_bias=bias, renormalize=renormalize)
    assert weights.dtype == torch.float64
    assert index.dtype == torch.int64
    for n in range(num_tokens):
        if not mask[n]:
            assert weights[n].tolist() == [0.0] * top_k
            assert index[n].tolist() == [num_experts] * top_k
            continue
        exps = [math.exp(x) for x in logits[n].tolist()]
        probs = [x / sum(exps) for x in exps]
        chosen = sorted(range(num_experts), key=lambda e: probs[e] + bias[e].item(), reverse=True)[:top_k]
        total = sum(probs[e] for e in chosen) if renormalize else 1.0
        assert index[n].tolist() == chosen
        assert weights[n].tolist() == pytest.approx([probs[e] / total for e in chosen])


def test_gates_are_float32_for_low_precision_logits() -> None:
    logits = torch.randn(5, 4, dtype=torch.bfloat16)
    weights, _ = route(logits, 2)
    torch.testing.assert_close(weights, logits.float().softmax(-1).topk(2).values)


@pytest.mark.parametrize("renormalize", [False, True])
def test_route_gradient(renormalize: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda x: route(x, 2, token_mask=mask, renormalize=renormalize).top_k_weights, logits
    )
    route(logits, 2, token_mask=mask, renormalize=renormalize).top_k_weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad[2].abs().max() == 0


def test_ties_are_broken_the_same_way_every_time() -> None:
    logits = torch.zeros(50, 8)
    first = route(logits, 3).top_k_index
    assert all(torch.equal(route(logits, 3).top_k_index, first) for _ in range(5))
    assert all(len(set(row)) == 3 for row in first.tolist())


def test_sampling_keeps_the_best_and_draws_the_rest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 6)
    probs = logits.softmax(-1)
    weights, index = route(logits, 3, sample_top_k=2, generator=torch.Generator().manual_seed(1))
    again = route(logits, 3, sample_top_k=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(index, again.top_k_index)
    assert torch.equal(index[:, 0], probs.argmax(-1))
    assert all(len(set(row)) == 3 for row in index.tolist())
    torch.testing.assert_close(weights, probs.gather(1, index))
    assert not torch.equal(index, route(logits, 3).top_k_index)


@pytest.mark.parametrize("sampled", [1, 2])
def test_drawing_is_that_of_multinomial_without_a_wait(sampled: int) -> None:
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    with Operations() as operations:
        _, index = route(logits, sampled, sample_top_k=sampled, generator=torch.Generator().manual_seed(1))
    operations.assert_nothing_waits()
    chances = logits.softmax(-1) + 1e-6
    assert torch.equal(index, torch.multinomial(chances, sampled, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("sampled", [0, 1, 3])
def test_a_bias_of_minus_infinity_is_never_chosen(sampled: int) -> None:
    torch.manual_seed(0)
    logits = torch.tensor([5.0, 0.0, -50.0, -60.0, -70.0]).repeat(200, 1)
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0, -math.inf])
    weights, index = route(logits, 3, selection_bias=bias, sample_top_k=sampled)
    assert torch.equal(index.sort(-1).values, torch.tensor([1, 2, 3]).expand(200, 3))
    assert torch.equal(weights, logits.softmax(-1).gather(1, index))


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    _, index = route(logits, 2, sample_top_k=1, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(index[:, 1], minlength=4) / len(index)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.6, 0.3, 0.1]), rtol=0, atol=0.02)


@pytest.fixture(params=["cpp", "torch"])
def planner(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and (problem := cpu_problem(torch.empty(0))):
        pytest.skip(problem)
    return str(request.param)


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 3, 2), *SIZES])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_plan_against_a_loop(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, planner: str) -> None:
    torch.manual_seed(0)
    index = torch.randint(0, num_experts + 1, (top_k, num_tokens), dtype=dtype).T  # E stands for no expert
    plan = dispatch_plan(index, num_experts, backend=planner)
    flat = index.flatten().tolist()
    order = [pair for expert in range(num_experts + 1) for pair, e in enumerate(flat) if e == expert]
    counts = [flat.count(expert) for expert in range(num_experts)]
    assert plan.order.tolist() == order
    assert plan.inverse.tolist() == [order.index(pair) for pair in range(len(flat))]
    assert plan.tokens_per_expert.tolist() == counts
    assert plan.offsets.tolist() == [sum(counts[: e + 1]) for e in range(num_experts)]
    assert [t.dtype for t in plan] == [torch.int32, torch.int32, torch.int64, torch.int64]


def test_plan_is_a_well_behaved_op(planner: str) -> None:
    torch.library.opcheck(torch.ops.modmoe.dispatch_plan, (torch.randint(0, 4, (5, 2)), 3, planner))


def test_the_kernel_counts_other_ids_as_none() -> None:
    """It never looks where they point, though `dispatch_plan` refuses them."""
    if problem := cpu_problem(torch.empty(0)):
        pytest.skip(problem)
    index = torch.tensor([[2**40, 0], [-1, 1], [-(2**40), 2], [3, 1]])
    counts, offsets, order, inverse = routing_cpp.dispatch_plan(index, 2)
    assert counts.tolist() == [1, 2]
    assert offsets.tolist() == [1, 3]
    assert order.tolist() == [1, 3, 7, 0, 2, 4, 5, 6]
    assert inverse[order].tolist() == list(range(8))


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradient_of_the_compiled_kernel(renormalize: bool) -> None:
    """The kernel's gradient is a formula of its own: here against autograd."""
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    logits.data[3] = torch.tensor([-2e3, -2e3, -2e3, 0.0, -2e3])  # the chosen ones underflow, and with them their sum
    bias = torch.tensor([1.0, 0.0, 1.0, -2.0, 0.0])
    mask = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.bool)
    gates, index = route(logits, 2, token_mask=mask, selection_bias=bias, renormalize=renormalize)
    dgates = torch.randn_like(gates)
    (expected,) = torch.autograd.grad(gates, logits, dgates)
    actual = _route_backward(dgates, logits.detach(), index, mask, renormalize)
    torch.testing.assert_close(actual, expected)


@pytest.fixture
def emulated_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch in the place of the CUDA kernels, so that all that surrounds them runs."""

    def gating(
        logits: torch.Tensor,
        top_k: int,
        token_mask: torch.Tensor | None,
        selection_bias: torch.Tensor | None,
        renormalize: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"token_mask": token_mask, "selection_bias": selection_bias, "renormalize": renormalize}
        return route(logits, top_k, **options, backend="torch")

    monkeypatch.setattr(routing_cuda, "device_problem", lambda device: None)
    monkeypatch.setattr(routing_cuda, "gating", gating)


@pytest.mark.usefixtures("emulated_kernel")
def test_entry_of_the_compiled_kernel() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(9, 5, requires_grad=True), torch.rand(9) > 0.3
    torch.library.opcheck(torch.ops.modmoe.route, (logits, 2, mask, torch.randn(5), True))
    results = []
    for backend in ("torch", "cuda"):
        gates, index = route(logits, 2, token_mask=mask, renormalize=True, backend=backend)
        results.append((gates, index, *torch.autograd.grad(gates.square().sum(), logits)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_compiled_kernels_say_why_they_cannot_run() -> None:
    logits = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="route: backend 'cuda' cannot be used: it is for CUDA, .* on 'cpu'"):
        route(logits, 2, backend="cuda")
    with pytest.raises(RuntimeError, match="it has no torch.float64"):
        route(logits.double(), 2, backend="cuda")
    with pytest.raises(RuntimeError, match="does not sample, got sample_top_k=1; use 'torch'"):
        route(logits, 2, sample_top_k=1, backend="cuda")
    with pytest.raises(RuntimeError, match="dispatch_plan: backend 'cuda' cannot be used: it is for CUDA"):
        dispatch_plan(torch.zeros(4, 2, dtype=torch.int64), 3, backend="cuda")
    with pytest.raises(RuntimeError, match="at most 1024 experts, got 2000"):
        dispatch_plan(torch.zeros(4, 2, dtype=torch.int64), 2000, backend="cuda")
    with pytest.raises(ValueError, match="route has no backend 'triton', it has torch, cuda"):
        route(logits, 2, backend="triton")


def test_compiled_equals_eager() -> None:
    def run(logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, index = route(logits, 2, token_mask=mask)
        return weights, *dispatch_plan(index, logits.shape[1])

    torch.manual_seed(0)
    logits, mask = torch.randn(9, 5, requires_grad=True), torch.rand(9) > 0.3
    eager = run(logits, mask)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(logits, mask)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(result[0].square().sum(), logits)[0] for result in (eager, compiled)]
    assert torch.equal(*grads)


def test_errors_name_the_value() -> None:
    logits = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"top_k must be between 1 and the number of experts \(3\), got 4"):
        route(logits, 4)
    with pytest.raises(ValueError, match=r"sample_top_k must be between 0 and top_k \(2\), got 3"):
        route(logits, 2, sample_top_k=3)
    with pytest.raises(ValueError, match=r"\(tokens, experts\), got shape \(1, 4, 3\)"):
        route(logits[None], 2)
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        route(logits.long(), 2)
    with pytest.raises(TypeError, match="token_mask must be bool"):
        route(logits, 2, token_mask=torch.ones(4))
    with pytest.raises(ValueError, match=r"token_mask must have shape \(4,\), got \(3,\)"):
        route(logits, 2, token_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"selection_bias must have shape \(3,\), got \(4,\)"):
        route(logits, 2, selection_bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"\(tokens, top_k\), got shape \(4,\)"):
        dispatch_plan(torch.zeros(4, dtype=torch.int64), 3)
    with pytest.raises(TypeError, match="int64 or int32, got torch.float32"):
        dispatch_plan(torch.zeros(4, 2), 3)
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=rf"expert ids must be 0 to 3 \(none\), got {wrong}"):
            dispatch_plan(torch.tensor([[0, wrong], [3, 2]]), 3)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        dispatch_plan(torch.zeros(4, 2, dtype=torch.int64), 0)
