"""What machines and people do to a running training: each time the run goes on from the checkpoint before."""

import os
import random
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from fcntl import ioctl

import pytest
from safetensors.torch import load_file

from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.checkpoint import checkpoints, defect

from .conftest import CONFIG, SCRIPT

pytestmark = pytest.mark.slow

STEPS = 60
# A checkpoint at every step, so that most moments are within one.
OPTIONS = ["--deepspeed", "null", "--optimization.steps", str(STEPS), "--checkpoint.interval", "1"]


@pytest.fixture(scope="module")
def undisturbed(launch, workspace):
    run = launch("undisturbed", *OPTIONS)
    assert run.wait() == 0, run.output
    return workspace / "undisturbed"


def comparable(output_dir):
    """Final weights, and every metric that does not depend on the clock."""
    records = [
        {name: value for name, value in record.items() if name not in ("tokens_per_second", "tflops_per_device")}
        for record in read_metrics(output_dir / "metrics.jsonl")
    ]
    weights = load_file(output_dir / "final" / "model.safetensors")
    return records, {name: tensor.tolist() for name, tensor in weights.items()}


def test_kill_9_at_ten_random_moments(launch, workspace, undisturbed):
    draw, out, interrupted_saves = random.Random(0), workspace / "killed", 0
    for _ in range(10):
        run = launch("killed", *OPTIONS)
        run.wait_for("step ")
        time.sleep(draw.uniform(0, 0.3))
        run.process.kill()
        run.wait()
        interrupted_saves += defect(checkpoints(out)[-1]) is not None if checkpoints(out) else 0
    run = launch("killed", *OPTIONS)
    assert run.wait() == 0, run.output
    assert "resuming from" in run.output
    assert interrupted_saves > 0
    assert comparable(out) == comparable(undisturbed)


@contextmanager
def small_disk(directory, size):
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize(
    ("size", "place"), [("8k", "metrics.jsonl"), ("500k", "checkpoint-"), ("1500k", "checkpoint-"), ("2200k", "final")]
)
def test_a_full_disk(launch, tmp_path, size, place):
    options = ["--deepspeed", "null", "--logging.tensorboard", "false"]
    with small_disk(tmp_path / "disk", size) as disk:
        out = disk / "run"
        run = launch("full", *options, "--output_dir", str(out))
        assert run.wait() == 1, run.output
        (error,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
        assert error.startswith(f"error: could not write {out / place}")
        assert "MB of its disk are free" in error
        assert "Traceback" not in run.output
        for saved in checkpoints(out):
            assert defect(saved) is None
            assert f"{saved} is untouched" in error or saved != checkpoints(out)[-1]
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = launch("full", *options, "--output_dir", str(out))
        assert again.wait() == 0, again.output
        assert ("resuming from" in again.output) == ("is untouched" in error)


def test_a_closed_terminal(workspace):
    out = workspace / "hung-up"
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--config", str(CONFIG), "--output_dir", str(out), "--deepspeed", "null"]
        + ["--data.cache_dir", str(workspace / "cache"), "--optimization.steps", "100000"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parents[1])},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
    )
    try:
        os.close(theirs)
        output = b""
        while b"step 5/" not in output:
            output += os.read(ours, 4096)
        os.close(ours)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert defect(checkpoints(out)[-1]) is None


def test_two_runs_in_one_directory(launch):
    first = launch("shared", *OPTIONS, "--optimization.steps", "100000")
    first.wait_for("step 5/")
    second = launch("shared", *OPTIONS, "--optimization.steps", "100000")
    assert second.wait() == 1, second.output
    assert "another run is at work in output_dir" in second.output
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 143, first.output
