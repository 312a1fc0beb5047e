"""A training run from its configuration to the report."""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, set_seed

from modmoe.data import PreparedData, prepare_data
from modmoe.ops.backend import ENVIRONMENT_VARIABLE, use_backend
from modmoe.training.arguments import run_precision, training_arguments
from modmoe.training.checkpoints.checkpoint import check_batch, writing
from modmoe.training.checkpoints.output_dir import FINAL, claim_output_dir, clear_foreign_run, locked, save_run_file
from modmoe.training.errors import ConfigError, RunError
from modmoe.training.initialization import build_model, check_saved_model, has_vocabulary
from modmoe.training.monitoring.progress import Progress
from modmoe.training.monitoring.report import draw_loss, score_table, write_expert_use, write_results
from modmoe.training.monitoring.router_load import routed_layers
from modmoe.training.ranks.agreement import check_agreement, data_fingerprint, run_fingerprint
from modmoe.training.ranks.bootstrap import world_size
from modmoe.training.ranks.team import Team, join
from modmoe.training.ranks.watchdog import Watchdog
from modmoe.training.run_config import RunConfig
from modmoe.training.status import RunStatus
from modmoe.training.trainer import ModMoETrainer

logger = logging.getLogger(__name__)


Build = Callable[[Any, PreTrainedTokenizerFast], Any]
"""From a run and its tokenizer to what its trainer trains."""


def pretrain(run: RunConfig) -> int:
    """Train a model from random or saved weights; see `carry_out`."""
    return carry_out(run, build_model, ModMoETrainer)


def carry_out(run: RunConfig, build: Build, trainer_class: type[ModMoETrainer]) -> int:
    """
    Prepare data and model, train or resume, evaluate, export to `output_dir/final` and report.

    Args:
        run: the configuration.
        build: makes the model; raises ConfigError if it cannot be had.
        trainer_class: trains it.

    Returns:
        the exit code: 0, or 128 + the number of the signal that interrupted training.

    Raises:
        ConfigError: for mistakes in the configuration or the data.
        RunError: if something cannot be written, a checkpoint cannot be used, or training diverges.
    """
    team = join(60 * run.health.join_minutes, 60 * run.health.stuck_minutes)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(team, 60 * run.health.stuck_minutes))
        if team.rank == 0:
            stack.enter_context(locked(run.output_dir))
        if run.backend is not None:
            stack.enter_context(use_backend(run.backend))
        return _carry_out(run, build, trainer_class, team, watchdog)


def _carry_out(
    run: RunConfig, build: Build, trainer_class: type[ModMoETrainer], team: Team, watchdog: Watchdog
) -> int:
    if run.init is not None:  # before its tokenizer is looked for
        check_saved_model(run.init)
        if run.tokenizer.name == str(run.init) and not any(run.init.glob("tokenizer*")):
            raise ConfigError(
                f"init directory {run.init} has no tokenizer: name the one of the model, --tokenizer.name"
            )
    check_agreement(team, "configuration", run_fingerprint(run), 60 * run.health.join_minutes)
    args = training_arguments(run)
    set_seed(run.seed)
    with team.first_on_each_node("data"):
        checkpoint = claim_output_dir(run)
        if checkpoint is not None:
            batch = run.optimization
            check_batch(checkpoint, world_size(), batch.micro_batch_size, batch.gradient_accumulation)
        # Not before it is certain that this is no other run's directory.
        status = watchdog.status = RunStatus(run.output_dir)
        data = prepare_run_data(run)
    check_agreement(team, "data", data_fingerprint(data), 60 * run.health.join_minutes)
    if checkpoint is not None and not has_vocabulary(checkpoint, data.tokenizer):
        raise ConfigError(
            f"the tokenizer is not the one that {checkpoint} was trained with, perhaps because the text it is trained "
            "on has changed: restore the text, or choose another output_dir to start anew"
        )
    model = build(run, data.tokenizer)
    facts = _facts(run)
    if args.process_index == 0:
        with writing(run.output_dir, run.output_dir):
            clear_foreign_run(run)
            save_run_file(run, run.output_dir, facts)
        logger.info(summary(run, trainer_class.describe(model), data, facts))
    trainer = trainer_class(model, args, run, data, facts)
    trainer.add_callback(Progress(run, status, watchdog, trainer.guard))
    if checkpoint is not None:
        status.update(checkpoint=checkpoint.name)
        if args.process_index == 0:
            logger.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.stop.exit_code:
        if args.process_index == 0:
            asked = trainer.stop.requested_at  # None if only other ranks were
            took = "" if asked is None else f" and saved within {time.monotonic() - asked:.1f} s"
            logger.info("interrupted at step %d%s; run the same command to resume", trainer.state.global_step, took)
        status.end("interrupted", trainer.stop.exit_code)
        return trainer.stop.exit_code
    _finish(trainer, run, data)
    status.end("finished", 0)
    return 0


def prepare_run_data(run: RunConfig) -> PreparedData:
    """
    The data of a run, tokenised once.

    Raises:
        ConfigError: for mistakes in the configuration or the text.
        RunError: if it cannot be written.
    """
    blocks = run.steps(world_size()) * run.blocks_per_step(world_size())
    try:
        return prepare_data(
            run.data.sources, run.tokenizer, run.data.sequence_length, run.data.cache_dir, run.seed, blocks
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise ConfigError(f"data: {error}") from error
    except (OSError, RuntimeError) as error:  # a full disk, or text that changed beside its cache
        raise RunError(f"data: {error}") from error


def _finish(trainer: ModMoETrainer, run: RunConfig, data: PreparedData) -> None:
    """Final evaluation, export, pictures, and what the trainer shows."""
    scores = trainer.score_domains(run.evaluation.final_blocks_per_domain)
    final = run.output_dir / FINAL
    with writing(final, run.output_dir):
        trainer.save_final(final)
    if not trainer.args.should_save:
        return
    with writing(run.output_dir, run.output_dir):
        write_expert_use(scores, routed_layers(trainer.model.config), run.output_dir)
        draw_loss(run.output_dir / "metrics.jsonl", run.output_dir / "loss.png")
        write_results(scores, data.statistics, run.output_dir)
    print(score_table(scores, data.statistics))
    trainer.show(final)


def _facts(run: RunConfig) -> dict[str, Any]:
    """What the configuration leaves to the machine."""
    return {
        "processes": world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "precision": run_precision(run),
        "op backend": run.backend or os.environ.get(ENVIRONMENT_VARIABLE, "auto"),
        "engine": "plain PyTorch" if run.deepspeed is None else f"DeepSpeed ZeRO-{run.zero_stage}",
        "expert parallel": run.expert_parallel_size,
    }


def summary(run: RunConfig, model: dict[str, str], data: PreparedData, facts: dict[str, Any]) -> str:
    """What is about to happen, in a few lines; those of `model` are the trainer's `describe`."""
    without_size = {source.name: "streamed" if source.weight else "only evaluated" for source in run.data.sources}
    steps, per_step = run.steps(world_size()), run.tokens_per_step(world_size())
    sizes = ", ".join(
        f"{name} {split.train.tokens:,} tokens" if split.train else f"{name} {without_size[name]}"
        for name, split in data.statistics.items()
    )
    lines = {
        **model,
        "data": f"{sizes}; vocabulary {len(data.tokenizer):,}",
        "training": f"{steps:,} steps of {per_step:,} tokens, {steps * per_step:,} in all",
        "machine": ", ".join(f"{name} {value}" for name, value in facts.items()),
        "output": str(run.output_dir),
    }
    return "\n".join(f"{name:>9}: {text}" for name, text in lines.items())
