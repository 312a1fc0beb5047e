"""A corpus of a few kilobytes and a model of a few thousand parameters."""

import copy
import json
import random

import pytest

from modmoe.training.checkpoints.checkpoint import checkpoint_dir, mark_complete
from modmoe.training.run_config import check_run_config
from modmoe.training.yaml_config import apply_override

MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 8,
    "num_attn_experts": 4,
    "num_attn_experts_per_tok": 2,
    "intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_hidden_size": 8,
}


def save_checkpoint(output_dir, step, complete=True, blocks_per_step=4):
    """What a checkpoint is to those that only look at its files."""
    directory = checkpoint_dir(output_dir, step)
    (directory / "shards").mkdir(parents=True)
    (directory / "shards" / "weights").write_bytes(b"x" * 100)
    if complete:
        mark_complete(directory, world_size=1, blocks_per_step=blocks_per_step, seconds=0.0)
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A jsonl file of documents of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    documents = [" ".join(draw.choices(words, k=draw.randint(3, 60))) for _ in range(200)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def content(corpus, cache_dir, tmp_path):
    """What a run's YAML file would hold."""
    return {
        "model": copy.deepcopy(MODEL),
        "data": {
            "sequence_length": 16,
            "cache_dir": str(cache_dir),
            "sources": [{"name": "words", "files": [str(corpus)], "validation_fraction": 0.2}],
        },
        "tokenizer": {"vocab_size": 280},
        "optimization": {
            "steps": 6,
            "micro_batch_size": 2,
            "gradient_accumulation": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
        },
        "evaluation": {"final_blocks_per_domain": 4, "blocks_per_domain": 3},
        "checkpoint": {"interval": 3},
        "logging": {"interval": 1, "tensorboard": False},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def make_run(content):
    """Run config with overrides by dotted key."""

    def make(overrides=None):
        changed = copy.deepcopy(content)
        for key, value in (overrides or {}).items():
            apply_override(changed, key, value)
        run = check_run_config(changed)
        run.output_dir.mkdir(exist_ok=True)
        return run

    return make
