"""The null choice, and choices that several pools share."""

import pytest
import torch

from modmoe.layers.added_experts import decline, own_choices
from modmoe.layers.router import ROUTERS, RouterOutput


def test_experts_behind_null_are_not_used():
    index = torch.tensor([[0, 2], [3, 0], [1, 3], [4, 4]])  # the last token is not routed
    gates = torch.tensor([[0.6, 0.3], [0.5, 0.4], [0.7, 0.2], [0.0, 0.0]])
    logits = torch.randn(4, 4)
    routing = decline(RouterOutput(logits, gates, index))
    assert routing.top_k_index.tolist() == [[3, 3], [2, 3], [0, 2], [3, 3]]
    assert routing.top_k_weights.tolist() == [[0.0, 0.0], [0.5, 0.0], pytest.approx([0.7, 0.2]), [0.0, 0.0]]
    assert routing.logits.equal(logits)


def test_what_null_is_given_the_experts_lack():
    torch.manual_seed(0)
    router = ROUTERS["linear"](8, 0, 4, 3)
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(50, 8)
    routing = decline(router(hidden))
    shares = router(hidden).logits.softmax(-1)
    used = routing.top_k_index < 3
    assert used.any()
    assert not used.all()
    assert routing.top_k_weights[used].equal(shares[:, 1:].gather(1, routing.top_k_index.clamp(max=2))[used])


def test_choices_of_pools_in_a_row():
    index = torch.tensor([[0, 4], [5, 2], [6, 6]])  # pools of 3 and 3, 6 is none
    assert own_choices(index, 0, 3).tolist() == [[0, 3], [3, 2], [3, 3]]
    assert own_choices(index, 3, 3).tolist() == [[3, 1], [2, 3], [3, 3]]


@pytest.mark.parametrize("kind", ROUTERS)
def test_more_rows_are_rows_of_a_larger_router(kind):
    torch.manual_seed(0)
    large = ROUTERS[kind](8, 6, 5, 2)
    small = ROUTERS[kind](8, 6, 3, 2)
    torch.nn.init.normal_(large.weight)
    small.load_state_dict({**large.state_dict(), "weight": large.weight[:3]})
    hidden = torch.randn(20, 8)
    expected, found = large(hidden), small(hidden, None, [large.weight[3:4], large.weight[4:]])
    assert all(a.equal(b) for a, b in zip(expected, found, strict=True))
