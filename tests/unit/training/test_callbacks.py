"""metrics.jsonl, console lines and stop requests."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from modmoe.training.callbacks import Console, MetricsFile, Stop, console_line, read_metrics
from modmoe.training.clock import Clock


def state(step, max_steps=10):
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=True)


def test_a_resumed_metrics_file_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    first.on_train_begin(None, state(0), None)
    for step in (1, 2, 3):
        first.on_log(None, state(step), None, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    second = MetricsFile(path)
    second.on_train_begin(None, state(2), None)
    second.on_log(None, state(3), None, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_run_whose_metrics_were_deleted_goes_on(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.on_train_begin(None, state(2), None)
    assert read_metrics(metrics.path) == []


def test_a_console_that_has_gone_is_no_reason_to_stop(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    console = Console()
    console.on_train_begin(None, state(0), None)
    monkeypatch.setattr("sys.stdout", Gone())
    console.on_log(None, state(1), None, {"eval/x": 1.0})


def test_a_fresh_start_forgets_a_run_that_never_saved(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval/x": 1.0}\n{"step": 1, "loss": 1.0}\n')
    MetricsFile(path).on_train_begin(None, state(0), None)
    assert read_metrics(path) == []


def test_the_console_shows_every_aux_loss_and_no_layer():
    line = console_line(
        {
            "loss": 3.0,
            "cross_entropy": 3.1,
            "aux/mi": -0.5,
            "aux/z": 2.0,
            "learning_rate": 1e-3,
            "tokens_per_second": 12345.6,
            "router/ffn/max_violation": 0.5,
            "router/ffn/dead_experts": 2.0,
            "router/ffn/layer_00/max_violation": 0.5,
        }
    )
    assert "loss 3.0000  ce 3.1000  mi -0.5000  z 2.0000" in line
    assert "ffn load max +50%, dead 2" in line
    assert "12,346 tok/s" in line
    assert "layer" not in line


def test_the_console_shows_how_many_tokens_use_an_extension():
    logs = {"learning_rate": 1e-3, "tokens_per_second": 1.0}
    logs |= {"router/c/ffn/used": 0.125, "router/c/attn/used": 0.0, "router/c/ffn/layer_00/used": 0.25}
    line = console_line(logs)
    assert "c/ffn used 12.5%  c/attn used 0.0%" in line
    assert "25" not in line.replace("12.5%", "")


def ended(stop, step):
    control = SimpleNamespace(should_log=False, should_save=False, should_training_stop=False)
    stop.on_optimizer_step(None, state(step), control)
    stop.on_step_end(None, state(step), control)
    return control.should_save and control.should_training_stop


@pytest.fixture
def stop():
    # Under nohup a hang-up is ignored, and stays so: not what is tested here.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    made = Stop(Clock())
    made.on_train_begin(SimpleNamespace(world_size=1), state(0), None)
    yield made
    made.on_train_end(None, state(0), None)
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_step_and_gives_the_exit_code(stop, number, code):
    assert not ended(stop, 1)
    os.kill(os.getpid(), number)
    assert ended(stop, 2)
    assert stop.exit_code == code


def test_a_signal_in_the_last_step_does_not_count_as_interruption(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended(stop, 10)
    assert stop.exit_code == 0


def test_the_launcher_may_follow_ctrl_c_up_with_sigterm(stop):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended(stop, 1)
    assert stop.exit_code == 130


def test_a_second_ctrl_c_leaves_at_once():
    code = """
import os, signal
from types import SimpleNamespace
from modmoe.training.callbacks import Stop
from modmoe.training.clock import Clock
stop = Stop(Clock())
stop.on_train_begin(SimpleNamespace(world_size=1), None, None)
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 130, result.stderr
    assert "press Ctrl-C again to leave at once" in result.stderr


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    made = Stop(Clock())
    try:
        made.on_train_begin(SimpleNamespace(world_size=1), state(0), None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        made.on_train_end(None, state(0), None)
        signal.signal(signal.SIGHUP, before)


def test_all_ranks_see_the_latest_time_and_request(monkeypatch):
    """Learning rates follow the clock: on clocks of their own, replicas would drift apart."""
    made = Stop(Clock(max_minutes=1.0))
    made._group = "of two"

    def all_reduce(tensor, op, group):
        assert group == "of two"
        tensor.copy_(torch.maximum(tensor, torch.tensor([143.0, 45.0], dtype=torch.float64)))  # the other rank's

    monkeypatch.setattr("modmoe.training.callbacks.dist.all_reduce", all_reduce)
    made.clock.start()
    assert ended(made, 1)
    assert (made.clock.share, made.exit_code) == (0.75, 143)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    made = Stop(Clock())
    made.on_train_begin(SimpleNamespace(world_size=1), state(0), None)
    assert signal.getsignal(signal.SIGTERM) != before
    made.on_train_end(None, state(0), None)
    assert signal.getsignal(signal.SIGTERM) == before
