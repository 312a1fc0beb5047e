"""Running `train/pretrain.py` as users do, in a process group of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "pretrain.py"
CONFIG = ROOT / "configs" / "train" / "tiny_test.yaml"
TIMEOUT = 120


class Launch:
    """A running `train/pretrain.py`; output goes to a file, because orphaned ranks would keep a pipe open."""

    def __init__(self, log: Path, *arguments: str, processes: int | None = None) -> None:
        command = [sys.executable]
        if processes is not None:
            launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
            command += [*launcher, "--master_port", str(_free_port())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, str(SCRIPT), *arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=log.parent,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """Exit code of the command."""
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {TIMEOUT} s:\n{self.output}") from None

    def wait_for(self, text: str) -> None:
        """Until the output holds the text."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output:
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.output}"
            assert self.process.poll() is None or text in self.output, self.output
            time.sleep(0.02)

    def wait_for_group(self) -> None:
        """Until no process of the group is left, those that outlive the launcher included."""
        deadline = time.monotonic() + TIMEOUT
        while _group_lives(self.process.pid):
            assert time.monotonic() < deadline, f"processes are left:\n{self.output}"
            time.sleep(0.1)

    def kill(self) -> None:
        if _group_lives(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Logs, and the cache of data that all runs share."""
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def launch(workspace):
    """Start a run of the tiny config in its own output directory."""
    started = []

    def start(name, *arguments, processes=None, config=CONFIG):
        log = workspace / f"{name}-{len(list(workspace.iterdir()))}.log"
        output = ["--output_dir", str(workspace / name), "--data.cache_dir", str(workspace / "cache")]
        started.append(Launch(log, "--config", str(config), *output, *arguments, processes=processes))
        return started[-1]

    yield start
    for run in started:
        run.kill()
