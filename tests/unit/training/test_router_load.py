"""Load figures against hand-made loads."""

from types import SimpleNamespace

import pytest
import torch

from modmoe.models import ModMoEConfig
from modmoe.training.monitoring.router_load import RouterLoads, balance, rank_load, routed_layers


def test_an_even_load():
    figures = balance(torch.full((8,), 3.0, dtype=torch.float64))
    assert figures == {"max_violation": 0.0, "entropy": 1.0, "dead_experts": 0.0}


def test_one_expert_for_all():
    figures = balance(torch.tensor([0.0, 40.0, 0.0, 0.0], dtype=torch.float64))
    assert figures == {"max_violation": 3.0, "entropy": 0.0, "dead_experts": 3.0}


def test_no_tokens_at_all_is_finite():
    assert balance(torch.zeros(4, dtype=torch.float64))["entropy"] == 0.0


def outputs(ffn, attn=None):
    return SimpleNamespace(
        tokens_per_expert=tuple(torch.tensor(load) for load in ffn),
        attn_tokens_per_expert=attn and tuple(torch.tensor(load) for load in attn),
    )


def test_sums_and_summary_over_layers():
    loads = RouterLoads()
    loads.add(outputs([[1.0, 3.0], [2.0, 2.0]]))
    loads.add(outputs([[1.0, 3.0], [2.0, 2.0]]))
    metrics = loads.metrics({"attn": [], "ffn": [0, 2]})
    assert metrics["router/ffn/layer_00/max_violation"] == 0.5
    assert metrics["router/ffn/layer_02/max_violation"] == 0.0
    assert metrics["router/ffn/max_violation"] == 0.5
    assert metrics["router/ffn/dead_experts"] == 0.0
    assert metrics["router/ffn/entropy"] == pytest.approx((0.8113 + 1) / 2, abs=1e-4)
    assert loads.shares() == {"ffn": [[0.25, 0.75], [0.5, 0.5]]}


def test_counts_beyond_fp32_are_exact():
    loads = RouterLoads()
    loads.add(outputs([[2.0**24, 1.0]]))
    loads.add(outputs([[1.0, 0.0]]))
    assert loads.sums["ffn"][0].tolist() == [2.0**24 + 1, 1.0]


def test_dense_models_have_no_figures():
    loads = RouterLoads()
    loads.add(outputs([], None))
    assert loads.metrics({"attn": [], "ffn": []}) == {}


def test_layers_without_router_are_left_out():
    config = ModMoEConfig(num_hidden_layers=3, num_experts=[4, 1, 4], num_attn_experts=1)
    assert routed_layers(config) == {"attn": [], "ffn": [0, 2]}
    config.num_pruned_experts = [0, 3, 0]  # a single expert, whose gate is its share of the softmax
    assert routed_layers(config) == {"attn": [], "ffn": [0, 1, 2]}


def test_the_load_of_the_busiest_rank():
    load = torch.tensor([1.0, 1.0, 5.0, 1.0], dtype=torch.float64)
    assert rank_load(load, 2) == 1.5
    assert rank_load(load, 4) == 2.5
    assert rank_load(torch.zeros(4, dtype=torch.float64), 2) == 0.0
    loads = RouterLoads()
    loads.sums = {"ffn": [load, torch.ones(4, dtype=torch.float64)]}
    assert loads.metrics({"ffn": [0, 1]}, expert_parallel_size=2)["router/ffn/rank_load"] == 1.5
    assert "router/ffn/rank_load" not in loads.metrics({"ffn": [0, 1]})
