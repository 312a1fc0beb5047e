"""The CUDA kernels of routing on a device: the checks that the emulator also runs, and larger sizes."""

import pytest
import torch

from modmoe.ops import dispatch_plan, route
from tests.kernels.checks import DTYPES, PLANS, ROUTES, check_plan, check_route

from .cuda_kernels import require_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def kernels() -> None:
    require_kernels()
    torch.manual_seed(0)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*ROUTES, (5000, 128, 8)], ids=str)
def test_route(size: tuple[int, int, int], dtype: torch.dtype, biased: bool, renormalize: bool) -> None:
    num_tokens, num_experts, top_k = size
    logits = (torch.randn(num_tokens, num_experts, device="cuda") * 3).to(dtype)
    bias = torch.randn(num_experts, device="cuda") if biased else None
    check_route(logits, top_k, torch.rand(num_tokens, device="cuda") > 0.2, bias, renormalize)


def test_no_tokens_and_ties() -> None:
    gates, ids = route(torch.zeros(0, 4, device="cuda"), 2, backend="cuda")
    assert gates.shape == ids.shape == (0, 2)
    _, ids = route(torch.zeros(3, 70, device="cuda"), 4, backend="cuda")
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", [*PLANS, (32768, 8, 128)], ids=str)
def test_plan(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, top_k, num_experts = size
    check_plan(torch.randint(0, num_experts + 1, (num_tokens, top_k), dtype=dtype, device="cuda"), num_experts)


def test_ids_out_of_range_count_as_no_expert() -> None:
    wrong, right = torch.tensor([[0, 7], [-1, 2], [2**40, 1]]), torch.tensor([[0, 3], [3, 2], [3, 1]])
    check_plan(wrong.cuda(), 3, expected_ids=right.cuda())


def test_nothing_waits_for_the_device() -> None:
    logits = torch.randn(64, 8, device="cuda")
    route(logits, 2, backend="cuda")  # built and loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, ids = route(logits, 2, backend="cuda")
        dispatch_plan(ids, 8, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_graph_and_on_another_stream() -> None:
    logits = torch.randn(64, 8, device="cuda")
    expected = dispatch_plan(route(logits, 2, backend="cuda").top_k_index, 8, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = dispatch_plan(route(logits, 2, backend="cuda").top_k_index, 8, backend="cuda")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
