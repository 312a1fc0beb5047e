"""Trainer callbacks: metrics.jsonl, TensorBoard, console, intervals, stopping in time, expert balancing."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modmoe.training.clock import Clock
from modmoe.training.monitoring.router_load import RouterLoads
from modmoe.training.ranks.bootstrap import is_main_process
from modmoe.training.ranks.launcher import Launcher

Logs = dict[str, float]


class MetricsFile(TrainerCallback):
    """One JSON object per record in `metrics.jsonl`; a resumed run leaves no step twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._forget_after(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drop records of steps that are going to be repeated, and a line that a crash cut off."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept if step > 0))
        os.replace(temporary, self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics.jsonl; none if there is no such file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed while writing
            continue
    return records


class TensorBoard(TrainerCallback):
    """Scalars for TensorBoard; a resumed run hides the steps that it repeats."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writer: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.directory), purge_step=state.global_step + 1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        if self.writer is not None:
            for name, value in (logs or {}).items():
                self.writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Intervals(TrainerCallback):
    """Logs, evaluates and saves as often as this launch says; the Trainer would go on as the checkpoint's did."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)


class Console(TrainerCallback):
    """A progress bar on terminals and one line per record everywhere."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            # disable=None: no bar where stderr is not a terminal.
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", disable=None, dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        if self.bar is not None and logs:
            # The reader of a pipe and the window of a terminal may go before the run ends.
            with contextlib.suppress(OSError):
                self.bar.write(f"step {state.global_step}/{state.max_steps}  {console_line(logs)}", file=sys.stdout)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def console_line(logs: Logs) -> str:
    """The figures of one record that fit on a line: per-layer ones are left to the files."""
    if "tokens_per_second" not in logs:
        return "  ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in logs.items())
    parts = [f"{logs['skipped_steps']:.0f} skipped"] if logs.get("skipped_steps") else []
    if "loss" in logs:  # else all steps since the last record were skipped
        parts.append(f"loss {logs['loss']:.4f}")
    if "cross_entropy" in logs:
        parts.append(f"ce {logs['cross_entropy']:.4f}")
    parts += [f"{name.removeprefix('aux/')} {logs[name]:.4f}" for name in logs if name.startswith("aux/")]
    parts += [f"lr {logs['learning_rate']:.2e}"]
    parts += [f"grad {logs['grad_norm']:.2f}"] if "grad_norm" in logs else []
    for side in ("attn", "ffn"):
        if f"router/{side}/max_violation" in logs:
            worst, dead = logs[f"router/{side}/max_violation"], logs[f"router/{side}/dead_experts"]
            parts.append(f"{side} load max +{worst:.0%}, dead {dead:.0f}")
    for name in (name for name in logs if re.fullmatch(r"router/[^/]+/(attn|ffn)/used", name)):
        parts.append(f"{name.removeprefix('router/').removesuffix('/used')} used {logs[name]:.1%}")
    parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    parts += [f"mfu {logs['mfu']:.1%}"] if "mfu" in logs else []
    return "  ".join(parts)


class Stop(TrainerCallback):
    """
    Ends training after the current step, with a checkpoint: on SIGTERM, Ctrl-C, a closed terminal, a dead launcher, a
    time limit.

    All ranks stop at the same step and see the same time. A second Ctrl-C leaves at once.

    Args:
        clock: set once per step.

    Attributes:
        exit_code: 128 + the signal's number if training was interrupted (as shells count), else 0.
        requested_at: when this rank was asked to stop or noticed that its launcher has gone, by `time.monotonic`.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.exit_code = 0
        self.requested_at: float | None = None
        self._requested = 0
        self._agreed = 0
        self._interrupted = False
        self._previous: dict[int, Any] = {}
        self._launcher = Launcher()
        self._group: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.clock.start()
        signals = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which is how nohup starts a run
            signals.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}
        if args.world_size > 1:
            # A group of its own on the host, so that asking every step does not wait for the device.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Before the learning rate of the next step is computed, which follows the clock.
        self._agree()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._agreed or self.clock.share == 1.0:
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True
        if self._agreed and state.global_step < state.max_steps:
            self.exit_code = self._agreed

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(128 + signal.SIGINT)
        self._interrupted |= number == signal.SIGINT
        # The first signal counts: the DeepSpeed launcher follows Ctrl-C up with SIGTERM.
        self._request(128 + number)
        if is_main_process():
            hint = "; press Ctrl-C again to leave at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # the terminal is gone
                os.write(2, f"\nfinishing this step and saving{hint}\n".encode())

    def _request(self, exit_code: int) -> None:
        if not self._requested:
            self._requested, self.requested_at = exit_code, time.monotonic()

    def _agree(self) -> None:
        if not self._requested and self._launcher.is_gone():
            self._request(128 + signal.SIGTERM)
        agreed = torch.tensor([self._requested, self.clock.now()], dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self._group)
        self._agreed, self.clock.seconds = int(agreed[0]), float(agreed[1])


class SelectionBias(TrainerCallback):
    """Moves the routers' selection biases once per optimizer step (arXiv:2408.15664)."""

    def __init__(self, step_loads: RouterLoads) -> None:
        self.step_loads = step_loads

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.step_loads.all_reduce()
        sums = self.step_loads.sums
        model.update_selection_bias(tuple(sums.get("ffn", ())), tuple(sums.get("attn", ())))
