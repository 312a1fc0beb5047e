"""
How a run is doing, or how it ended: `status.json` in its output directory.

    python -m modmoe.training.status OUTPUT_DIR

prints one sentence, and exits with 0 if the run is well or finished, with 1 otherwise. Believe this file and not the
launcher's exit code: DeepSpeed's is 0 when its part on a node is killed, and 143 on SIGTERM while ranks still save.
Rank 0 writes the file; a process that dies leaves "running" behind and a heartbeat that stands still.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from modmoe.training.ranks.bootstrap import is_main_process, world_size

FILE = "status.json"
HEARTBEAT_SECONDS = 5.0
_SILENT_SECONDS = 60.0  # a machine under load, or a network file system that shows files late


class RunStatus:
    """
    Keeps status.json up to date; does nothing on ranks other than 0.

    The file is replaced as a whole, so that a reader never sees half of it. Whatever keeps it from being written is
    ignored: no status is worth the run.

    Args:
        output_dir: of the run; exists.
    """

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / FILE
        self._lock = threading.Lock()
        self._beat = 0.0
        self._fields: dict[str, Any] = {
            "state": "preparing",
            "message": "",
            "exit_code": None,
            "started": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": world_size(),
        }
        self._write()

    def update(self, **fields: Any) -> None:
        """Note fields; they are written with the next heartbeat."""
        self._fields = self._fields | fields  # as a whole: another thread may be writing the file

    def beat(self) -> None:
        """Write the file if the last time is some seconds ago. Called often, from any thread."""
        if time.time() - self._beat >= HEARTBEAT_SECONDS:
            self._write()

    def end(self, state: str, exit_code: int, message: str = "") -> None:
        """
        Note the end of the run.

        Args:
            state: "finished", "interrupted", "diverged" or "failed".
            exit_code: of this process.
            message: why, in a sentence.
        """
        self.update(state=state, exit_code=exit_code, message=message)
        self._write()

    def _write(self) -> None:
        if not is_main_process():
            return
        self._beat = time.time()
        temporary = self._path.with_name(f".{FILE}.tmp")
        with self._lock, contextlib.suppress(OSError):
            temporary.write_text(json.dumps(self._fields | {"heartbeat": self._beat}, indent=1))
            os.replace(temporary, self._path)


def judge(directory: Path, now: float | None = None) -> tuple[bool, str]:
    """
    Whether a run is well, or has finished, and a sentence that says so.

    Args:
        directory: the run's output directory.
        now: seconds since the epoch; None: by this machine's clock.
    """
    try:
        status = json.loads((directory / FILE).read_text())
    except FileNotFoundError:
        return False, f"{directory} holds no {FILE}: no run has begun there"
    except (OSError, ValueError) as error:
        return False, f"{directory / FILE} cannot be read: {error}"
    now = time.time() if now is None else now
    place, silent = f"process {status['pid']} on {status['host']}", now - status["heartbeat"]
    if status["state"] in ("preparing", "running") and silent > _SILENT_SECONDS:
        return False, f"no heartbeat for {silent:.0f} s: {place} is gone or stuck, {_progress(status, now)}"
    sentence = f"{status['state']} ({place}), {_progress(status, now)}"
    sentence += f": {status['message']}" if status["message"] else ""
    return status["state"] in ("preparing", "running", "finished"), sentence


def _progress(status: dict[str, Any], now: float) -> str:
    if "step" not in status:
        return "before the first step"
    parts = [f"step {status['step']} of {status['steps']}"]
    if status["state"] == "running" and status.get("step_time"):
        parts[0] += f", {now - status['step_time']:.0f} s ago"
    if status.get("loss") is not None:
        parts.append(f"loss {status['loss']:.4f}")
    if status.get("skipped_steps"):
        parts.append(f"{status['skipped_steps']} steps skipped")
    parts.append(f"last checkpoint {status['checkpoint']}" if status.get("checkpoint") else "no checkpoint")
    return ", ".join(parts)


def main(arguments: list[str]) -> int:
    """Print the judgement on one output directory."""
    if len(arguments) != 1:
        print("usage: python -m modmoe.training.status OUTPUT_DIR", file=sys.stderr)
        return 2
    well, sentence = judge(Path(arguments[0]))
    print(sentence)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
