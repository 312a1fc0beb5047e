"""When experts go, and which."""

from types import SimpleNamespace

import pytest
import torch

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import PruningSection
from modmoe.training.finetuning.recovery import Recovery, is_due, share_at
from modmoe.training.monitoring.events import Events

from .conftest import MODEL


def section(**fields):
    return PruningSection(**({"keep": 0.25, "steps": 10, "every": 4} | fields))


def recovery(tmp_path, scores, model=None, **fields):
    """Of a model whose experts are all worth what `scores` says, by place."""
    model = model or ModMoEForCausalLM(ModMoEConfig(vocab_size=30, **MODEL))

    def report(step):
        return SimpleNamespace(scores=lambda metric, layer, side: torch.tensor(scores, dtype=torch.float64))

    return Recovery(section(**fields), model, None, report, Events(tmp_path / "events.jsonl"))


def test_the_share_falls_in_a_line_and_then_stays():
    due = [step for step in range(20) if is_due(section(), step)]
    assert due == [4, 8, 12]
    assert [share_at(section(), step) for step in due] == pytest.approx([0.7, 0.4, 0.25])
    assert [step for step in range(9) if is_due(section(steps=4, every=2), step)] == [2, 4]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_those_that_are_out_of_use_stay_so_even_if_the_others_are_worth_nothing(tmp_path, scope):
    plan = recovery(tmp_path, [0.0, 0.0, 0.0, 0.0], scope=scope)
    last = (1, "ffn")
    # Of equal experts the lower number stays; with this one gone before, the next must.
    plan._retire({place: [0] for place in plan.retired})
    for step in (4, 8, 12):
        plan._prune(step)
        assert all(0 in retired for retired in plan.retired.values())
    assert plan.share == 0.25
    assert len(plan.kept[last]) >= 1


def test_the_worst_go_first(tmp_path):
    plan = recovery(tmp_path, [0.3, 0.1, 0.4, 0.2])
    seen = []
    for step in (4, 8, 12):
        plan._prune(step)
        seen.append(plan.retired[0, "attn"])
    assert seen == [[1], [1, 3], [0, 1, 3]]


def test_what_cannot_be_pruned(tmp_path):
    ones = dict.fromkeys(("num_experts", "num_experts_per_tok", "num_attn_experts", "num_attn_experts_per_tok"), 1)
    dense = ModMoEForCausalLM(ModMoEConfig(vocab_size=30, **(MODEL | ones)))
    with pytest.raises(ConfigError, match="finetuning.pruning: model type 'modmoe' has no routed experts"):
        recovery(tmp_path, [], dense)
    joined = [{"name": "new", "num_experts": 1, "mode": "common"}]
    extended = ModMoEForCausalLM(ModMoEConfig(vocab_size=30, **MODEL, extensions=joined))
    with pytest.raises(ConfigError, match="finetuning.pruning: extension 'new' shares the routers"):
        recovery(tmp_path, [], extended)
    sampled = ModMoEForCausalLM(ModMoEConfig(vocab_size=30, **MODEL, sample_topk=1))
    with pytest.raises(ConfigError, match="sample_topk=1 .* 2 attn experts, and keep=0.25 may leave 1 in layer 0"):
        recovery(tmp_path, [], sampled)
    recovery(tmp_path, [], sampled, keep=0.5)
    beside = [{"name": "new", "num_experts": 1}]
    extended = ModMoEForCausalLM(ModMoEConfig(vocab_size=30, **MODEL, extensions=beside))
    for scope in ("layer", "global"):
        with pytest.raises(ConfigError, match="extension 'new' needs a model with experts, and keep=0.25 makes every"):
            recovery(tmp_path, [], extended, scope=scope)
    recovery(tmp_path, [], extended, denominator="keep")
