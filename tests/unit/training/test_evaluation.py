"""Validation scores against sums over single blocks."""

import contextlib
import math

import pytest
import torch

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.data import DomainStatistics, SplitStatistics
from modmoe.training import evaluation
from modmoe.training.evaluation import evaluate_domains
from tests.launching import run_ranks

from .conftest import MODEL


def made_model():
    torch.manual_seed(0)
    return ModMoEForCausalLM(ModMoEConfig(vocab_size=50, initializer_range=0.3, **MODEL)).train()


def made_blocks():
    """Blocks with different numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(5):
        ids = torch.randint(0, 50, (12,), generator=generator)
        labels = ids.clone()
        labels[: 2 * index] = -100
        made.append({"input_ids": ids.numpy(), "position_ids": torch.arange(12).numpy(), "labels": labels.numpy()})
    return made


@pytest.fixture(scope="module")
def model():
    return made_model()


@pytest.fixture(scope="module")
def blocks():
    return made_blocks()


STATISTICS = {"d": DomainStatistics(None, SplitStatistics(1, text_bytes=300, tokens=100), 5.0, 2.0)}


def score(model, blocks, **changes):
    options = {"max_blocks": 5, "batch_size": 2, "device": torch.device("cpu"), "autocast": contextlib.nullcontext}
    return evaluate_domains(model, {"d": blocks}, STATISTICS, **(options | changes))["d"]


def test_the_mean_is_over_tokens_whatever_the_batches(model, blocks):
    total, count = 0.0, 0
    with torch.no_grad():
        for block in blocks:
            ids, labels = (torch.from_numpy(block[key])[None] for key in ("input_ids", "labels"))
            log_p = model(input_ids=ids).logits.log_softmax(-1)
            for position in range(11):
                if labels[0, position + 1] != -100:
                    total -= float(log_p[0, position, labels[0, position + 1]])
                    count += 1
    result = score(model, blocks)
    assert result.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / count / math.log(2) / 3, rel=1e-5)
    assert score(model, blocks, batch_size=5).nats_per_token == pytest.approx(total / count, rel=1e-5)


def test_batches_in_which_nothing_is_to_be_predicted_count_for_nothing(model, blocks):
    silent = {**blocks[0], "labels": blocks[0]["labels"] * 0 - 100}
    alone = score(model, blocks[:1]).nats_per_token
    assert score(model, [blocks[0], silent], batch_size=1).nats_per_token == alone


def test_loads_count_every_token_once(model, blocks):
    loads = score(model, blocks).loads.sums
    assert [load.sum().item() for side in ("attn", "ffn") for load in loads[side]] == [5 * 12 * 2] * 4


def test_it_leaves_the_mode_and_stops_at_max_blocks(model, blocks):
    result = score(model, blocks, max_blocks=3)
    assert model.training
    assert result.loads.sums["ffn"][0].sum() == 3 * 12 * 2


def test_a_part_is_taken_evenly_from_the_whole_split(model, blocks):
    """Bytes per token and compressed sizes are those of the whole: its first blocks may be of another kind."""
    part = score(model, blocks, max_blocks=3).nats_per_token
    assert part == score(model, [blocks[i] for i in (0, 1, 3)]).nats_per_token


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_run_equally_often_and_share_all_batches(monkeypatch, world):
    shares = []
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(evaluation.dist, "get_rank", lambda rank=rank: rank)
        shares.append(evaluation._share(9, 2))
    assert len({len(share) for share in shares}) == 1
    assert sorted(start for share in shares for start, mine in share if mine) == [0, 2, 4, 6, 8]


def score_on_ranks(max_blocks):
    result = score(made_model(), made_blocks(), max_blocks=max_blocks)
    return result.nats_per_token, [load.sum().item() for load in result.loads.sums["ffn"]]


def test_a_rank_without_a_batch_of_its_own_gets_the_same_result(model, blocks):
    alone = score(model, blocks, max_blocks=2)  # one batch for two ranks
    for nats, loads in run_ranks(score_on_ranks, 2, 2):
        assert nats == pytest.approx(alone.nats_per_token, rel=1e-9)
        assert loads == [2 * 12 * 2] * 2
