"""`train/finetune.py` as users start it: a whole run, engines, mistakes."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.data import train_bpe
from modmoe.models.extension import Extension
from modmoe.surgery import add_extension
from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.checkpoint import checkpoints
from tests.launching import ROOT, deepspeed_command

pytest.importorskip("deepspeed")
pytest.importorskip("matplotlib")

SCRIPT = ROOT / "train" / "finetune.py"
CONFIG = ROOT / "configs" / "train" / "finetune.yaml"
WORDS = ["route", "tokens", "to", "sparse", "experts", "model", "learns"]


@pytest.fixture(scope="module")
def base(workspace):
    """A toy model with its tokenizer, and questions with answers."""
    rows = [{"prompt": f"{a} {b}? ", "completion": f"{b} {a}! " * 4} for a in WORDS for b in WORDS]
    (workspace / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe(iter([row["prompt"] + row["completion"] for row in rows]), 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "head_dim": 16}
    experts = {"intermediate_size": 32, "num_experts": 4, "num_attn_experts": 4, "router_hidden_size": 16}
    config = ModMoEConfig(vocab_size=len(tokenizer), eos_token_id=0, **sizes, **experts)
    ModMoEForCausalLM(config).save_pretrained(workspace / "base")
    tokenizer.save_pretrained(workspace / "base")
    return workspace / "base"


@pytest.fixture(scope="module")
def options(base, workspace):
    source = {"name": "answers", "files": [str(workspace / "rows.jsonl")], "format": "completion"}
    source |= {"validation_fraction": 0.2}
    settings = {
        "init": str(base),
        "data.sources": [source],
        "data.sequence_length": 32,
        "data.cache_dir": str(workspace / "cache"),
        "optimization": {"steps": 6, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "fp32"},
        "checkpoint.interval": 3,
        "evaluation.interval": 3,
        "logging": {"interval": 1, "tensorboard": False},
    }
    return [part for key, value in settings.items() for part in (f"--{key}", json.dumps(value))]


@pytest.fixture(scope="module")
def tune(start, options, workspace):
    """Start a run in its own output directory."""

    def tune(name, *arguments, processes=None):
        prefix = [sys.executable] if processes is None else deepspeed_command(processes)
        output = ["--config", str(CONFIG), "--output_dir", str(workspace / name)]
        return start(name, [*prefix, str(SCRIPT), *output, *options, *arguments])

    return tune


def test_a_run_under_the_launcher_leaves_a_merged_model_and_its_adapter(tune, base, workspace):
    pytest.importorskip("peft")
    section = {"method": "lora", "lora": {"rank": 4}, "teacher": {"weight": 0.2}}
    section |= {"router_loss": {"coefficient": 0.05, "warmup_steps": 3}}
    zero = str(ROOT / "configs" / "deepspeed" / "zero2.json")
    run = tune("lora", "--deepspeed", zero, "--finetuning", json.dumps(section), processes=1)
    assert run.wait() == 0, run.output
    out = workspace / "lora"
    for text in ("of them are trained", "aux loss: concentration, coefficient 0.05", "DeepSpeed ZeRO-2", "bits/byte"):
        assert text in run.output
    records = [r for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert [r["router_loss_coefficient"] for r in records[:3]] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05])
    assert records[-1]["distillation/kl"] > 0
    merged = AutoModelForCausalLM.from_pretrained(out / "final")
    before = load_file(base / "model.safetensors")
    changed = {name for name, tensor in merged.state_dict().items() if not tensor.equal(before[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert (out / "final" / "adapter" / "adapter_model.safetensors").is_file()
    assert len(AutoTokenizer.from_pretrained(out / "final")) == merged.config.vocab_size


ENGINES = {"plain": None, "ZeRO-0": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3}
SECTIONS = {
    "experts": {"method": "experts", "router_loss": {"warmup_steps": 4}},
    "stacked adapters": {"method": "lora"},
    "linear adapters": {"method": "lora", "lora": {"targets": ["k_proj", "v_proj"], "dropout": 0.1}},
    "teacher": {"method": "full", "teacher": {"hidden_weight": 0.5}},
    "pruning": {"method": "full", "pruning": {"keep": 0.5, "steps": 4, "every": 2, "blocks": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_resume_bit_for_bit(tune, workspace, engine, section):
    stage = ENGINES[engine]
    if stage == 3 and section in ("stacked adapters", "pruning"):
        pytest.skip("refused")
    deepspeed = "null" if stage is None else json.dumps({"zero_optimization": {"stage": stage}})
    name = f"{engine}-{section}".replace(" ", "-")
    arguments = ["--deepspeed", deepspeed, "--finetuning", json.dumps(SECTIONS[section])]
    run = tune(name, *arguments, processes=2)
    assert run.wait() == 0, run.output
    out = workspace / name
    whole = load_file(out / "final" / "model.safetensors")
    losses = [r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    shutil.rmtree(checkpoints(out)[-1])
    shutil.rmtree(out / "final")
    run = tune(name, *arguments, processes=2)
    assert run.wait() == 0, run.output
    assert "resuming from" in run.output
    assert [r["loss"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r] == losses
    again = load_file(out / "final" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(whole[key].equal(again[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "part", "stage"),
    [
        ("routers", ".gate.", 1),
        pytest.param("experts", ".experts.", 1, marks=pytest.mark.slow),
        pytest.param("routers", ".gate.", 3, marks=pytest.mark.slow),
    ],
)
def test_one_part_is_trained_alone_where_ranks_share_out_the_experts(tune, base, workspace, method, part, stage):
    zero, name = json.dumps({"zero_optimization": {"stage": stage}}), f"shared-{method}-{stage}"
    run = tune(name, "--deepspeed", zero, "--expert_parallel_size", "2", "--finetuning.method", method, processes=2)
    assert run.wait() == 0, run.output
    before = load_file(base / "model.safetensors")
    after = load_file(workspace / name / "final" / "model.safetensors")
    assert {name for name in after if not after[name].equal(before[name])} == {n for n in after if part in n}


@pytest.mark.slow
def test_extensions_are_trained_alone_where_ranks_share_out_the_experts(tune, base, workspace):
    first, extended = workspace / "first", workspace / "extended"
    add_extension(base, first, Extension("g", 3, 2, 1))
    add_extension(first, extended, Extension("c", 1, 1, 3, mode="common"))
    section = json.dumps({"method": "extension", "extensions": ["g", "c"]})
    zero = json.dumps({"zero_optimization": {"stage": 1}})
    arguments = ["--init", str(extended), "--finetuning", section, "--deepspeed", zero]
    run = tune("extensions", *arguments, "--expert_parallel_size", "2", processes=2)
    assert run.wait() == 0, run.output
    before = load_file(extended / "model.safetensors")
    after = load_file(workspace / "extensions" / "final" / "model.safetensors")
    assert {name for name in after if not after[name].equal(before[name])} <= {n for n in after if ".extensions." in n}
    records = [r for r in read_metrics(workspace / "extensions" / "metrics.jsonl") if "loss" in r]
    assert all(0 <= r[f"router/g/{side}/used"] <= 1 for r in records for side in ("ffn", "attn"))
    assert all(1 <= r["router/attn/rank_load"] <= 2 for r in records)
    assert "g/ffn used" in run.output


# ---- Mistakes ----


@pytest.fixture
def finetune(capsys, monkeypatch, workspace, options):
    """Call the script's main function; returns exit code and what it wrote to stderr."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script that is run
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        output = ["--output_dir", str(workspace / "mistaken"), *options, "--deepspeed", "null"]
        code = module.main(["--config", str(CONFIG), *output, *arguments])
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    return call


def test_an_unknown_method(finetune):
    code, error = finetune("--finetuning.method", "everything")
    assert code == 2
    assert error.startswith("error: finetuning.method: input should be 'full', 'experts', 'routers', 'lora' or")


def test_a_missing_model(finetune):
    assert finetune("--init", "nowhere") == (2, "error: init directory nowhere does not exist")


def test_data_without_the_field_and_without_rows(finetune, workspace):
    code, error = finetune("--data.sources.0.completion_field", "answer")
    assert code == 2
    assert error.endswith("line 1: no column 'answer'; set completion_field to one of ['completion', 'prompt']")
    (workspace / "empty.jsonl").write_text("")
    code, error = finetune("--data.sources.0.files", json.dumps([str(workspace / "empty.jsonl")]))
    assert code == 2
    assert error.startswith("error: data: source 'answers': validation text has 0 tokens")


def test_a_model_that_was_saved_without_its_tokenizer(finetune, base, tmp_path):
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code, error = finetune("--init", str(bare))
    assert code == 2
    assert f"{bare} has no tokenizer" in error


def test_help_lists_the_keys(finetune, capsys):
    with pytest.raises(SystemExit):
        finetune("--help")
    assert "--finetuning.lora.rank [16]" in capsys.readouterr().out
