"""How a run of several processes ends when its start is wrong or a process dies: soon, by all, with one message."""

import os
import signal
import sys
import time

import psutil
import pytest

from modmoe.training.checkpoints.checkpoint import checkpoints, defect
from modmoe.training.status import judge
from tests.launching import CONFIG, SCRIPT, deepspeed_command, free_port

LONG = ["--optimization.steps", "100000", "--evaluation.interval", "0", "--checkpoint.interval", "100000"]


@pytest.fixture
def start_rank(start, workspace):
    """One process of a world, as Slurm starts it: without a launcher."""
    port = str(free_port())

    def start_rank(name, rank, world, *arguments):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        environment = {key: str(value) for key, value in environment.items()} | {"MASTER_PORT": port}
        paths = ["--output_dir", str(workspace / name), "--data.cache_dir", str(workspace / "cache")]
        return start(
            f"{name}-{rank}", [sys.executable, str(SCRIPT), "--config", str(CONFIG), *paths, *arguments], environment
        )

    return start_rank


def errors(*runs):
    return [line for run in runs for line in run.output.splitlines() if line.startswith("error: ")]


def test_ranks_with_different_configs_end_before_training(start_rank):
    runs = [start_rank("differ", rank, 2, "--seed", str(rank)) for rank in range(2)]
    assert [run.wait() for run in runs] == [2, 2]
    (error,) = errors(*runs)
    assert "ranks do not agree before training: seed is 0 on rank 0 and 1 on rank 1" in error
    assert not any("Traceback" in run.output for run in runs)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_nobody_survives_a_rank_that_is_killed_together_with_the_launcher(launch, workspace, victim):
    run = launch(f"killed-{victim}", *LONG, processes=2)
    run.wait_for("step 5/")
    ranks = run.ranks()
    survivor = ranks[1 - victim]
    for process in [*run.node_launchers(), ranks[victim]]:
        process.kill()
    run.process.kill()
    begun = time.monotonic()
    assert survivor.is_running()
    run.wait_for_group(timeout=15)
    assert time.monotonic() - begun < 10
    assert f"error: rank {victim} died" in run.output
    assert "Traceback" not in run.output
    well, said = judge(workspace / f"killed-{victim}", now=time.time() + 100)
    assert not well
    assert said.startswith("no heartbeat for 1") if victim == 0 else "failed" in said and said.endswith("rank 1 died")


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_within_the_time_given(start_rank):
    run = start_rank("incomplete", 0, 2, "--health.join_minutes", "0.05")
    assert run.wait(60) == 1
    (error,) = errors(run)
    assert "rank 1 of 2 did not come to 'start' within 3 s" in error


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(start_rank):
    first = start_rank("port", 0, 2)
    time.sleep(1)
    second = start_rank("port", 0, 2)
    ended = _first_to_end(first, second)
    assert ended.process.returncode == 1
    assert "is taken, perhaps by another run" in errors(ended)[0]


def _first_to_end(*runs):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for run in runs:
            if run.process.poll() is not None:
                return run
        time.sleep(0.1)
    raise AssertionError("both wait")


@pytest.mark.slow
def test_a_mistake_that_one_rank_alone_finds_ends_all(start_rank, tmp_path):
    """Rank 1 cannot write its cache; rank 0 would wait for it at the next step."""
    (tmp_path / "file").write_text("")
    runs = [start_rank("alone", 0, 2), start_rank("alone", 1, 2, "--data.cache_dir", str(tmp_path / "file" / "cache"))]
    assert [run.wait(60) for run in runs] == [1, 1]
    assert any("Not a directory" in error for error in errors(*runs))


STUCK = """
import sys, time
from pathlib import Path
from modmoe.training.status import RunStatus
from modmoe.training.ranks.team import join
from modmoe.training.ranks.watchdog import Watchdog
team = join(30, 600)
with Watchdog(team, stuck_seconds=600) as watchdog:
    watchdog.status = RunStatus(Path(sys.argv[-1]))
    print("waiting", flush=True)
    while True:  # as in a collective over NCCL: no exception comes
        time.sleep(600)
"""


@pytest.mark.slow
def test_a_main_thread_that_hangs_is_ended_all_the_same(start, workspace, tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    run = start("stuck", [*deepspeed_command(2), str(script), str(tmp_path)], {"DS_ACCELERATOR": "cpu"})
    deadline = time.monotonic() + 60
    while run.output.count("waiting") < 2:
        assert time.monotonic() < deadline, run.output
        time.sleep(0.1)
    ranks = run.ranks()
    for process in [*run.node_launchers(), ranks[1]]:
        process.kill()
    run.process.kill()
    psutil.wait_procs([ranks[0]], timeout=10)
    assert not ranks[0].is_running() or ranks[0].status() == psutil.STATUS_ZOMBIE
    assert "error: rank 1 died" in run.output
    assert judge(tmp_path)[1].endswith("rank 1 died")


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_leave(launch, workspace):
    run = launch("orphaned", *LONG, processes=2)
    run.wait_for("step 5/")
    for process in run.node_launchers():
        os.kill(process.pid, signal.SIGKILL)
    run.process.kill()
    run.wait_for_group(timeout=30)
    (saved,) = checkpoints(workspace / "orphaned")
    assert defect(saved) is None
    assert "interrupted at step" in run.output
    assert " and saved within " in run.output
    assert judge(workspace / "orphaned")[1].startswith("interrupted")
