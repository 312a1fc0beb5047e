"""Which processes a run cannot do without."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.launching import ROOT

ASKED = """
import sys
from modmoe.training.ranks.launcher import Launcher
launcher = Launcher()
print("ready", flush=True)
for line in sys.stdin:
    print(launcher.is_gone(), flush=True)
"""
LAUNCHERS = ("MODMOE_JOB", "TORCHELASTIC_RUN_ID", "CROSS_RANK")


@pytest.fixture
def asked(request):
    """Of a process below two shells: ways to kill the outer and the inner one, and to ask if the launcher is gone."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    python = f"'{sys.executable}' -c '{ASKED}'; true"
    outer = subprocess.Popen(
        ["sh", "-c", 'sh -c "$0"; true', python],
        env=environment | {"PYTHONPATH": str(ROOT)} | ({request.param: "0"} if request.param else {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert outer.stdout.readline() == "ready\n"
    inner, process = psutil.Process(outer.pid).children(recursive=True)

    def kill_inner():
        inner.kill()
        while process.ppid() == inner.pid:
            time.sleep(0.01)

    def kill_outer():
        outer.kill()
        outer.wait()

    def is_gone():
        outer.stdin.write("\n")
        outer.stdin.flush()
        return outer.stdout.readline() == "True\n"

    with outer:
        yield kill_outer, kill_inner, is_gone
        process.kill()


@pytest.mark.parametrize("asked", ["MODMOE_JOB", "TORCHELASTIC_RUN_ID"], indirect=True)
def test_a_shell_above_the_one_launching_process_may_go(asked):
    kill_outer, kill_inner, is_gone = asked
    kill_outer()
    assert not is_gone()
    kill_inner()
    assert is_gone()


@pytest.mark.parametrize("asked", ["CROSS_RANK"], indirect=True)
def test_deepspeed_has_two_launching_processes(asked):
    kill_outer, _, is_gone = asked
    assert not is_gone()
    kill_outer()
    assert is_gone()


@pytest.mark.parametrize("asked", [None], indirect=True)
def test_what_is_started_by_hand_outlives_everything(asked):
    kill_outer, kill_inner, is_gone = asked
    kill_outer()
    kill_inner()
    assert not is_gone()
