"""Which experts stay."""

import pytest
import torch

from modmoe.surgery.prune_plan import plan_pruning


def scores(**pools: list[float]) -> dict:
    """`attn0=[...]` -> {(0, "attn"): tensor}"""
    return {(int(name[-1]), name[:-1]): torch.tensor(values, dtype=torch.float64) for name, values in pools.items()}


TWO = scores(ffn0=[0.1, 0.4, 0.2, 0.3], ffn1=[0.25, 0.25, 0.0, 0.5])


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"keep": 0.5}, [[1, 3], [0, 3]]),
        ({"keep": 0.51}, [[1, 2, 3], [0, 1, 3]]),
        ({"keep": 1.0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"keep": 1e-6}, [[1], [3]]),
        ({"keep_experts": 3}, [[1, 2, 3], [0, 1, 3]]),
        ({"threshold": 0.25}, [[1, 3], [0, 1, 3]]),
        ({"threshold": 0.0}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ({"threshold": 1.1, "scope": "global"}, [[1, 3], [3]]),
        # Normalised: 0.4 1.6 0.8 1.2 and 1 1 0 2.
        ({"keep": 0.5, "scope": "global"}, [[1, 3], [0, 3]]),
        ({"keep": 0.75, "scope": "global"}, [[1, 2, 3], [0, 1, 3]]),
        ({"keep_experts": 1, "scope": "global"}, [[1], [3]]),
        ({"keep": 0.1, "scope": "global"}, [[1], [3]]),  # one of eight would be enough
    ],
)
def test_the_best_stay(wish, expected):
    assert list(plan_pruning(TWO, **wish).values()) == expected


def test_a_fraction_is_not_rounded_up_by_a_rounding_error():
    pools = {(0, "ffn"): torch.arange(100.0)}
    assert len(plan_pruning(pools, keep=0.07)[0, "ffn"]) == 7


def test_layers_are_compared_by_their_normalised_scores():
    """The first layer's scores are a hundred times as high, and every expert of it is as good as the others."""
    pools = scores(ffn0=[100.0, 100.0, 100.0, 100.0], ffn1=[0.1, 0.2, 3.6, 0.1])
    assert plan_pruning(pools, keep=0.625, scope="global") == {(0, "ffn"): [0, 1, 2, 3], (1, "ffn"): [2]}


def test_every_layer_keeps_one_even_where_none_was_used():
    pools = scores(ffn0=[0.0, 0.0], ffn1=[1.0, 1.0])
    assert plan_pruning(pools, keep=0.5, scope="global") == {(0, "ffn"): [0], (1, "ffn"): [0]}


def test_sides_do_not_compete():
    pools = scores(attn0=[1.0, 0.0], ffn0=[0.6, 0.5, 0.7, 0.5], attn1=[0.9, 0.8])
    plan = plan_pruning(pools, keep=0.5, scope="global")
    assert plan == {(0, "attn"): [0], (0, "ffn"): [0, 2], (1, "attn"): [0]}


def test_a_pool_with_fewer_experts_keeps_all():
    pools = scores(attn0=[1.0, 2.0], ffn0=[1.0, 2.0, 3.0])
    assert plan_pruning(pools, keep_experts=3) == {(0, "attn"): [0, 1], (0, "ffn"): [0, 1, 2]}


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({}, "exactly one"),
        ({"keep": 0.5, "threshold": 1.0}, "exactly one of keep=0.5, keep_experts=None and threshold=1.0"),
        ({"keep": 0.0}, "keep=0.0 is not a fraction"),
        ({"keep": 1.5}, "keep=1.5 is not a fraction"),
        ({"keep": float("nan")}, "keep=nan is not a fraction"),
        ({"keep_experts": 0}, "keep_experts=0 would remove everything: give at least 1"),
        ({"keep_experts": 5}, "keep_experts=5 is more than any pool has: give 1 to 4"),
        ({"threshold": 0.45}, "threshold=0.45 would remove every ffn expert of layer 0, whose best scores 0.4: give"),
        ({"threshold": 1.7, "scope": "global"}, "layer 0, whose best scores 1.6 times the mean"),
        ({"threshold": float("nan")}, "threshold=nan would remove"),
        ({"keep": 0.5, "scope": "model"}, "scope 'model' is not one of layer, global"),
    ],
)
def test_impossible_wishes_are_named(wish, message):
    with pytest.raises(ValueError, match=message):
        plan_pruning(TWO, **wish)
