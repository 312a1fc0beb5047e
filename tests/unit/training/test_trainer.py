"""The trainer on a toy model: loss shares, scopes, metrics, checkpoints, faults."""

import dataclasses
import json
import logging
import math
import re
import resource
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from modmoe.data import prepare_data
from modmoe.training.arguments import training_arguments
from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints import checkpoint as checkpointing
from modmoe.training.checkpoints.checkpoint import checkpoints
from modmoe.training.checkpoints.consolidation import consolidate
from modmoe.training.checkpoints.output_dir import claim_output_dir, save_run_file
from modmoe.training.distillation.signals import WithSignals
from modmoe.training.errors import RunError
from modmoe.training.initialization import build_model
from modmoe.training.monitoring.throughput import parameter_counts
from modmoe.training.pretraining import summary
from modmoe.training.trainer import ModMoETrainer, _num_tokens
from tests.operations import Operations


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def make_trainer(run):
    args = training_arguments(run)
    blocks = run.steps(1) * run.blocks_per_step(1)
    data = prepare_data(
        run.data.sources, run.tokenizer, run.data.sequence_length, run.data.cache_dir, run.seed, blocks
    )
    torch.manual_seed(run.seed)
    return ModMoETrainer(build_model(run, data.tokenizer), args, run, data)


def train(run, prepare=lambda trainer: None):
    """Train as `pretrain` does: claim the directory, resume from what it holds."""
    checkpoint = claim_output_dir(run)
    trainer = make_trainer(run)
    save_run_file(run, run.output_dir, {})
    prepare(trainer)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def records(run):
    return read_metrics(run.output_dir / "metrics.jsonl")


def assert_same_weights(one, other):
    for name, parameter in one.model.named_parameters():
        assert parameter.equal(other.model.get_parameter(name)), name


# ---- Loss ----


@pytest.mark.parametrize("kind", ["mi", "switch"])
@pytest.mark.parametrize("scope", ["global_batch", "micro_step"])
def test_accumulation_changes_nothing_over_the_global_batch(make_run, tmp_path, kind, scope):
    """With the scope of a micro-step it does: then this test would show a difference."""
    model = {"model.aux_scope": scope, "model.router_aux_loss_type": kind, "model.router_aux_loss_coef": 3.0}
    norms, values = [], []
    for micro, accumulation in ((4, 1), (1, 4)):
        run = make_run(
            {
                **model,
                # Far from even routing, so that the loss matters.
                "model.initializer_range": 0.5,
                "optimization.micro_batch_size": micro,
                "optimization.gradient_accumulation": accumulation,
                "optimization.steps": 1,
                "output_dir": str(tmp_path / f"{micro}"),
            }
        )
        train(run)
        norms.append(records(run)[0]["grad_norm"])
        values.append(records(run)[0][f"aux/{kind}"])
    same = pytest.approx(norms[1], rel=1e-4) == norms[0] and pytest.approx(values[1], rel=1e-5) == values[0]
    assert same == (scope == "global_batch"), (norms, values)


def test_losses_of_unequal_micro_batches_add_up(make_run, tmp_path):
    """The cross entropy of 1 x 4 and 4 x 1 agree although micro-batches have different numbers of labels."""
    logs = []
    for micro, accumulation in ((4, 1), (1, 4)):
        run = make_run(
            {
                "model.router_aux_loss_type": "none",
                "data.sequence_length": 64,
                "optimization.micro_batch_size": micro,
                "optimization.gradient_accumulation": accumulation,
                "output_dir": str(tmp_path / f"{micro}"),
            }
        )
        trainer = make_trainer(run)
        labels = [(trainer.data.train[i]["labels"][1:] != -100).sum() for i in range(4)]
        assert len(set(labels)) > 1
        trainer.train()
        logs.append([(r["loss"], r["grad_norm"]) for r in records(run)])
    assert torch.tensor(logs[0]).allclose(torch.tensor(logs[1]), rtol=1e-3)


def test_tokens_are_counted_without_a_wait():
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    with Operations() as operations:
        count = _num_tokens(batch)
    assert count == 6
    operations.assert_nothing_waits()


def test_both_passes_of_a_global_batch_draw_the_same_experts(make_run):
    run = make_run({"model.aux_scope": "global_batch", "model.sample_topk": 1, "optimization.steps": 2})
    trainer = make_trainer(run)
    seen = []
    first_pass = trainer._statistics_of_step
    trainer._statistics_of_step = lambda model: seen.append(first_pass(model)) or seen[-1]
    drawn = []
    original = trainer._window.add

    def record(outputs, *shares):
        original(outputs, *shares)
        drawn.append(torch.stack(outputs.tokens_per_expert + outputs.attn_tokens_per_expert))

    trainer._window.add = record
    trainer.train()
    for step, statistics in enumerate(seen):
        in_training = sum(drawn[2 * step : 2 * step + 2])
        assert torch.stack(statistics.tokens_per_expert()).equal(in_training)


def test_selection_bias_moves_once_per_step(make_run):
    run = make_run({"model.use_selection_bias": True, "optimization.steps": 3, "model.initializer_range": 0.5})
    trainer = train(run)
    rate = trainer.model.config.selection_bias_update_rate
    moved = torch.cat([b for n, b in trainer.model.named_buffers() if n.endswith("selection_bias")])
    assert moved.abs().max() > 0
    # Each of three steps moves a bias by the rate, up or down, or not at all if the load is the mean.
    assert moved.abs().max() <= 3 * rate * (1 + 1e-6)
    assert (moved / rate).allclose((moved / rate).round(), atol=1e-4)


# ---- Metrics ----


def test_metrics_are_complete(make_run):
    run = make_run({"optimization.steps": 2, "evaluation.interval": 2, "model.router_z_loss_weight": 0.1})
    train(run)
    training = [r for r in records(run) if "loss" in r]
    assert [r["step"] for r in training] == [1, 2]
    assert training[1]["tokens"] == 2 * run.tokens_per_step(1)
    assert training[0]["loss"] == pytest.approx(
        training[0]["cross_entropy"] + 0.01 * (training[0]["aux/mi"] + 0.1 * training[0]["aux/z"]), rel=1e-5
    )
    assert training[0]["tokens_per_second"] > 0
    assert training[0]["grad_norm"] > 0
    for side in ("attn", "ffn"):
        for figure in ("max_violation", "entropy", "dead_experts"):
            assert f"router/{side}/{figure}" in training[0]
            assert f"router/{side}/layer_01/{figure}" in training[0]
    evaluation = next(r for r in records(run) if "eval/words/nats_per_token" in r)
    assert evaluation["step"] == 2
    assert 3 < evaluation["eval/words/nats_per_token"] < 8


def test_tensorboard_gets_the_same_scalars(make_run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = make_run({"logging.tensorboard": True, "optimization.steps": 2})
    train(run)
    events = accumulator.EventAccumulator(str(run.output_dir / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([r["loss"] for r in records(run)])


def test_the_summary_says_what_matters(make_run):
    run = make_run()
    trainer = make_trainer(run)
    total, active = parameter_counts(trainer.model)
    assert total == sum(p.numel() for p in trainer.model.parameters())
    experts = sum(p.numel() for n, p in trainer.model.named_parameters() if ".experts." in n)
    assert active == total - experts // 2
    text = summary(run, trainer.describe(trainer.model), trainer.data, {"precision": "fp32"})
    for part in (f"{total:,} parameters, {active:,} active", "6 steps of 64 tokens", "mi, coefficient 0.01", "fp32"):
        assert part in text


# ---- Checkpoints ----


def test_resuming_is_bitwise(make_run, tmp_path):
    changes = {"model.sample_topk": 1, "optimization.warmup_steps": 2}  # both random state and schedule matter
    straight = train(make_run({**changes, "output_dir": str(tmp_path / "straight")}))
    run = make_run(changes)

    def interrupt(trainer):
        on_optimizer_step = trainer.stop.on_optimizer_step

        def stop_in_the_fourth(args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.stop._requested = 143
            on_optimizer_step(args, state, control, **kwargs)

        trainer.stop.on_optimizer_step = stop_in_the_fourth

    stopped = train(run, interrupt)
    assert stopped.stop.exit_code == 143
    assert [c.name for c in checkpoints(run.output_dir)] == ["checkpoint-3", "checkpoint-4"]
    resumed = train(run)
    assert resumed.state.global_step == 6
    assert_same_weights(straight, resumed)
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]
    numbers = [[r["loss"], r["learning_rate"]] for r in records(run)]
    assert numbers == [[r["loss"], r["learning_rate"]] for r in records(straight.run)]


def test_a_checkpoint_that_the_trainer_does_not_load_is_missed(make_run, monkeypatch):
    """As by a version of transformers in which the hook that loads has another name."""
    run = make_run()
    train(run)
    shutil.rmtree(run.output_dir / "checkpoint-6")
    monkeypatch.delattr(ModMoETrainer, "_prepare_for_training")
    with pytest.raises(RunError, match="cannot resume from .*checkpoint-3: transformers .* install an older version"):
        train(run)


def test_an_interrupted_save_falls_back_to_the_checkpoint_before(make_run, tmp_path, caplog):
    straight = train(make_run({"output_dir": str(tmp_path / "straight")}))
    run = make_run()
    train(run)
    newest = checkpoints(run.output_dir)[-1]
    (newest / "complete.json").unlink()
    (newest / "model.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        resumed = train(run)
    assert "skipping checkpoint" in caplog.text
    assert_same_weights(straight, resumed)
    assert checkpointing.defect(newest) is None
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]


def test_a_save_that_the_system_cuts_off_keeps_the_checkpoint_before(make_run):
    """A limit on the size of files stands for a full disk, which needs rights to make: tests/train has a real one."""
    run = make_run()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_from_step_five(trainer):
        on_step_begin = trainer.stop.on_step_begin

        def begin(args, state, control, **kwargs):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # bytes
            on_step_begin(args, state, control, **kwargs)

        trainer.stop.on_step_begin = begin

    try:
        with pytest.raises(RunError) as caught:
            train(run, limit_from_step_five)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"could not write {run.output_dir / 'checkpoint-6'}: " in str(caught.value)
    assert f"{run.output_dir / 'checkpoint-3'} is untouched: run the same command again" in str(caught.value)
    assert [c.name for c in checkpoints(run.output_dir)] == ["checkpoint-3"]
    assert train(run).state.global_step == 6


def test_random_states_that_do_not_fit_on_the_disk_are_a_failed_write(make_run, monkeypatch):
    def save(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunError, match="could not write .*checkpoint-3: PytorchStreamWriter failed writing file"):
        train(make_run())


@pytest.mark.parametrize("interval", [1, 10])  # of the log: the loss is seen first, or the weights
def test_a_diverged_run_says_so_and_keeps_its_last_good_checkpoint(make_run, interval):
    run = make_run({"logging.interval": interval, "checkpoint.interval": 1, "optimization.steps": 8})

    def explode_in_step_four(trainer):
        on_step_begin = trainer.stop.on_step_begin

        def begin(args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(trainer.model.parameters()).fill_(float("inf"))
            on_step_begin(args, state, control, **kwargs)

        trainer.stop.on_step_begin = begin

    with pytest.raises(RunError) as caught:
        train(run, explode_in_step_four)
    assert re.match("training has diverged: .* at step 4; lower optimization.learning_rate", str(caught.value))
    assert f"--init {run.output_dir / 'checkpoint-3'} and another output_dir" in str(caught.value)
    assert [c.name for c in checkpoints(run.output_dir)] == ["checkpoint-2", "checkpoint-3"]
    assert all(math.isfinite(value) for r in records(run) for value in r.values())


def test_events_name_the_domains_of_a_step_beside_cached_signals_too(make_run):
    trainer = make_trainer(make_run())
    expected = "blocks 4 to 7 of the training data: 4 of words"
    assert trainer._contents_of_step(2) == expected
    trainer.data = dataclasses.replace(trainer.data, train=WithSignals(trainer.data.train, None, {}))
    assert trainer._contents_of_step(2) == expected


def test_a_checkpoint_is_a_plain_directory_too(make_run):
    trainer = train(make_run({"model.use_selection_bias": True, "model.tie_word_embeddings": True}))
    checkpoint = checkpoints(trainer.run.output_dir)[-1]
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    state = trainer.model.state_dict()
    assert state["model.layers.0.mlp.gate.selection_bias"].any()
    assert all(tensor.equal(state[name]) for name, tensor in loaded.state_dict().items())
    assert not [path for path in checkpoint.rglob("*") if path.name.endswith((".bin", ".pt", ".tmp"))]
    saved = json.loads((checkpoint / "config.json").read_text())
    assert (saved["dtype"], saved["architectures"]) == ("float32", ["ModMoEForCausalLM"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_consolidated(make_run, tmp_path, dtype):
    trainer = train(make_run({"optimization.steps": 1}))
    (checkpoint,) = checkpoints(trainer.run.output_dir)
    said = consolidate(checkpoint, tmp_path / "out", dtype)
    assert said.startswith(f"{tmp_path / 'out'}: ")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in trainer.model.named_parameters():
        assert loaded.get_parameter(name).equal(parameter.to(dtype)), name
    names = {path.name for path in (tmp_path / "out").iterdir()}
    plain = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == plain
    with pytest.raises(FileExistsError, match="out exists: name a new directory"):
        consolidate(checkpoint, tmp_path / "out", dtype)
    (checkpoint / "complete.json").unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint: its save was interrupted"):
        consolidate(checkpoint, tmp_path / "other", dtype)
    assert not [path for path in tmp_path.iterdir() if "other" in path.name]


def cut_off(path):
    with path.open("r+b") as file:
        file.truncate(1_000)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda c: cut_off(c / "state" / "rank-00000.safetensors"), "rank-00000.safetensors is damaged or truncated"),
        (lambda c: (c / "state" / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
        (lambda c: (c / "state" / "index.json").write_text("{"), "index.json is damaged"),
        (lambda c: shutil.rmtree(c / "state"), "index.json is missing"),
        (lambda c: change_config(c, "num_experts_per_tok", 1), "its model has num_experts_per_tok=1, this run's 2"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence(make_run, damage, expected):
    """What the manifest does not see: damage that keeps sizes, files of another run."""
    run = make_run({"optimization.steps": 1})
    train(run)
    (checkpoint,) = checkpoints(run.output_dir)
    damage(checkpoint)
    with pytest.raises(RunError) as caught:
        make_trainer(run).train(resume_from_checkpoint=str(checkpoint))
    assert str(caught.value).startswith(f"cannot resume from {checkpoint}: ")
    assert expected in str(caught.value)


def change_config(checkpoint, name, value):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def test_a_batch_may_be_cut_up_otherwise_when_a_run_resumes(make_run, tmp_path):
    model = {"model.aux_scope": "global_batch"}
    straight = train(make_run({**model, "output_dir": str(tmp_path / "straight")}))
    run = make_run(model)
    train(run)
    shutil.rmtree(checkpoints(run.output_dir)[-1])
    cut = {"optimization.micro_batch_size": 4, "optimization.gradient_accumulation": 1}
    train(make_run({**model, **cut}))
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in records(run)] == pytest.approx([r["loss"] for r in records(straight.run)], rel=1e-5)


def test_streamed_text_goes_on_where_it_was_with_other_data_workers(make_run, tmp_path):
    streamed = {"data.sources.0.streaming": True}
    straight = train(make_run({**streamed, "output_dir": str(tmp_path / "straight")}))
    run = make_run({**streamed, "data.workers": 2})
    train(run)
    shutil.rmtree(run.output_dir / "checkpoint-6")
    assert_same_weights(straight, train(make_run(streamed)))


def test_random_states_of_another_number_of_processes_are_replaced(make_run):
    """Every process gets its own, the same in every launch."""
    run = make_run({"optimization.steps": 1})
    trainer = train(run)
    (checkpoint,) = checkpoints(run.output_dir)
    trainer._load_rng_state(str(checkpoint))
    kept = torch.rand(2)
    manifest = json.loads((checkpoint / "complete.json").read_text())
    (checkpoint / "complete.json").write_text(json.dumps(manifest | {"world_size": 2}))
    drawn = []
    for rank in (0, 0, 1):
        trainer.args = type("Args", (), {"world_size": 1, "process_index": rank})
        trainer._load_rng_state(str(checkpoint))
        drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[1]
    assert len({*map(tuple, drawn), tuple(kept.tolist())}) == 3


def test_intervals_may_change_when_a_run_resumes(make_run):
    run = make_run()
    train(run)
    shutil.rmtree(checkpoints(run.output_dir)[-1])
    train(make_run({"logging.interval": 2, "checkpoint.interval": 1, "evaluation.interval": 3}))
    assert [r["step"] for r in records(run) if "loss" in r] == [1, 2, 3, 4, 6]
    assert [r["step"] for r in records(run) if "loss" not in r] == [6]
    assert [c.name for c in checkpoints(run.output_dir)] == ["checkpoint-5", "checkpoint-6"]


def test_a_model_without_routers_trains_over_the_global_batch_too(make_run):
    dense = dict.fromkeys(("num_experts", "num_experts_per_tok", "num_attn_experts", "num_attn_experts_per_tok"), 1)
    changes = {f"model.{name}": value for name, value in dense.items()}
    assert train(make_run({**changes, "model.aux_scope": "global_batch", "optimization.steps": 1})).state.global_step


def test_only_the_newest_checkpoints_are_kept(make_run):
    run = make_run({"checkpoint.interval": 1, "checkpoint.keep": 2})
    train(run)
    assert [c.name for c in checkpoints(run.output_dir)] == ["checkpoint-5", "checkpoint-6"]
    assert all((c / "run.yaml").is_file() for c in checkpoints(run.output_dir))


def test_the_time_limit_stops_and_saves(make_run):
    run = make_run({"max_minutes": 1e-6, "logging.interval": 10, "optimization.steps": 5})
    trainer = train(run)
    assert trainer.state.global_step == 1
    assert trainer.stop.exit_code == 0
    assert [c.name for c in checkpoints(run.output_dir)] == ["checkpoint-1"]


def test_time_counts_over_all_launches(make_run):
    run = make_run({"max_minutes": 100, "checkpoint.interval": 1, "logging.interval": 10})

    def hours_pass(trainer):
        now = trainer.clock.now
        trainer.clock.now = lambda: now() + 60 * 100 * (trainer.state.global_step >= 2)

    stopped = train(run, hours_pass)
    assert stopped.state.global_step == 3
    assert records(run)[-1]["step"] == 3
    resumed = train(run)
    # The limit was reached before: one step is more than none, and it has the lowest rate.
    assert resumed.state.global_step == 4
    assert records(run)[-1]["learning_rate"] == 0.0
    assert_same_weights(stopped, resumed)
    assert train(make_run({"max_minutes": 300})).state.global_step == 6


def test_the_final_directory_is_plain(make_run, tmp_path):
    trainer = train(make_run({"optimization.steps": 1}))
    trainer.save_final(tmp_path / "final")
    names = {p.name for p in (tmp_path / "final").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert loaded.config.use_cache
    for name, parameter in trainer.model.named_parameters():
        assert loaded.get_parameter(name).equal(parameter), name


def test_bf16_trains(make_run):
    run = make_run({"optimization.precision": "bf16", "optimization.steps": 2})
    trainer = train(run)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert math.isfinite(records(run)[1]["loss"])
