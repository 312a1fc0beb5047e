"""What happens to a run of two ranks when a part of it dies, stops or is missing: the rows of docs/distributed.md."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.checkpoint import checkpoints, defect, latest_complete, step_of
from tests.launching import CONFIG, SCRIPT, TIMEOUT, Launch, deepspeed_command, free_port

pytest.importorskip("deepspeed")

EVERY = 10
# Without an end within the life of a test, and a checkpoint every few steps.
ENDLESS = ["--optimization.steps", "100000", "--checkpoint.interval", str(EVERY), "--evaluation.interval", "0"]
ENDLESS += ["--logging.tensorboard", "false"]


@dataclass(frozen=True)
class Run:
    """A launch of train/pretrain.py and its output directory."""

    launched: Launch
    out: Path

    def wait_for_step(self, count=1):
        """Until `count` more steps are recorded than now."""
        target, deadline = self.step() + count, time.monotonic() + TIMEOUT
        while self.step() < target:
            assert time.monotonic() < deadline, f"no step {target}:\n{self.launched.output}"
            assert self.launched.process.poll() is None, self.launched.output
            time.sleep(0.05)

    def wait_for_checkpoint(self):
        deadline = time.monotonic() + TIMEOUT
        while self.saved() == 0:
            assert time.monotonic() < deadline, f"no checkpoint:\n{self.launched.output}"
            time.sleep(0.05)

    def step(self):
        """The newest step in metrics.jsonl."""
        return max((record["step"] for record in read_metrics(self.out / "metrics.jsonl")), default=0)

    def saved(self):
        """The step of the newest complete checkpoint; 0 without one."""
        complete = [checkpoint for checkpoint in checkpoints(self.out) if defect(checkpoint) is None]
        return step_of(complete[-1]) if complete else 0

    def status(self):
        """How the run ended by status.json, and rank 0's exit code."""
        path = self.out / "status.json"
        if not path.exists():  # the run had not come as far as its output directory
            return "none"
        status = json.loads(path.read_text())
        return f"{status['state']}, {status['exit_code']}"


@pytest.fixture
def begin(launch, workspace):
    """Start an endless run of two ranks in an output directory of that name."""

    def begin(name, *options):
        return Run(launch(name, *ENDLESS, *options, processes=2), workspace / name)

    return begin


@pytest.fixture
def suffer(record_property):
    """Let something happen to a run; returns the exit code of the launcher when no process is left."""

    def suffer(run, event, act, note=""):
        begun = time.monotonic()
        act()
        code = run.launched.wait()
        launcher_seconds = time.monotonic() - begun
        run.launched.wait_for_group()
        seconds = time.monotonic() - begun
        shell_code = code if code >= 0 else 128 - code
        lost = max(0, run.step() - run.saved())
        row = [
            event,
            shell_code,
            f"{launcher_seconds:.0f} s",
            f"{seconds:.0f} s",
            note or f"{lost} steps",
            run.status(),
        ]
        record_property("fault", row)
        return code

    return suffer


def test_a_rank_pauses_and_another_is_killed_then_sigterm_saves(begin, suffer):
    """Two launches with two events each: a paused rank holds the run up, a killed one ends it, SIGTERM saves."""
    run = begin("killed")
    run.wait_for_checkpoint()
    ranks = run.launched.ranks()
    assert sorted(ranks) == [0, 1]

    ranks[1].suspend()
    time.sleep(1)
    held = run.step()
    time.sleep(1)
    assert run.step() <= held + 1
    ranks[1].resume()
    run.wait_for_step(3)

    assert suffer(run, "`kill -9` of a rank", ranks[1].kill) != 0
    # A checkpoint every EVERY steps, one of which may have been half written.
    assert run.step() - run.saved() <= 2 * EVERY
    killed_at = run.saved()
    assert killed_at > 0

    again = begin("killed")
    again.launched.wait_for(f"resuming from {again.out / f'checkpoint-{killed_at}'}")
    again.wait_for_step(2)
    assert suffer(again, "SIGTERM to `deepspeed`", again.launched.process.terminate) == -signal.SIGTERM
    assert again.saved() == again.step() > killed_at


@pytest.mark.slow
def test_the_launcher_of_a_node_is_killed(begin, suffer):
    """DeepSpeed reports success; the ranks notice, save and leave."""
    run = begin("orphaned")
    run.wait_for_step(3)
    (launcher,) = run.launched.node_launchers()
    suffer(run, "`kill -9` of a node's launcher", launcher.kill)
    assert run.saved() == run.step()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_rank_stops_all(begin, suffer, rank):
    run = begin(f"terminated-{rank}")
    run.wait_for_step(3)
    assert suffer(run, f"SIGTERM to rank {rank}", run.launched.ranks()[rank].terminate) != 0
    assert run.saved() == run.step()


@pytest.mark.slow
def test_ctrl_c_saves(begin, suffer):
    run = begin("interrupted")
    run.wait_for_step(3)
    suffer(run, "Ctrl-C", lambda: os.killpg(run.launched.process.pid, signal.SIGINT))
    assert run.saved() == run.step()


@pytest.mark.slow
def test_a_rank_that_stops_for_ever(begin, suffer):
    run = begin("stuck", "--health.stuck_minutes", "0.2")
    run.wait_for_checkpoint()
    stopped = run.launched.ranks()[1]
    stopped.suspend()
    # The launcher cannot end a stopped rank before its own timer of 30 s.
    suffer(run, "SIGSTOP of a rank, for ever (`health.stuck_minutes: 0.2`)", lambda: None)
    assert run.saved() > 0
    assert not stopped.is_running()


@pytest.mark.slow
def test_killed_while_saving(begin, suffer):
    """At every step a save: the checkpoint before is what the next launch finds."""
    run = begin("half-saved", "--checkpoint.interval", "1")
    run.wait_for_step(5)
    deadline = time.monotonic() + TIMEOUT
    while defect(checkpoints(run.out)[-1]) is None:  # until one is being written
        assert time.monotonic() < deadline
    suffer(run, "`kill -9` of all ranks during a save", lambda: [p.kill() for p in run.launched.ranks().values()])
    saved = run.saved()
    assert saved > 0
    again = begin("half-saved", "--checkpoint.interval", "1")
    again.launched.wait_for("resuming from")
    again.launched.kill()
    assert f"resuming from {again.out / f'checkpoint-{saved}'}" in again.launched.output


@pytest.mark.slow
def test_a_truncated_shard_is_skipped(begin, suffer):
    run = begin("truncated")
    run.wait_for_step(EVERY + 3)
    run.launched.process.terminate()
    run.launched.wait()
    run.launched.wait_for_group()
    newest = checkpoints(run.out)[-1]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    good = latest_complete(run.out)
    assert good != newest
    again = begin("truncated")
    again.launched.wait_for(f"resuming from {good}")
    assert f"skipping checkpoint {newest}: {largest.relative_to(newest)} has " in again.launched.output
    again.wait_for_step()
    suffer(again, "(then) SIGINT to `deepspeed` alone", lambda: again.launched.process.send_signal(signal.SIGINT))


@pytest.mark.slow
def test_a_full_disk(begin, tmp_path, suffer):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system")
    try:
        keep = ["--checkpoint.keep", "10", "--output_dir", str(disk / "run")]
        run = Run(begin("full", *keep).launched, disk / "run")
        code = suffer(run, "the disk of `output_dir` is full", lambda: None)
        assert code == 1, run.launched.output
        assert "MB of its disk are free" in run.launched.output
        assert run.saved() > 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_port_that_is_taken(start, workspace, suffer):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = deepspeed_command(2, taken.getsockname()[1])
        out = ["--output_dir", str(workspace / "port"), "--data.cache_dir", str(workspace / "cache")]
        launched = start("port", [*command, str(SCRIPT), "--config", str(CONFIG), *out])
        run = Run(launched, workspace / "port")
        assert suffer(run, "the master port is taken", lambda: None, "nothing begun") != 0


@pytest.mark.slow
def test_a_hostfile_with_an_unknown_host(start, workspace, suffer):
    hosts = workspace / "unknown-hosts"
    hosts.write_text("no-such-host slots=1\nnor-this slots=1\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-H", str(hosts)]
    out = workspace / "unknown"
    run = Run(start("unknown", [*launcher, str(SCRIPT), "--config", str(CONFIG), "--output_dir", str(out)]), out)
    assert suffer(run, "a hostfile names an unknown host, SSH", lambda: None, "nothing begun") != 0
    assert not out.exists()


@pytest.mark.slow
def test_a_rank_of_another_node_is_killed(start, nodes, workspace, suffer):
    hosts = workspace / "two-hosts"
    hosts.write_text("".join(f"{node.address} slots=1\n" for node in nodes))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-H", str(hosts), "--no_ssh"]
    out, port = workspace / "two-nodes", str(free_port())
    options = [*ENDLESS, "--output_dir", str(out), "--data.cache_dir", str(workspace / "cache")]
    runs = []
    for number, node in enumerate(nodes):
        where = ["--node_rank", str(number), "--master_addr", nodes[0].address, "--master_port", port]
        command = [*node.prefix, *launcher, *where, str(SCRIPT), "--config", str(CONFIG), *options]
        runs.append(Run(start(f"two-nodes-{number}", command, node.environment), out))
    first, second = runs
    first.wait_for_checkpoint()
    (rank,) = second.launched.ranks().values()
    assert suffer(first, "`kill -9` of a rank on another node", rank.kill) != 0
    assert second.launched.wait() != 0
    second.launched.wait_for_group()
