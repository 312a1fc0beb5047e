"""Processes at a time, what is shown of them, and how they end."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from modmoe.training.distillation.costs import cost_of, measured
from modmoe.training.distillation.jobs import Jobs, ProgressView
from modmoe.training.errors import RunError


class Terminal(io.StringIO):
    def isatty(self):
        return True


def jobs(tmp_path, code, limit=2, output=None):
    """Processes that run Python code; `{stage}` in it is theirs."""
    view = ProgressView([0, 1, 2], output or io.StringIO())

    def command(stage):
        return [sys.executable, "-S", "-c", code.replace("{stage}", str(stage))]

    return Jobs(command, lambda stage: tmp_path / str(stage), limit, view)


def test_no_more_run_at_a_time_than_allowed(tmp_path):
    code = f"""
import os, time
here = {str(tmp_path)!r}
open(here + '/running{{stage}}', 'w').close()
time.sleep(0.3)
n = len([f for f in os.listdir(here) if f.startswith('running')])
os.remove(here + '/running{{stage}}')
print(n)
"""
    assert jobs(tmp_path, code).run([0, 1, 2]) == 0
    counts = [int((tmp_path / str(stage) / "log.txt").read_text()) for stage in (0, 1, 2)]
    assert max(counts) == 2


def test_a_process_that_fails_is_named_once_the_others_have_ended(tmp_path):
    code = "import sys, time; {stage} == 1 or time.sleep(0.5); {stage} == 1 and sys.exit('error: no text left')"
    with pytest.raises(RunError, match=r"stage 1 failed; stage 1: no text left \(exit code 1, .*1/log.txt"):
        jobs(tmp_path, code).run([0, 1, 2])
    assert all((tmp_path / str(stage) / "log.txt").is_file() for stage in (0, 1, 2))


def test_only_what_this_launch_said_is_its_error(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "log.txt").write_text("error: no text left\n")
    with pytest.raises(RunError, match=r"stage 1: it said nothing \(exit code 9"):
        jobs(tmp_path, "import sys; sys.exit({stage} and 9)").run([0, 1])


def test_a_device_that_has_become_free_is_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    code = f"""
import os, time
while {{stage}} == 0 and not os.path.exists({str(tmp_path / "2" / "log.txt")!r}):
    time.sleep(0.05)
print(os.environ['CUDA_VISIBLE_DEVICES'])
"""
    assert jobs(tmp_path, code).run([0, 1, 2]) == 0
    assert [(tmp_path / str(stage) / "log.txt").read_text() for stage in (0, 1, 2)] == ["3\n", "5\n", "5\n"]


def test_a_signal_reaches_the_processes_and_starts_no_more(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('', flush=True); time.sleep(30)"
    )

    def interrupt():
        deadline = time.monotonic() + 20
        while not all(
            (tmp_path / str(s) / "log.txt").is_file() and (tmp_path / str(s) / "log.txt").read_text() for s in (0, 1)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert jobs(tmp_path, code).run([0, 1, 2]) == 143
    assert not (tmp_path / "2").exists()


def test_a_signal_that_comes_while_a_process_is_started_reaches_it(tmp_path, monkeypatch):
    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    begun = time.monotonic()
    assert jobs(tmp_path, "import time; time.sleep(30)").run([0, 1, 2]) == 143
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "1").exists()


def test_the_death_of_the_launcher_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr("modmoe.training.ranks.launcher.Launcher.is_gone", lambda _: (tmp_path / "0/log.txt").exists())
    begun = time.monotonic()
    assert jobs(tmp_path, "import time; time.sleep(30)").run([0, 1, 2]) == 143
    assert time.monotonic() - begun < 20


def test_a_terminal_interrupts_them_once(tmp_path):
    """By this process, which passes Ctrl-C on; a second one would keep them from saving."""
    assert jobs(tmp_path, "import os; print(os.getsid(0), os.getpid())").run([0]) == 0
    session, pid = (tmp_path / "0" / "log.txt").read_text().split()
    assert session == pid


def test_each_process_is_a_team_of_its_own(tmp_path, monkeypatch):
    team = {"RANK", "WORLD_SIZE", "MASTER_PORT", "CROSS_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"}
    for name in team:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    assert jobs(tmp_path, code).run([0]) == 0
    environment = json.loads((tmp_path / "0" / "log.txt").read_text())
    assert not team & environment.keys()
    assert int(environment["OMP_NUM_THREADS"]) >= 1


def test_a_terminal_shows_one_line_for_each_stage():
    output = Terminal()
    view = ProgressView([0, 1], output)
    view.update(0, "step 1 of 9")
    view.update(1, "starting")
    view.update(1, "starting")
    first, second = output.getvalue().split("\x1b[2F")
    assert first == "\x1b[2Kstage 0: step 1 of 9\n\x1b[2Kstage 1: waiting\n"
    assert second == "\x1b[2Kstage 0: step 1 of 9\n\x1b[2Kstage 1: starting\n"


def test_elsewhere_steps_are_printed_now_and_then():
    output = io.StringIO()
    view = ProgressView([0], output)
    for step in range(1, 50):
        view.update(0, f"step {step} of 50")
    view.update(0, "finished")
    assert output.getvalue().splitlines() == ["stage 0: step 1 of 50", "stage 0: finished"]


def test_costs_add_up_over_launches_however_they_end(tmp_path):
    assert cost_of(tmp_path) == (0.0, 0.0)
    with measured(tmp_path):
        time.sleep(0.06)
    with contextlib.suppress(RunError), measured(tmp_path):
        time.sleep(0.06)
        raise RunError("full disk")
    cost = cost_of(tmp_path)
    assert 0.1 < cost.wall_seconds < 10
    assert cost.cpu_seconds < cost.wall_seconds


def test_costs_of_what_is_done_anew_do_not_count(tmp_path):
    with measured(tmp_path):
        pass
    with measured(tmp_path):
        (tmp_path / "costs.json").unlink()  # as a run does that overwrites another
    assert len(json.loads((tmp_path / "costs.json").read_text())) == 1


@pytest.mark.parametrize("content", [b"", b'{"1.0": [1', b"\0\0\xff"])
def test_damaged_costs_do_not_hide_how_training_ended(tmp_path, content):
    (tmp_path / "costs.json").write_bytes(content)
    assert cost_of(tmp_path) == (0.0, 0.0)
    with pytest.raises(RunError, match="full disk"), measured(tmp_path):
        raise RunError("full disk")
    assert len(json.loads((tmp_path / "costs.json").read_text())) == 1


def test_a_launch_that_is_killed_has_cost_what_it_has(tmp_path):
    code = f"""
import os, pathlib, time
from modmoe.training.distillation import costs
costs._NOTE_SECONDS = 0.02
with costs.measured(pathlib.Path({str(tmp_path)!r})):
    time.sleep(0.2)
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert 0.1 < cost_of(tmp_path).wall_seconds < 10
