"""Tells the status file how far training is, and the watchdog that it goes on."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modmoe.training.checkpoints.checkpoint import checkpoint_dir
from modmoe.training.monitoring.step_guard import StepGuard
from modmoe.training.ranks.watchdog import Watchdog
from modmoe.training.run_config import RunConfig
from modmoe.training.status import RunStatus


class Progress(TrainerCallback):
    """
    Args:
        run: the configuration.
        status: of the run.
        watchdog: of this process.
        guard: knows losses and skipped steps.
    """

    def __init__(self, run: RunConfig, status: RunStatus, watchdog: Watchdog, guard: StepGuard) -> None:
        self._run = run
        self._status = status
        self._watchdog = watchdog
        self._guard = guard

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watchdog.progress()
        self._status.update(state="running", step=state.global_step, steps=state.max_steps)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watchdog.progress()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watchdog.progress()
        self._status.update(
            step=state.global_step,
            step_time=time.time(),
            tokens=state.global_step * self._run.tokens_per_step(args.world_size),
            loss=self._guard.loss,
            skipped_steps=self._guard.skipped,
        )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watchdog.progress()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watchdog.progress()
        self._status.update(checkpoint=checkpoint_dir(self._run.output_dir, state.global_step).name)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watchdog.rest()
