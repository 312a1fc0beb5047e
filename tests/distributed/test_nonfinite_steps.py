"""A step that is not finite on one rank is skipped by all, exactly, whatever the engine; its cause is named."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from modmoe.training.callbacks import read_metrics
from modmoe.training.ranks.bootstrap import prepare_process
from modmoe.training.run_config import check_run_config
from tests.launching import run_ranks
from tests.unit.training.conftest import cache_dir, content, corpus

__all__ = ["cache_dir", "content", "corpus"]

BAD_STEP = 3
STEPS = 5


class Snapshots(TrainerCallback):
    """Weights and moments on this rank after each step."""

    def __init__(self, trainer):
        self.trainer, self.taken = trainer, {}

    def on_step_end(self, args, state, control, **_):
        self.taken[state.global_step] = self.weights() | self.moments()

    def weights(self):
        parameters = self.trainer.model.named_parameters()
        return {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in parameters}

    def moments(self):
        state = self.trainer.base_optimizer.state.values()
        return {f"{i} {key}": value.clone() for i, values in enumerate(state) for key, value in values.items()}


class FaultyBlocks:
    """On rank 1, the MLP of layer 1 gives NaN for the blocks of one step, now and later."""

    def __init__(self, trainer, backward_only):
        self.trainer, self.bad, self.strikes, self.backward_only = trainer, [], False, backward_only
        self.original, trainer.get_batch_samples = trainer.get_batch_samples, self.get_batch_samples
        trainer.model.base_model.register_forward_pre_hook(self.look, with_kwargs=True)
        trainer.model.base_model.layers[1].mlp.register_forward_hook(self.strike, prepend=True)

    def get_batch_samples(self, *args):
        batches, labels = self.original(*args)
        if dist.get_rank() == 1 and self.trainer.state.global_step == BAD_STEP - 1:
            self.bad = [batch["input_ids"] for batch in batches]
        return batches, labels

    def look(self, module, args, kwargs):
        self.strikes = any(ids.equal(kwargs["input_ids"]) for ids in self.bad)

    def strike(self, module, args, output):
        if not self.strikes:
            return output
        first, *rest = output
        if self.backward_only:
            first = first.clone()
            first.register_hook(lambda gradient: gradient * math.nan)
            return (first, *rest)
        return (first * math.nan, *rest)


def train_on_faulty_blocks(content, backward_only):
    from accelerate.state import AcceleratorState
    from deepspeed.runtime.zero.partition_parameters import shutdown_init_context

    from modmoe.data import prepare_data
    from modmoe.training.arguments import training_arguments
    from modmoe.training.initialization import build_model
    from modmoe.training.trainer import ModMoETrainer

    prepare_process(use_deepspeed=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = check_run_config(content)
    run.output_dir.mkdir(exist_ok=True)
    args = training_arguments(run)
    data = prepare_data(
        run.data.sources, run.tokenizer, run.data.sequence_length, run.data.cache_dir, run.seed, STEPS * 8
    )
    torch.manual_seed(0)
    trainer = ModMoETrainer(build_model(run, data.tokenizer), args, run, data)
    trainer.base_optimizer = trainer.create_optimizer()
    trainer._save_checkpoint = lambda *_: None
    FaultyBlocks(trainer, backward_only)
    snapshots = Snapshots(trainer)
    trainer.add_callback(snapshots)
    trainer.train()
    shutdown_init_context()
    rates = trainer.lr_scheduler.get_last_lr()
    return snapshots.taken, trainer.guard.skipped, float(rates[0])


def check(content, section, tmp_path, backward_only=False):
    content["optimization"] |= {"steps": STEPS}
    content |= {"deepspeed": section, "output_dir": str(tmp_path / "run")}
    results = run_ranks(train_on_faulty_blocks, 2, content, backward_only)
    for taken, skipped, rate in results:
        assert skipped == 1
        assert rate == 0.0  # the schedule goes on
        before, at, after = (taken[step] for step in (BAD_STEP - 1, BAD_STEP, BAD_STEP + 1))
        # A ZeRO stage may keep its state under new keys, but never with new values.
        assert before.keys() == at.keys()
        for name, value in before.items():
            assert value.isfinite().all(), name
            assert value.equal(at[name]), name
        assert any(not value.equal(after[name]) for name, value in at.items())
        assert all(value.isfinite().all() for value in taken[STEPS].values())
    if section in (None, zero(0)) and content.get("expert_parallel_size", 1) == 1:
        first, second = (taken[STEPS] for taken, *_ in results)
        assert all(value.equal(second[name]) for name, value in first.items())
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "tokens_per_second" in r]
    assert [r["skipped_steps"] for r in records] == [int(step == BAD_STEP) for step in range(1, STEPS + 1)]
    assert all(math.isfinite(value) for record in records for value in record.values())
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"]) == ("skipped_step", BAD_STEP)
    return event["message"]


def zero(stage):
    return {"zero_optimization": {"stage": stage}}


def check_forward(content, section, tmp_path):
    message = check(content, section, tmp_path)
    assert "its loss is not finite: on rank 1 the output of model.layers.1.mlp" in message
    assert "blocks 16 to 23 of the training data: 8 of words" in message


def test_a_step_with_nan_on_one_rank_changes_nothing_on_any(content, tmp_path):
    check_forward(content, zero(0), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_it_is_the_same_in_every_engine(content, tmp_path, stage):
    check_forward(content, None if stage is None else zero(stage), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_it_is_the_same_with_weights_in_bf16(content, tmp_path, stage):
    content["optimization"]["precision"] = "bf16"
    check_forward(content, {**zero(stage), "bf16": {"enabled": True}}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_it_is_the_same_with_expert_parallelism(content, tmp_path, stage):
    content["expert_parallel_size"] = 2
    check_forward(content, zero(stage), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("section", [None, zero(0), zero(2)])
def test_a_gradient_that_is_nan_on_one_rank_is_skipped_and_located(content, tmp_path, section):
    message = check(content, section, tmp_path, backward_only=True)
    assert "its gradient is not finite: on rank 1 the forward pass is finite" in message
    assert "model.layers" in message
