"""The CUDA kernels of routing, run by the emulator."""

import pytest
import torch

from modmoe.ops import route

from .checks import DTYPES, PLANS, ROUTES, check_plan, check_route
from .emulated import Emulator


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", ROUTES, ids=str)
def test_route(size: tuple[int, int, int], biased: bool, renormalize: bool, emulator: Emulator) -> None:
    num_tokens, num_experts, top_k = size
    torch.manual_seed(0)
    logits = torch.randn(num_tokens, num_experts) * 3
    with emulator.running(schedule=2):
        check_route(logits, top_k, bias=torch.randn(num_experts) if biased else None, renormalize=renormalize)


def test_rows_with_a_bias_of_minus_infinity_are_never_chosen(emulator: Emulator) -> None:
    logits = torch.randn(6, 40) * 3
    bias = torch.full((40,), -torch.inf)
    bias[[3, 7, 31, 39]] = torch.tensor([0.0, -0.5, 0.2, 0.0])
    with emulator.running():
        _, ids = check_route(logits, 4, bias=bias)
    assert ids.sort(-1).values.tolist() == [[3, 7, 31, 39]] * 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_route_dtypes(dtype: torch.dtype, emulator: Emulator) -> None:
    with emulator.running():
        check_route(torch.randn(6, 40).to(dtype), 3, renormalize=True)


def test_no_tokens(emulator: Emulator) -> None:
    with emulator.running():
        gates, ids = route(torch.zeros(0, 4), 2, backend="cuda")
    assert gates.shape == ids.shape == (0, 2)


def test_masked_tokens_take_no_slot(emulator: Emulator) -> None:
    logits = torch.randn(5, 7)
    logits[1] = float("nan")  # never read, but by the gradient's formula
    mask = torch.tensor([True, False, True, False, False])
    with emulator.running():
        gates, ids = route(logits, 3, token_mask=mask, backend="cuda")
        assert gates[~mask].abs().max() == 0
        assert (ids[~mask] == 7).all()
        check_route(logits.nan_to_num(), 3, mask=mask)
        check_route(logits.nan_to_num(), 3, mask=torch.zeros_like(mask))


def test_non_contiguous(emulator: Emulator) -> None:
    logits, mask = torch.randn(7, 5).T, torch.tensor([True, False] * 5)[::2]
    with emulator.running():
        check_route(logits, 2, mask=mask, bias=torch.randn(14)[::2])


def test_ties_go_to_the_lowest_id(emulator: Emulator) -> None:
    logits = torch.zeros(2, 70)
    logits[:, [65, 3, 40]] = 1.0
    with emulator.running():
        _, ids = route(logits, 6, backend="cuda")
    assert ids.tolist() == [[3, 40, 65, 0, 1, 2]] * 2


def test_extreme_logits(emulator: Emulator) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, 88.0], [-3e38, -3e38, -3e38, -3e38], [0.0, -float("inf"), 5.0, 5.0]])
    with emulator.running():
        gates, ids = check_route(logits, 4, renormalize=True)
        assert ids[0].tolist() == [0, 1, 2, 3]
        assert gates[0].tolist() == [1.0, 0.0, 0.0, 0.0]
        _, ids = route(torch.tensor([[0.0, float("nan"), 1.0]]), 3, backend="cuda")
        assert ids.tolist() == [[0, 1, 2]]  # in range even then


def test_a_bias_can_choose_what_underflows(emulator: Emulator) -> None:
    bias = torch.tensor([-float("inf"), 1.0, 2.0])
    with emulator.running():
        gates, ids = route(torch.tensor([[200.0, 0.0, 0.0]]), 2, selection_bias=bias, renormalize=True, backend="cuda")
    assert ids.tolist() == [[2, 1]]
    assert gates.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", PLANS, ids=str)
def test_plan(size: tuple[int, int, int], dtype: torch.dtype, schedule: int, emulator: Emulator) -> None:
    num_tokens, top_k, num_experts = size
    torch.manual_seed(0)
    with emulator.running(schedule=schedule):
        check_plan(torch.randint(0, num_experts + 1, (num_tokens, top_k), dtype=dtype), num_experts)


@pytest.mark.parametrize("expert", [0, 2, 3])
def test_plan_for_one_expert(expert: int, emulator: Emulator) -> None:
    """All pairs to the first, to the last, and to none (all tokens masked)."""
    with emulator.running(schedule=3):
        check_plan(torch.full((1030, 1), expert), 3)


def test_ids_out_of_range_count_as_no_expert(emulator: Emulator) -> None:
    wrong, right = torch.tensor([[0, 7], [-1, 2], [2**40, 1]]), torch.tensor([[0, 3], [3, 2], [3, 1]])
    with emulator.running():
        check_plan(wrong, 3, expected_ids=right)


def test_what_the_kernels_refuse(emulator: Emulator) -> None:
    """The raw ops check for themselves: Python may change."""
    ops, logits = torch.ops.modmoe_cuda, torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"top_k must be between 1 and the number of experts \(3\), got 4"):
        ops.gating(logits, 4, None, None, False)
    with pytest.raises(RuntimeError, match="must be float32, float16 or bfloat16, got Double"):
        ops.gating(logits.double(), 2, None, None, False)
    with pytest.raises(RuntimeError, match="number of experts must be between 1 and 1024, got 1025"):
        ops.gating(torch.randn(1, 1025), 2, None, None, False)
    with pytest.raises(RuntimeError, match="token_mask must have size 4 in dimension 0, got 3"):
        ops.gating(logits, 2, torch.ones(3, dtype=torch.bool), None, False)
    with pytest.raises(RuntimeError, match="logits must be contiguous"):
        ops.gating(logits.T, 2, None, None, False)
    with pytest.raises(RuntimeError, match="on a CUDA device"):
        ops.gating(logits.to("meta"), 2, None, None, False)
    with pytest.raises(RuntimeError, match="int64 or int32, got Float"):
        ops.dispatch_plan(logits, 3)
