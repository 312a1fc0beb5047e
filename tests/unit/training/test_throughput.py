"""Arithmetic per token against torch's own counter, and stragglers."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modmoe.models import ModMoEConfig, ModMoEForCausalLM
from modmoe.ops import use_backend
from modmoe.training.monitoring.throughput import attention_flops_per_token, flops_per_token, peak_tflops
from modmoe.training.ranks.stragglers import Stragglers

from .conftest import MODEL


def test_flops_are_those_that_torch_counts():
    """Without routers: the reference multiplies each row with all experts."""
    one = dict.fromkeys(("num_experts", "num_experts_per_tok", "num_attn_experts", "num_attn_experts_per_tok"), 1)
    config = ModMoEConfig(vocab_size=64, **(MODEL | one | {"num_attention_heads": 4}))
    model, ids = ModMoEForCausalLM(config), torch.randint(64, (1, 32))
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # The reference multiplies all T x T pairs, of which the causal half counts.
    attention = attention_flops_per_token(config, 32)
    assert attention > 0.2 * flops_per_token(model, 32)
    assert counter.get_total_flops() / 32 == pytest.approx(flops_per_token(model, 32) + attention, rel=0.02)


def test_each_expert_of_a_token_has_heads_of_its_own():
    config = ModMoEConfig(**MODEL)  # 2 layers, 2 of 4 experts, 1 head of width 8
    assert attention_flops_per_token(config, 100) == 3 * (2 * 2 * 8 * 50) * 2 * 2


def test_extensions_of_a_softmax_model_read_documents_with_one_more_head():
    extension = {"name": "new", "num_experts": 2}
    for attention_type, heads in (("stickbreaking", 2), ("softmax", 3)):
        config = ModMoEConfig(**MODEL, attention_type=attention_type, extensions=[extension])
        assert attention_flops_per_token(config, 100) == 3 * (2 * 2 * 8 * 50) * 2 * heads


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_tflops(name) == peak


def test_the_slowest_rank_is_named(monkeypatch):
    blocks = torch.nn.Linear(2, 2)
    stragglers = Stragglers(blocks, ranks=4)
    stragglers.add_data_time(1.0)
    blocks(torch.ones(2))
    blocks.eval()
    monkeypatch.setattr(time, "perf_counter", lambda: 1 / 0)  # evaluations are not timed
    blocks(torch.ones(2))

    def all_gather(everyone, own):
        for rank, tensor in enumerate(everyone):
            tensor.copy_(own * (3 if rank == 2 else 1))

    monkeypatch.setattr("modmoe.training.ranks.stragglers.dist.get_world_size", lambda: 4)
    monkeypatch.setattr("modmoe.training.ranks.stragglers.dist.all_gather", all_gather)
    metrics = stragglers.metrics(2, torch.device("cpu"))
    assert (metrics["rank/slowest"], metrics["rank/slowest_over_median"]) == (2, 3.0)
    assert metrics["rank/own_seconds_per_step"] == pytest.approx(0.5, abs=0.1)


def test_a_single_rank_times_nothing(monkeypatch):
    """On a GPU each forward pass would leave two events behind, for ever."""
    monkeypatch.setattr(time, "perf_counter", lambda: 1 / 0)
    blocks = torch.nn.Linear(2, 2)
    Stragglers(blocks, ranks=1)
    blocks(torch.ones(2))
