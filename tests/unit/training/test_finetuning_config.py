"""The section `finetuning`: what is accepted, and one clear sentence for each mistake."""

import copy

import pytest

from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import FinetuningRun
from modmoe.training.run_config import RunConfig, check_run_config, describe_keys
from modmoe.training.yaml_config import apply_override


@pytest.fixture
def tuned(content):
    """A fine-tuning run's content, with overrides by dotted key."""
    content = {name: value for name, value in content.items() if name not in ("model", "tokenizer")}

    def make(overrides=None):
        changed = copy.deepcopy(content) | {"init": "some/model"}
        for key, value in (overrides or {}).items():
            apply_override(changed, key, value)
        return check_run_config(changed, FinetuningRun)

    return make


def test_a_run_that_starts_from_a_model_keeps_its_tokenizer(tuned, content):
    assert tuned().tokenizer.name == "some/model"
    assert tuned({"tokenizer.name": "another"}).tokenizer.name == "another"
    del content["tokenizer"]
    assert check_run_config(content | {"init": "some/model"}).tokenizer.name == "some/model"
    with pytest.raises(ConfigError, match="^tokenizer is required$"):
        check_run_config(content)


def test_a_resolved_config_reads_back_as_itself(tuned):
    run = tuned({"finetuning.pruning": {"keep": 0.5, "steps": 3}, "finetuning.router_loss.coefficient": 0.1})
    assert run.finetuning.router_loss.type == "concentration"
    assert check_run_config(run.model_dump(mode="json"), FinetuningRun) == run


def test_help_lists_the_keys_of_sections_that_may_be_absent():
    text = describe_keys(FinetuningRun)
    assert "--finetuning.router_loss [None]: The routers' loss" in text
    assert "--finetuning.lora.rank [16]: Rank of each adapter" in text
    assert "--finetuning.pruning.keep: Share of the experts" in text
    assert "finetuning" not in describe_keys(RunConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"finetuning.method": "all"},
            "finetuning.method: input should be 'full', 'experts', 'routers', 'lora' or 'ext",
        ),
        ({"finetuning.metod": "lora"}, "unknown key finetuning.metod; did you mean finetuning.method?"),
        ({"finetuning.lora.rnk": 3}, "unknown key finetuning.lora.rnk; did you mean finetuning.lora.rank?"),
        ({"finetuning.lora.rank": 3}, "finetuning: lora is given with method 'full': set method to 'lora', or remove"),
        ({"finetuning.method": "extension"}, r"finetuning: extensions=\[\] with method 'extension': name extensions"),
        ({"finetuning.extensions": ["c"]}, r"finetuning: extensions=\['c'\] with method 'full'"),
        ({"finetuning.pruning": {"keep": 1.5, "steps": 3}}, "finetuning.pruning.keep: .* less than 1, got 1.5"),
        ({"finetuning.pruning": {"keep": 0.5, "steps": 6}}, "pruning.steps=6 leaves none of the run's 6 steps"),
        (
            {"finetuning.pruning": {"keep": 0.5, "steps": 3}, "finetuning.method": "lora"},
            "finetuning: pruning with method 'lora' is not possible",
        ),
        (
            {"finetuning.pruning": {"keep": 0.5, "steps": 3}, "deepspeed": {"zero_optimization": {"stage": 3}}},
            "finetuning.pruning needs whole experts in each process",
        ),
        (
            {"finetuning.method": "lora", "deepspeed": {"zero_optimization": {"stage": 1}}, "expert_parallel_size": 2},
            "method 'lora' and expert_parallel_size=2 exclude each other",
        ),
        ({"init": None}, "init must be a path"),
    ],
)
def test_mistakes(tuned, changes, message):
    with pytest.raises(ConfigError, match=message):
        tuned(changes)


def test_a_missing_init(content):
    with pytest.raises(ConfigError, match="^init is required$"):
        check_run_config(content, FinetuningRun)
