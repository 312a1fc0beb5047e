"""Routers compute in fp32 whatever the model does, and keep nothing between calls."""

import pytest
import torch

from modmoe.layers.router import ROUTERS


def make(kind: str, **options):
    torch.manual_seed(0)
    router = ROUTERS[kind](16, 12, 6, 2, **options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


@pytest.mark.parametrize("kind", ROUTERS)
def test_scores_are_fp32_under_bf16(kind):
    router, x = make(kind), torch.randn(40, 16).bfloat16()
    exact = router(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = router(x)
    assert autocast.logits.dtype == torch.float32
    assert torch.equal(autocast.logits, exact.logits)
    assert router.bfloat16()(x).logits.dtype == torch.float32


@pytest.mark.parametrize("kind", ROUTERS)
def test_gates_are_probabilities_of_all_experts(kind):
    out = make(kind)(torch.randn(40, 16))
    expected = out.logits.softmax(-1).topk(2)
    assert torch.equal(out.top_k_index, expected.indices)
    torch.testing.assert_close(out.top_k_weights, expected.values)
    renormalised = make(kind, renormalize=True)(torch.randn(40, 16))
    torch.testing.assert_close(renormalised.top_k_weights.sum(-1), torch.ones(40))


@pytest.mark.parametrize("kind", ROUTERS)
def test_unit_gates_are_one_with_the_gradient_of_log_probabilities(kind):
    router, x = make(kind, unit_gates=True), torch.randn(40, 16)
    mask = torch.arange(40) != 3
    out = router(x * 100, mask)
    assert torch.equal(out.top_k_weights, mask[:, None].expand(40, 2).float())
    factors = torch.randn(40, 2)
    (ours,) = torch.autograd.grad((out.top_k_weights * factors).sum(), router.weight)
    out = router(x * 100)
    chosen = out.logits.log_softmax(-1).gather(1, out.top_k_index)
    (expected,) = torch.autograd.grad((chosen * factors * mask[:, None]).sum(), router.weight)
    assert expected.any()
    torch.testing.assert_close(ours, expected)


def test_selection_bias_changes_the_choice_and_not_the_gate():
    router, x = make("linear", selection_bias=True), torch.randn(40, 16)
    router.selection_bias[5] = 10.0
    out = router(x)
    assert (out.top_k_index == 5).any(-1).all()
    torch.testing.assert_close(out.top_k_weights, out.logits.softmax(-1).gather(1, out.top_k_index))


def test_masked_tokens_go_nowhere():
    mask = torch.arange(40) % 3 != 0
    out = make("mlp")(torch.randn(40, 16), mask)
    assert (out.top_k_index[~mask] == 6).all()
    assert (out.top_k_weights[~mask] == 0).all()
    assert (out.top_k_index[mask] < 6).all()


def test_gmm_is_bounded_by_its_temperature():
    out = make("gmm")(100 * torch.randn(40, 16))
    router = make("gmm")
    assert out.logits.abs().max() <= router.log_temperature.exp().item() * (1 + 1e-5)


@pytest.mark.parametrize("sampled", [0, 1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ROUTERS)
def test_rows_of_pruned_experts_count_in_the_softmax_and_are_never_chosen(kind, biased, sampled):
    options = {"renormalize": False, "selection_bias": biased}
    whole = make(kind, **options)
    torch.manual_seed(0)
    router = ROUTERS[kind](16, 12, 4, 2, num_pruned=2, sample_top_k=sampled, **options)
    state = whole.state_dict() | {"expert_rows": torch.tensor([0, 2, 3, 5])}
    if biased:
        state["selection_bias"] = torch.tensor([0.0, 0.3, 0.0, 0.1])
    router.load_state_dict(state)
    x, mask = torch.randn(40, 16), torch.arange(40) % 7 != 0
    full, out = whole(x), router(x, mask)
    probs = full.logits.softmax(-1)[:, [0, 2, 3, 5]]
    assert torch.equal(out.logits, full.logits[:, [0, 2, 3, 5]])
    assert (out.top_k_index[~mask] == 4).all()
    assert (out.top_k_index[mask] < 4).all()
    assert torch.equal(out.top_k_weights[mask], probs[mask].gather(1, out.top_k_index[mask]))
    assert all(len(set(pair)) == 2 for pair in out.top_k_index[mask].tolist())
    if not sampled:
        best = (probs + state["selection_bias"] if biased else probs).topk(2).indices
        assert torch.equal(out.top_k_index[mask], best[mask])
    out.top_k_weights.sum().backward()
    assert router.weight.grad.abs().sum(1).gt(0).all()
