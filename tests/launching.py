"""Processes for tests: whole launches as users start them, in a process group of their own, and cheap gloo ranks."""

import io
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train" / "pretrain.py"
CONFIG = ROOT / "configs" / "train" / "tiny_test.yaml"
# Seconds; nothing here takes as long unless it hangs.
TIMEOUT = 120
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
# Inherited by all processes of a launch, whatever group or parent they end up with.
_TOKEN = "MODMOE_TEST_LAUNCH"


# ---- Launches ----


def deepspeed_command(processes: int, port: int | None = None) -> list[str]:
    """The `deepspeed` launcher on this machine, to be followed by script and arguments."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
    return [sys.executable, *launcher, "--master_port", str(port or free_port())]


class Launch:
    """
    A running command; output goes to a file, because orphaned ranks would keep a pipe open.

    Args:
        log: gets stdout and stderr; its directory is the working directory.
        command: what to run.
        environment: variables beyond `ENVIRONMENT`.
    """

    def __init__(self, log: Path, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.log = log
        self._token = uuid.uuid4().hex
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT, **(environment or {}), _TOKEN: self._token},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=log.parent,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Exit code of the command."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {timeout} s:\n{self.output}") from None

    def wait_for(self, text: str) -> None:
        """Until the output holds the text."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output:
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.output}"
            assert self.process.poll() is None or text in self.output, self.output
            time.sleep(0.02)

    def wait_for_group(self, timeout: float = TIMEOUT) -> None:
        """Until no process is left, those that outlive the launcher or leave its group included."""
        deadline = time.monotonic() + timeout
        while _group_lives(self.process.pid) or self.processes():
            assert time.monotonic() < deadline, f"{self.processes()} are left:\n{self.output}"
            self.process.poll()  # a child that nobody waits for stays in its group
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """All living processes that descend from this launch, whoever is their parent now."""
        return [process for process in psutil.process_iter() if _variable(process, _TOKEN) == self._token]

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank -> its living process."""
        found = {_variable(process, "RANK"): process for process in self.processes()}
        return {int(rank): process for rank, process in sorted(found.items()) if rank}

    def node_launchers(self) -> list[psutil.Process]:
        """The processes of `deepspeed` that started the ranks of their node."""
        return [p for p in self.processes() if "deepspeed.launcher.launch" in p.cmdline()]

    def kill(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _variable(process: psutil.Process, name: str) -> str:
    try:
        return process.environ().get(name, "")
    except (psutil.Error, OSError):  # gone, dead, or another user's
        return ""


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Logs, and the cache of data that all runs share."""
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def start(workspace):
    """Start any command; what is left of it at the end is killed."""
    started = []

    def start(name, command, environment=None):
        log = workspace / f"{name}-{len(list(workspace.iterdir()))}.log"
        started.append(Launch(log, command, environment))
        return started[-1]

    yield start
    for run in started:
        run.kill()


@pytest.fixture(scope="module")
def launch(start, workspace):
    """Start a run of the tiny config in its own output directory."""

    def launch(name, *arguments, processes=None, config=CONFIG):
        prefix = [sys.executable] if processes is None else deepspeed_command(processes)
        output = ["--output_dir", str(workspace / name), "--data.cache_dir", str(workspace / "cache")]
        return start(name, [*prefix, str(SCRIPT), "--config", str(config), *output, *arguments])

    return launch


# ---- Gloo ranks without a launcher ----


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT, joined: bool = True
) -> list[Any]:
    """
    Call `function(*args)` in processes that are joined by gloo, and return their results in the order of ranks.

    Ranks are forked from a server that has imported torch and modmoe once: a call costs a fraction of a second.
    The function is found by its name in its module: tests, helpers and arguments must be importable or picklable.
    Results travel through `torch.save`.

    Args:
        function: of the arguments alone; rank and world size are `torch.distributed`'s.
        world_size: how many ranks.
        args: of the function.
        timeout: seconds until it is given up.
        joined: whether the ranks have a process group; else the function makes it from the environment.

    Raises:
        AssertionError: if a rank raises, dies or hangs, with all tracebacks; no rank is left.
    """
    context = _forkserver()
    port = free_port()
    ranks, pipes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(function, args, rank, world_size, port, theirs, joined), daemon=True
        )
        process.start()
        theirs.close()
        ranks.append(process)
        pipes.append(ours)
    try:
        return _results(pipes, timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "transformers", "modmoe"])
    os.environ.setdefault("OMP_NUM_THREADS", ENVIRONMENT["OMP_NUM_THREADS"])
    return context


def _rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    pipe: Connection,
    joined: bool,
) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= ENVIRONMENT
    torch.set_num_threads(1)
    buffer = io.BytesIO()
    try:
        if joined:
            dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT / 2))
        torch.save((True, function(*args)), buffer)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still talks to it
    except BaseException:
        buffer = io.BytesIO()
        torch.save((False, f"rank {rank}: {traceback.format_exc()}"), buffer)
    pipe.send_bytes(buffer.getvalue())
    pipe.close()
    # Neither destructors nor exit handlers: what a rank holds must not decide how the test ends.
    os._exit(0)


def _results(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: list[str] = []
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            failures.append(f"ranks {missing} did not end")
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            succeeded, results[rank] = _receive(pipe, rank)
            if not succeeded:
                failures.append(results[rank])
                # The others wait for this one in vain; what they say within a moment may still help.
                deadline = min(deadline, time.monotonic() + 2)
    assert not failures, "\n".join(failures)
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection, rank: int) -> tuple[bool, Any]:
    try:
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        return False, f"rank {rank} died"
