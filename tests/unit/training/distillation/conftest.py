"""A toy teacher, and one distillation from beginning to end that tests look at and make copies of."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modmoe.data import train_bpe
from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.run import distill
from modmoe.training.run_config import check_run_config
from modmoe.training.yaml_config import apply_override
from tests.launching import ROOT

SCRIPT = ROOT / "train" / "distill.py"
VOCABULARY = 280
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
STUDENT = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 8,
    "num_attn_experts": 2,
    "num_attn_experts_per_tok": 1,
    "intermediate_size": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_type": "linear",
    "norm_type": "rmsnorm",
    "gated_ffn": True,
    # Random numbers in every step: parallel and resumed training must draw the same.
    "sample_topk": 1,
}


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def texts(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, texts):
    """A directory with a dense model and its tokenizer."""
    directory = tmp_path_factory.mktemp("teacher")
    tokenizer = train_bpe(iter(texts), VOCABULARY)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, initializer_range=0.2, **SIZES)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def settings(corpus, cache_dir, teacher):
    """What a distillation's YAML file would hold."""
    return {
        "teacher": str(teacher),
        "model": STUDENT,
        "data": {
            "sequence_length": 16,
            "cache_dir": str(cache_dir),
            "sources": [{"name": "words", "files": [str(corpus)], "validation_fraction": 0.2}],
        },
        "optimization": {
            "steps": 4,
            "micro_batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
        },
        "distillation": {
            "stages": {"count": 2},
            # A teacher that knows nothing makes no better hybrids.
            "hybrids": {"blocks_per_domain": 4, "force": True},
            "meta": {"method": "fit", "optimization": {"steps": 3}},
            "initialization": {"ffn": "cluster"},
        },
        "finetuning": {"teacher": {"weight": 0.5}},
        "evaluation": {"interval": 2, "at_start": True, "final_blocks_per_domain": 4, "blocks_per_domain": 4},
        "checkpoint": {"interval": 2},
        "logging": {"interval": 1, "tensorboard": False},
    }


@pytest.fixture(scope="session")
def make(settings):
    """A distillation into a directory, with overrides by dotted key."""

    def make(output_dir: Path, overrides: dict | None = None) -> DistillRun:
        content = copy.deepcopy(settings) | {"output_dir": str(output_dir)}
        for key, value in (overrides or {}).items():
            apply_override(content, key, value)
        return check_run_config(content, DistillRun)

    return make


@pytest.fixture(scope="session")
def finished(make, tmp_path_factory):
    """The output directory of a distillation that has gone through all phases, in this process; not to be changed."""
    output_dir = tmp_path_factory.mktemp("distilled") / "out"
    assert distill(make(output_dir), SCRIPT) == 0
    return output_dir


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy in which the meta model is ready and no pair has begun."""
    ignored = shutil.ignore_patterns("stages", "student", "finetuned", "checkpoint-*")
    out = shutil.copytree(finished, tmp_path / "out", ignore=ignored)
    (out / "results.json").unlink()
    return out
