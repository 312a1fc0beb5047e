"""Routing and the grouped linear map on a device's own kernels, against float64: for the emulator and for a GPU."""

import torch
from torch import Tensor

from modmoe.ops import DispatchPlan, dispatch_plan, grouped_linear, route

# Relative L2 error against float64 with the same rounded inputs.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = tuple(TOLERANCES)


def check_route(
    logits: Tensor,
    top_k: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    renormalize: bool = False,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor]:
    """Gates, ids and the gradient. Scores that differ by no more than rounding may come in either order."""
    leaf = logits.clone().requires_grad_()
    options = {"token_mask": mask, "selection_bias": bias, "renormalize": renormalize, "backend": backend}
    gates, ids = route(leaf, top_k, **options)
    assert (gates.dtype, ids.dtype) == (torch.float32, torch.int64)
    real = torch.ones(len(logits), dtype=torch.bool, device=logits.device) if mask is None else mask
    assert (gates[~real] == 0).all()
    assert (ids[~real] == logits.shape[1]).all()

    double = logits[real].double().requires_grad_()
    probs = double.softmax(-1)
    scores = probs if bias is None else probs + bias.double()
    torch.testing.assert_close(scores.gather(1, ids[real]), scores.topk(top_k).values, rtol=1e-6, atol=1e-7)
    assert all(len(set(row)) == top_k for row in ids[real].tolist())
    expected = probs.gather(1, ids[real])
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(gates[real].double(), expected, rtol=3e-6, atol=1e-30)

    weights = torch.rand_like(gates)
    (grad,) = torch.autograd.grad((gates * weights).sum(), leaf)
    (expected_grad,) = torch.autograd.grad((expected * weights[real].double()).sum(), double)
    assert (grad[~real] == 0).all()
    # Differences of gates: what is left of them has an error of their size.
    error = (grad[real].double() - expected_grad).norm()
    assert error <= 5 * TOLERANCES[logits.dtype] * max(expected_grad.norm(), gates[real].double().norm())
    return gates, ids


def check_plan(ids: Tensor, num_experts: int, expected_ids: Tensor | None = None) -> None:
    """Bit for bit what PyTorch's sort gives."""
    actual = dispatch_plan(ids, num_experts, backend="cuda")
    expected = dispatch_plan(ids if expected_ids is None else expected_ids, num_experts, backend="torch")
    for name, a, b in zip(DispatchPlan._fields, actual, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


def make_plan(num_tokens: int, top_k: int, num_experts: int, masked: float = 0.2, device: str = "cpu") -> DispatchPlan:
    """Expert 1, where there are more than top_k, is empty; some tokens have no expert."""
    chances = torch.ones(num_tokens, num_experts)
    if num_experts > top_k:
        chances[:, 1] = 0
    index = torch.multinomial(chances, top_k) if num_tokens else torch.zeros(0, top_k, dtype=torch.int64)
    index[torch.rand(num_tokens) < masked] = num_experts
    return dispatch_plan(index.to(device), num_experts)


def check_grouped_linear(
    size: tuple[int, int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    source: str = "token",
    target: str = "token",
    gated: bool = True,
    masked: float = 0.2,
    device: str = "cpu",
    backend: str = "cuda",
) -> None:
    """Result and gradients for (tokens, top_k, experts) and (in, out)."""
    torch.manual_seed(0)
    num_tokens, top_k, num_experts = size
    width_in, width_out = widths
    plan = make_plan(num_tokens, top_k, num_experts, masked, device)
    rows = {"token": num_tokens, "pair": num_tokens * top_k, "sorted": num_tokens * top_k}
    leaves = {
        "x": torch.randn(rows[source], width_in).to(device, dtype),
        "weight": (torch.randn(num_experts, width_out, width_in) / width_in**0.5).to(device, dtype),
    }
    if gated:
        leaves["gates"] = torch.rand(num_tokens, top_k).to(device)
    dy = torch.randn(rows[target], width_out).to(device, dtype)

    def run(backend: str, work: torch.dtype | None) -> dict[str, Tensor]:
        inputs = {name: leaf.to(work or leaf.dtype).clone().requires_grad_() for name, leaf in leaves.items()}
        y = grouped_linear(**inputs, plan=plan, top_k=top_k, source=source, target=target, backend=backend)
        grads = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
        return {"out": y.detach(), **dict(zip(inputs, grads, strict=True))}

    actual, expected = run(backend, None), run("reference", torch.float64)
    for name, value in actual.items():
        assert value.dtype == (torch.float32 if name == "gates" else dtype), name
        assert_near(value, expected[name], dtype, name)


def check_misaligned(device: str = "cpu", backend: str = "cuda") -> None:
    """Tensors that do not begin at a multiple of 16 bytes take the way without vectors."""
    plan = make_plan(9, 2, 3, device=device)
    x, weight, gates = (t.to(device) for t in (torch.randn(9, 8), torch.randn(3, 16, 8), torch.rand(9, 2)))
    expected = grouped_linear(x, weight, plan, top_k=2, gates=gates, backend="reference")
    shifted = torch.empty(x.numel() + 1, device=device)[1:].view_as(x).copy_(x)
    sparse = torch.empty(3, 32, 16, device=device)[:, ::2, ::2].copy_(weight)
    for rows, matrices in ((shifted, weight), (x.T.contiguous().T, weight.mT.contiguous().mT), (x, sparse)):
        actual = grouped_linear(rows, matrices, plan, top_k=2, gates=gates.T.contiguous().T, backend=backend)
        torch.testing.assert_close(actual, expected)


def check_all_masked(target: str, device: str = "cpu", backend: str = "cuda") -> None:
    """Zeros everywhere, and rows that nobody owns are never read."""
    plan = make_plan(6, 2, 3, masked=1.1, device=device)
    options = {"device": device, "dtype": torch.bfloat16}
    x = torch.full((6, 16), float("nan"), **options).requires_grad_()
    weight = torch.randn(3, 24, 16, **options).requires_grad_()
    gates = torch.rand(6, 2, device=device, requires_grad=True)
    y = grouped_linear(x, weight, plan, top_k=2, target=target, gates=gates, backend=backend)
    grads = torch.autograd.grad(y, (x, weight, gates), torch.full_like(y, float("nan")))
    for result in (y, *grads):
        assert (result == 0).all()


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    assert actual.shape == expected.shape, name
    assert actual.isfinite().all(), name
    error = (actual.double() - expected.double()).norm()
    assert error <= TOLERANCES[dtype] * expected.norm(), f"{name}: relative error {error / expected.norm()}"


# What the tests of both kinds go through.

ROUTES = [(1, 1, 1), (1, 5, 5), (3, 33, 2), (9, 64, 8), (5, 100, 100), (6, 200, 3), (2, 1024, 40)]
"""(tokens, experts, top_k)"""

PLANS = [(0, 2, 3), (1, 1, 1), (37, 3, 5), (1100, 2, 7), (700, 3, 1024)]
"""(tokens, top_k, experts): none, one, an odd number, more than a chunk of 1024 pairs, many experts"""

EDGES = {
    "no token": (0, 2, 3),
    "one token": (1, 1, 1),
    "k = E": (3, 4, 4),
    "more than 32 experts": (5, 2, 40),
}
