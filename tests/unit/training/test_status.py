"""status.json, what is said about it, and the thread that ends a process that cannot go on."""

import json
import subprocess
import sys
import time

import pytest

from modmoe.training.status import RunStatus, judge, main


@pytest.fixture(autouse=True)
def rank_zero(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_a_run_is_followed_from_start_to_end(tmp_path):
    status = RunStatus(tmp_path)
    well, said = judge(tmp_path)
    assert well
    assert said.startswith("preparing (process ")
    status.update(state="running", step=3, steps=10, step_time=time.time() - 2, loss=1.5, skipped_steps=1)
    status.update(checkpoint="checkpoint-2")
    status._beat = 0.0
    status.beat()
    assert judge(tmp_path)[1].endswith(
        "step 3 of 10, 2 s ago, loss 1.5000, 1 steps skipped, last checkpoint checkpoint-2"
    )
    status.end("finished", 0)
    well, said = judge(tmp_path, now=time.time() + 1e6)
    assert well
    assert "finished" in said
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 0


def test_a_heartbeat_that_stands_still_is_a_dead_run(tmp_path):
    RunStatus(tmp_path)
    well, said = judge(tmp_path, now=time.time() + 300)
    assert not well
    assert said.startswith("no heartbeat for 300 s: process ")
    assert " is gone or stuck, before the first step" in said


@pytest.mark.parametrize("state", ["failed", "diverged", "interrupted"])
def test_an_end_that_is_not_well_says_why(tmp_path, state, capsys):
    RunStatus(tmp_path).end(state, 1, "the disk is full")
    assert main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(state)
    assert printed.strip().endswith("the disk is full")


def test_a_heartbeat_is_written_every_few_seconds_only(tmp_path):
    status = RunStatus(tmp_path)
    before = (tmp_path / "status.json").stat().st_ino
    status.beat()
    assert (tmp_path / "status.json").stat().st_ino == before


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    RunStatus(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_status_is_worth_the_run(tmp_path):
    RunStatus(tmp_path / "nowhere").end("finished", 0)


def test_places_without_a_run(tmp_path, capsys):
    assert judge(tmp_path) == (False, f"{tmp_path} holds no status.json: no run has begun there")
    (tmp_path / "status.json").write_text("{")
    assert "cannot be read" in judge(tmp_path)[1]
    assert main([]) == 2


WATCHED = """
import sys, time
from pathlib import Path
from modmoe.training.status import RunStatus
from modmoe.training.ranks.team import Team
from modmoe.training.ranks.watchdog import Watchdog
with Watchdog(Team(0, 1, None), stuck_seconds=0.2) as watchdog:
    watchdog.status = RunStatus(Path(sys.argv[1]))
    watchdog.progress()
    def wait_for_ever():
        time.sleep(60)
    wait_for_ever()
"""


def test_a_process_without_progress_leaves_and_shows_where_it_was(tmp_path):
    result = subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "no progress for 0 s (health.stuck_minutes)" in result.stderr
    assert "in wait_for_ever" in result.stderr
    assert judge(tmp_path)[1].startswith("failed")
