"""What `auto` takes on a device beside Triton: plans by sorting, products by grouped_mm. No compiler is needed."""

import pytest
import torch

from modmoe.ops import dispatch_plan, stickbreaking_attention
from modmoe.ops.grouped_linear import LAYOUTS
from tests.kernels.checks import DTYPES, EDGES, PLANS, check_all_masked, check_grouped_linear, check_route

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may add up parts of float16 products in float16."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)


@pytest.mark.parametrize("size", PLANS, ids=str)
def test_plan_is_that_of_the_cpu(size: tuple[int, int, int]) -> None:
    num_tokens, top_k, num_experts = size
    ids = torch.randint(0, num_experts + 1, (num_tokens, top_k))
    for ours, theirs in zip(dispatch_plan(ids.to(DEVICE), num_experts), dispatch_plan(ids, num_experts), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("renormalize", [False, True])
def test_route(renormalize: bool) -> None:
    logits, mask = torch.randn(500, 64, device=DEVICE) * 3, torch.rand(500, device=DEVICE) > 0.2
    check_route(logits, 8, mask, torch.randn(64, device=DEVICE), renormalize, backend="torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(75, 2, 2), (3000, 4, 16), *EDGES.values()], ids=str)
@pytest.mark.parametrize("widths", [(24, 72), (37, 13), (264, 136)], ids=str)
def test_against_float64(widths: tuple[int, int], size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_grouped_linear(size, widths, dtype, device=DEVICE, backend="torch")


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_layouts(source: str, target: str) -> None:
    check_grouped_linear((300, 3, 5), (48, 88), torch.bfloat16, source, target, device=DEVICE, backend="torch")


@pytest.mark.parametrize("target", LAYOUTS)
def test_all_tokens_masked(target: str) -> None:
    check_all_masked(target, device=DEVICE, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_without_triton(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, heads, 300, 40, device=DEVICE, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    boundaries = torch.tensor([0, 70, 300, 600], device=DEVICE)
    results = []
    for work, backend in ((dtype, "torch"), (torch.float64, "reference")):
        leaves = [x.detach().to(work).requires_grad_() for x in (q, k, v)]
        out, _ = stickbreaking_attention(*leaves, cu_seqlens=boundaries, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.double().square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        error = (ours.double() - expected).norm() / expected.norm()
        assert error <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}[dtype]
