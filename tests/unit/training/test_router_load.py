"""Load figures against hand-made loads."""

from types import SimpleNamespace

import pytest
import torch

from modmoe.models import ModMoEConfig
from modmoe.training.monitoring.router_load import RouterLoads, balance, common_experts, rank_load, routed_layers

from ..models.conftest import build


def test_an_even_load():
    figures = balance(torch.full((8,), 3.0, dtype=torch.float64))
    assert figures == {"max_violation": 0.0, "entropy": 1.0, "dead_experts": 0.0}


def test_one_expert_for_all():
    figures = balance(torch.tensor([0.0, 40.0, 0.0, 0.0], dtype=torch.float64))
    assert figures == {"max_violation": 3.0, "entropy": 0.0, "dead_experts": 3.0}


def test_no_tokens_at_all_is_finite():
    figures = balance(torch.zeros(4, dtype=torch.float64))
    assert figures == {"max_violation": 0.0, "entropy": 0.0, "dead_experts": 4.0}


def test_a_single_expert_is_evenly_loaded():
    figures = balance(torch.tensor([7.0], dtype=torch.float64))
    assert figures == {"max_violation": 0.0, "entropy": 1.0, "dead_experts": 0.0}
    assert balance(torch.zeros(1, dtype=torch.float64))["dead_experts"] == 1.0


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
    assert loads.shares({"attn": [], "ffn": [0, 2]}) == {"ffn": [[0.25, 0.75], [0.5, 0.5]]}


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


# ---- Extensions ----

GROUP = {"name": "g", "num_experts": 3, "num_experts_per_tok": 2, "num_attn_experts": 1}
FFN_ALONE = {"name": "f", "num_experts": 2}
COMMON = {"name": "c", "num_experts": 2, "num_attn_experts": 1, "mode": "common"}


@torch.no_grad()
def test_loads_of_extensions_and_who_uses_them():
    """Against a count by hand of what the routers chose, two batches together, padding left out."""
    model = build(extensions=[GROUP, FFN_ALONE, COMMON]).eval()
    ids = torch.randint(0, 97, (2, 2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids[0])
    mask[0, :5] = 0
    loads, layers = RouterLoads(), routed_layers(model.config)
    assert layers == {"attn": [0, 1], "ffn": [0, 1], "g/ffn": [0, 1], "g/attn": [0, 1], "f/ffn": [0, 1]}
    chosen = []
    for batch in ids:
        outputs = model(batch, attention_mask=mask, labels=batch, output_router_logits=True)
        loads.add(outputs)
        chosen.append(outputs.extension_router_indices)
    metrics, shares, used = loads.metrics(layers), loads.shares(layers), loads.used(layers)
    for name, side, first, size in (("g", "ffn", 0, 3), ("g", "attn", 2, 1), ("f", "ffn", 0, 2)):
        for layer in layers[f"{name}/{side}"]:
            index = torch.cat([by_name[name][first + layer] for by_name in chosen])
            expected = [int((index == expert).sum()) for expert in range(size)]
            users = int((index < size).any(-1).sum())
            assert 0 < users < 70
            assert shares[f"{name}/{side}"][layer] == pytest.approx([load / sum(expected) for load in expected])
            assert used[f"{name}/{side}"][layer] == users / 70
            prefix = f"router/{name}/{side}/layer_{layer:02d}"
            assert metrics[f"{prefix}/used"] == round(users / 70, 4)
            assert metrics[f"{prefix}/dead_experts"] == expected.count(0)
        mean = sum(used[f"{name}/{side}"]) / 2
        assert metrics[f"router/{name}/{side}/used"] == pytest.approx(mean, abs=1e-4)
    assert metrics["router/g/attn/entropy"] == 1.0  # of a single expert
    assert "router/ffn/used" not in metrics
    assert [len(share) for share in shares["ffn"]] == [6 + 2] * 2  # common ones are in the model's own routers


@torch.no_grad()
def test_an_extension_that_nobody_uses_has_finite_figures():
    model = build(extensions=[GROUP]).eval()
    for gate, _ in model.extension_pools("g"):
        gate.in_proj.bias.fill_(5.0)
        gate.weight[0] = 5.0
    loads, layers = RouterLoads(), routed_layers(model.config)
    ids = torch.arange(20)[None]
    loads.add(model(ids, labels=ids))
    metrics = loads.metrics(layers)
    assert [metrics[f"router/g/ffn/{name}"] for name in ("used", "entropy", "max_violation")] == [0, 0, 0]
    assert metrics["router/g/ffn/dead_experts"] == 2 * 3


def test_sums_of_extensions_are_scaled_merged_and_forgotten():
    one, two = (RouterLoads({"g/": [torch.tensor([2.0])]}, {"g/": [torch.tensor([2.0, 8.0])]}) for _ in range(2))
    two.scale(0.5)
    one.merge(two)
    assert one.sums["g/"][0].tolist() == [3.0]
    assert one.users["g/"][0].tolist() == [3.0, 12.0]
    assert two.used({"g/attn": [0]}) == {"g/attn": [0.25]}
    one.clear()
    assert not one.sums
    assert not one.users


def test_ranks_share_out_the_experts_of_the_model_and_none_of_its_extensions():
    config = build(extensions=[GROUP, COMMON]).config
    loads = RouterLoads()
    loads.sums = {"ffn": [torch.tensor([1.0, 1.0, 2.0, 2.0, 0.0, 0.0, 9.0, 9.0])] * 2, "g/": [torch.ones(3)] * 2}
    loads.users = {"g/": [torch.ones(2)] * 2}
    layers = {"attn": [], "ffn": [0, 1], "g/ffn": [0, 1]}
    metrics = loads.metrics(layers, 3, common_experts(config))
    assert metrics["router/ffn/rank_load"] == 2.0
    assert "router/g/ffn/rank_load" not in metrics
