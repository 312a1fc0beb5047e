"""Several pairs at a time, each in a process of its own, with a view of how far they are."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from modmoe.training.errors import RunError
from modmoe.training.ranks.launcher import JOB, Launcher
from modmoe.training.status import FILE as STATUS_FILE

LOG = "log.txt"
_POLL_SECONDS = 0.2
_LINE_SECONDS = 30.0
# A launcher's, which would make one team of all processes; torchrun sets more that begin with TORCHELASTIC_.
_OF_A_TEAM = (
    "RANK",
    "LOCAL_RANK",
    "CROSS_RANK",
    "WORLD_SIZE",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class Jobs:
    """
    Processes that train stages, some at a time.

    Args:
        command: of a stage.
        directory: of a stage's run; its output goes to `log.txt` there.
        limit: how many run at a time.
        view: told of every stage.
    """

    def __init__(
        self,
        command: Callable[[int], Sequence[str]],
        directory: Callable[[int], Path],
        limit: int,
        view: "ProgressView",
    ) -> None:
        self._command = command
        self._directory = directory
        self._limit = limit
        self._view = view
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._codes: dict[int, int] = {}
        self._devices: dict[int, str] = {}
        self._logged: dict[int, int] = {}
        self._signal = 0
        self._launcher = Launcher()

    def run(self, stages: Sequence[int]) -> int:
        """
        Train stages until all have ended.

        Returns:
            0, or 128 + the number of the signal that interrupted them; they have saved by then.

        Raises:
            RunError: if one failed, once the others have ended; names its log.
        """
        waiting = list(stages)
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._running or (waiting and not self._signal):
                while waiting and len(self._running) < self._limit and not self._signal:
                    self._start(waiting.pop(0))
                time.sleep(_POLL_SECONDS)
                if not self._signal and self._launcher.is_gone():
                    self._handle(signal.SIGTERM)
                for stage, process in list(self._running.items()):
                    code = process.poll()
                    if code is not None:
                        del self._running[stage]
                        self._codes[stage] = code
                    self._view.update(stage, self._state(stage, process, code))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for process in self._running.values():  # after an exception of our own
                process.terminate()
        if self._signal:
            return 128 + self._signal
        failed = {stage: code for stage, code in self._codes.items() if code}
        if failed:
            stage = min(failed)
            log = self._directory(stage) / LOG
            reason = _last_line(log, self._logged[stage])
            raise RunError(
                f"training of stage {', '.join(map(str, sorted(failed)))} failed; stage {stage}: {reason} "
                f"(exit code {failed[stage]}, {log})"
            )
        return 0

    def _start(self, stage: int) -> None:
        directory = self._directory(stage)
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / LOG).open("ab") as log:
            self._logged[stage] = log.tell()
            self._running[stage] = subprocess.Popen(
                self._command(stage),
                env=self._environment(stage),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Else a terminal gives them Ctrl-C as well, and at the second one they leave without saving.
                start_new_session=True,
            )
        if self._signal:  # it came before there was a process to pass it on to
            self._running[stage].send_signal(self._signal)
        self._view.update(stage, "starting")

    def _environment(self, stage: int) -> dict[str, str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _OF_A_TEAM and not name.startswith("TORCHELASTIC_")
        }
        environment[JOB] = "1"  # it watches this process, and saves if that dies
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self._limit)))
        if torch.cuda.device_count() > 1:
            self._devices[stage] = environment["CUDA_VISIBLE_DEVICES"] = self._free_device()
        return environment

    def _free_device(self) -> str:
        """One on which fewest processes run; each process sees one."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        taken = [self._devices[stage] for stage in self._running]
        return min(devices, key=taken.count)

    def _state(self, stage: int, process: subprocess.Popen[bytes], code: int | None) -> str:
        if code is not None:
            return "finished" if code == 0 else f"ended with exit code {code}"
        try:
            status = json.loads((self._directory(stage) / STATUS_FILE).read_text())
        except (OSError, ValueError):
            return "starting"
        if status["pid"] != process.pid or "step" not in status:  # of an earlier launch
            return "starting"
        loss = "" if status.get("loss") is None else f", loss {status['loss']:.4f}"
        return f"step {status['step']} of {status['steps']}{loss}"

    def _handle(self, number: int, _: FrameType | None = None) -> None:
        self._signal = self._signal or number
        for process in self._running.values():
            process.send_signal(number)


class ProgressView:
    """
    One line per stage: redrawn on a terminal, elsewhere printed when a stage starts, ends, and now and then.

    Args:
        stages: to show.
        output: where to.
    """

    def __init__(self, stages: Sequence[int], output: TextIO) -> None:
        self._states = {stage: "waiting" for stage in stages}
        self._printed: dict[int, float] = {}
        self._output = output
        self._drawn = False

    def update(self, stage: int, state: str) -> None:
        """Show what a stage is doing."""
        before, self._states[stage] = self._states.get(stage), state
        if before == state:
            return
        if self._output.isatty():
            self._redraw()
            return
        running = state.startswith("step") and str(before).startswith("step")
        if not running or time.monotonic() - self._printed.get(stage, 0.0) > _LINE_SECONDS:
            self._printed[stage] = time.monotonic()
            print(f"stage {stage}: {state}", file=self._output, flush=True)

    def _redraw(self) -> None:
        up = f"\x1b[{len(self._states)}F" if self._drawn else ""
        lines = "".join(f"\x1b[2Kstage {stage}: {state}\n" for stage, state in self._states.items())
        print(up + lines, end="", file=self._output, flush=True)
        self._drawn = True


def _last_line(log: Path, start: int) -> Any:
    """Of what was written from a byte on; before it are earlier launches."""
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
