"""`train/distill.py` as users start it."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.data import train_bpe
from tests.launching import ROOT, deepspeed_command

pytest.importorskip("deepspeed")
pytest.importorskip("matplotlib")

SCRIPT = ROOT / "train" / "distill.py"
CONFIG = ROOT / "configs" / "distill" / "tiny_test.yaml"


@pytest.fixture(scope="module")
def teacher(workspace):
    """A dense model of our own, as train/pretrain.py leaves it."""
    text = (ROOT / "modmoe" / "training" / "trainer.py").read_text()
    tokenizer = train_bpe(iter([text]), 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    dense = {"num_experts": 1, "num_attn_experts": 1, "attention_type": "softmax", "gated_ffn": True}
    config = ModMoEConfig(vocab_size=len(tokenizer), eos_token_id=0, norm_type="rmsnorm", **sizes, **dense)
    ModMoEForCausalLM(config).save_pretrained(workspace / "teacher")
    tokenizer.save_pretrained(workspace / "teacher")
    return workspace / "teacher"


@pytest.fixture(scope="module")
def distill(start, teacher, workspace):
    """Start a distillation into its own output directory."""

    def distill(name, *arguments, processes=None):
        prefix = [sys.executable] if processes is None else deepspeed_command(processes)
        places = ["--teacher", str(teacher), "--output_dir", str(workspace / name)]
        places += ["--data.cache_dir", str(workspace / "cache"), "--distillation.initialization.ffn", "cluster"]
        return start(name, [*prefix, str(SCRIPT), "--config", str(CONFIG), *places, *arguments])

    return distill


def student(directory):
    return load_file(directory / "finetuned" / "final" / "model.safetensors")


@pytest.mark.slow
def test_the_launcher_and_processes_of_its_own_give_the_student_of_one_process(distill, workspace):
    for name, arguments in (("one", {}), ("jobs", {"processes": 1})):
        run = distill(name, *(["--jobs", "2"] if name == "jobs" else []), **arguments)
        assert run.wait(300) == 0, run.output
    assert "stage 1: finished" in run.output
    one, other = student(workspace / "one"), student(workspace / "jobs")
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    AutoModelForCausalLM.from_pretrained(workspace / "one" / "finetuned" / "final")


@pytest.mark.slow
def test_two_ranks_go_through_all_phases_together(distill, workspace):
    zero = json.dumps({"zero_optimization": {"stage": 1}})
    halves = ["--optimization.micro_batch_size", "2", "--deepspeed", zero]
    meta = ["--distillation.meta", "{method: fit, optimization: {steps: 3}}"]
    run = distill("ranks", *halves, *meta, processes=2)
    assert run.wait(300) == 0, run.output
    results = json.loads((workspace / "ranks" / "results.json").read_text())
    assert results["phases"]["end to end"]["tokens"] == 4 * 4 * 32
    run = distill("alone", *meta)
    assert run.wait(300) == 0, run.output
    one, two = student(workspace / "alone"), student(workspace / "ranks")
    assert all(tensor.allclose(two[name], atol=2e-3) for name, tensor in one.items())
