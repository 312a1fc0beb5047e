"""The entry point, from the launcher to the report: a whole run, interruptions, mistakes."""

import importlib.util
import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import modmoe  # noqa: F401  (registers the model type)
from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.checkpoint import checkpoints, defect
from modmoe.training.command_line import fail
from modmoe.training.errors import ConfigError, RunError

from .conftest import CONFIG, SCRIPT

pytest.importorskip("deepspeed")
pytest.importorskip("matplotlib")

SECTIONS = CONFIG.parents[1] / "deepspeed"
# Long enough to be interrupted, and yet a matter of seconds.
STEPS = 80
LONG = ["--optimization.steps", str(STEPS), "--evaluation.interval", "40", "--checkpoint.interval", "40"]


def weights(directory):
    return load_file(directory / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(launch, workspace):
    """A run without interruption, under the launcher."""
    run = launch("whole", *LONG, processes=1)
    assert run.wait() == 0, run.output
    return run, workspace / "whole"


@pytest.fixture(scope="module")
def stopped(launch, workspace):
    """The same run, when SIGTERM has hit the launcher in the midst of it."""
    run = launch("stopped", *LONG, processes=1)
    run.wait_for("step 5/")
    run.process.send_signal(signal.SIGTERM)
    run.wait()
    # The launcher dies at once; the rank notices, saves and leaves.
    run.wait_for_group()
    return run, workspace / "stopped"


def test_a_whole_run_leaves_a_model_that_loads_and_generates(whole):
    model = AutoModelForCausalLM.from_pretrained(whole[1] / "final")
    tokenizer = AutoTokenizer.from_pretrained(whole[1] / "final")
    tokens = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3)
    assert tokens.shape[1] > 3


def test_a_whole_run_leaves_checkpoints_metrics_and_pictures(whole):
    run, out = whole
    records = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "eval/c/bits_per_byte" in r] == [40, 80]
    losses = [r["loss"] for r in records if "loss" in r]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert [c.name for c in checkpoints(out)] == ["checkpoint-40", "checkpoint-80"]
    assert all(defect(c) is None for c in checkpoints(out))
    for name in ("expert_use.png", "loss.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    results = json.loads((out / "results.json").read_text())
    assert results["python"]["gzip_bits_per_byte"] < results["python"]["byte_unigram_entropy"]
    assert any((out / "tensorboard").iterdir())
    for text in (
        "active per token",
        "aux loss: mi, coefficient 0.01",
        "DeepSpeed ZeRO-0",
        "gzip -9",
        "--- python ---",
    ):
        assert text in run.output


def test_sigterm_to_the_launcher_saves(stopped):
    run, out = stopped
    assert "run the same command to resume" in run.output
    (saved,) = checkpoints(out)
    assert defect(saved) is None
    assert not (out / "final").exists()


def test_the_same_command_resumes_bit_for_bit(whole, stopped, launch):
    out = stopped[1]
    (saved,) = checkpoints(out)
    # A save that was killed later on does not get in the way.
    broken = out / f"checkpoint-{STEPS - 1}"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")

    resumed = launch("stopped", *LONG)
    assert resumed.wait() == 0, resumed.output
    assert f"skipping checkpoint {broken}: its save was interrupted" in resumed.output
    assert f"resuming from {saved}" in resumed.output
    ours, theirs = weights(out), weights(whole[1])
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    steps = [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, STEPS + 1))


# ---- Mistakes ----


@pytest.fixture
def pretrain(capsys, monkeypatch, workspace):
    """Call the script's main function; returns exit code and what it wrote to stderr."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script that is run
    spec = importlib.util.spec_from_file_location("pretrain", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments, config=CONFIG, output="mistaken"):
        output_dir, cache_dir = str(workspace / output), str(workspace / "cache")
        paths = ["--output_dir", output_dir, "--data.cache_dir", cache_dir, "--deepspeed", "null"]
        code = module.main(["--config", str(config), *paths, *arguments])
        return code, capsys.readouterr().err.strip()

    call.fail = fail
    return call


@pytest.mark.parametrize(("error", "shown"), [(RunError("disk full"), "error: disk full\n"), (ConfigError("x"), "")])
def test_what_ends_one_rank_alone_is_shown(pretrain, monkeypatch, capsys, error, shown):
    monkeypatch.setenv("RANK", "1")
    pretrain.fail(error, 1)
    assert capsys.readouterr().err == shown


def test_a_missing_config(pretrain, tmp_path):
    code, error = pretrain(config=tmp_path / "no.yaml")
    assert (code, error) == (2, f"error: config file {tmp_path / 'no.yaml'} does not exist")


def test_an_unknown_override(pretrain):
    code, error = pretrain("--optimization.step", "3")
    assert (code, error) == (2, "error: unknown key optimization.step; did you mean optimization.steps?")


def test_a_corpus_that_is_too_small(pretrain):
    code, error = pretrain("--data.sources.0.max_bytes", "10", "--data.sequence_length", "100000")
    assert code == 2
    assert error.splitlines()[-1].startswith("error: data: source 'python': ")


def test_a_missing_init_directory(pretrain):
    code, error = pretrain("--init", "nowhere")
    assert (code, error) == (2, "error: init directory nowhere does not exist")


def test_an_output_directory_with_another_run(pretrain, whole):
    code, error = pretrain(*LONG, "--deepspeed", str(SECTIONS / "cpu.json"), "--seed", "1", output="whole")
    assert code == 2
    assert "holds checkpoints or the final model of another run (seed is 0 there and 1 here)" in error


def test_an_output_directory_below_a_file(pretrain, workspace):
    (workspace / "file").write_text("")
    code, error = pretrain(output="file/run")
    assert (code, error) == (2, f"error: output_dir {workspace / 'file' / 'run'} cannot be made: a file is in the way")


def test_a_cache_that_cannot_be_written(pretrain, workspace):
    (workspace / "file").write_text("")
    code, error = pretrain("--data.cache_dir", str(workspace / "file" / "cache"))
    assert code == 1
    assert error.splitlines()[-1].startswith("error: data: [Errno 20] Not a directory")


def test_text_that_has_changed_since_the_checkpoint(pretrain, tmp_path):
    """The tokenizer is trained on the text, so its ids would mean other tokens than those the model has learnt."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of a small text" for i in range(4_000)))
    source = [{"name": "text", "files": [str(text)], "max_validation_bytes": 20_000}]
    options = [
        "--data.sources",
        json.dumps(source),
        "--optimization.steps",
        "1",
        "--evaluation.final_blocks_per_domain",
        "1",
    ]
    assert pretrain(*options, output="changed")[0] == 0
    text.write_text("\n\n".join(f"row {i} out of quite another story" for i in range(4_000)))
    code, error = pretrain(*options, output="changed")
    assert code == 2
    assert "the tokenizer is not the one that" in error.splitlines()[-1]


# ---- Slow ----


@pytest.mark.slow
def test_ctrl_c_without_deepspeed_saves(launch, workspace):
    run = launch("interrupted", *LONG, "--deepspeed", "null")
    run.wait_for("step 5/")
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130, run.output
    (saved,) = checkpoints(workspace / "interrupted")
    assert defect(saved) is None
    assert "plain PyTorch" in run.output


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_train_as_one(launch, workspace, stage):
    """Same loss, gradient norm and router losses for 1 rank x 2 micro-batches and 2 ranks x 1."""
    common = ["--model.aux_scope", "global_batch", "--model.router_aux_loss_coef", "3", "--model.initializer_range"]
    common += ["0.3", "--evaluation.interval", "0", "--deepspeed", json.dumps({"zero_optimization": {"stage": stage}})]
    one = launch(f"one-{stage}", *common, processes=1)
    assert one.wait() == 0, one.output
    two = launch(f"two-{stage}", *common, "--optimization.gradient_accumulation", "1", processes=2)
    assert two.wait() == 0, two.output
    for a, b in zip(
        *(read_metrics(workspace / f"{n}-{stage}" / "metrics.jsonl") for n in ("one", "two")), strict=True
    ):
        for name in ("loss", "cross_entropy", "aux/mi", "grad_norm", "router/ffn/entropy"):
            assert a[name] == pytest.approx(b[name], rel=2e-3), (a["step"], name)


@pytest.mark.slow
def test_sigterm_stops_two_ranks_at_the_same_step(launch, workspace):
    run = launch("two-stopped", *LONG, processes=2)
    run.wait_for("step 5/")
    run.process.send_signal(signal.SIGTERM)
    run.wait()
    run.wait_for_group()
    (saved,) = checkpoints(workspace / "two-stopped")
    assert defect(saved) is None
    alone = launch("two-stopped", *LONG)
    assert alone.wait() == 1
    assert "2 x 1 processes are 4: set optimization.gradient_accumulation to 4" in alone.output
    resumed = launch("two-stopped", *LONG, "--optimization.gradient_accumulation", "4")
    assert resumed.wait() == 0, resumed.output
    steps = [r["step"] for r in read_metrics(workspace / "two-stopped" / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_gpu_sections_run(launch, workspace, stage):
    """ZeRO with bf16 weights, two ranks; the export is whole whatever the sharding."""
    section = ["--deepspeed", f"{SECTIONS}/zero{stage}.json", "--optimization.precision", "bf16"]
    run = launch(f"zero{stage}", *section, processes=2)
    assert run.wait() == 0, run.output
    exported = weights(workspace / f"zero{stage}")
    assert all(tensor.numel() > 0 and torch.isfinite(tensor).all() for tensor in exported.values())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_streamed_text_trains(launch, workspace, processes):
    text = workspace / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 40}) + "\n" for i in range(200)))
    source = [{"name": "text", "files": [str(text)], "streaming": True, "validation_fraction": 0.1}]
    run = launch(f"streamed-{processes}", "--data.sources", json.dumps(source), processes=processes)
    assert run.wait() == 0, run.output
    assert "text streamed" in run.output
