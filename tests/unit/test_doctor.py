"""`python -m modmoe.doctor` names every backend of every op, what is in use, and why something is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modmoe import doctor, ops


def run(**environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "modmoe.doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    return result.stdout


def test_it_names_what_is_in_use_and_why_not_more(tmp_path: Path) -> None:
    lines = [line.split() for line in run(CXX="no-such-compiler", MODMOE_CACHE=str(tmp_path)).splitlines()]
    assert ["torch", "in", "use"] in lines
    assert ["cpp", "no:", "CXX='no-such-compiler'", "is", "not", "a", "program"] in lines
    named = {line[0] for line in lines if line}
    assert named.issuperset(doctor.TRIALS)
    assert named.issuperset(backend for trial in doctor.TRIALS.values() for backend in trial.backends)


def test_a_wish_is_what_is_in_use() -> None:
    lines = [line.split() for line in run(MODMOE_BACKEND="reference").splitlines()]
    assert lines.count(["reference", "in", "use"]) == 2  # stick-breaking attention and grouped linear have one
    assert ["torch", "in", "use"] in lines  # routing has no reference and goes on as with auto


def test_the_plan_of_a_trial_is_not_what_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` is a wish that dispatch_plan cannot meet on a CPU; the other backends of grouped_linear are ready."""
    monkeypatch.setenv("MODMOE_BACKEND", "cuda")
    lines = [line.split() for line in doctor.diagnosis("grouped_linear", "cpu")]
    assert ["torch", "ready"] in lines
    assert ["reference", "ready"] in lines
    assert ["cuda", "no:", "it", "is", "for", "CUDA,", "the", "tensors", "are", "on", "'cpu'"] in lines


def test_every_op_is_tried() -> None:
    assert doctor.TRIALS.keys() == {name for name in ops.__all__ if name[0].islower()} - {"use_backend"}


def test_a_wish_for_what_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MODMOE_BACKEND", "cud")
    assert doctor.main() == 1
    assert "MODMOE_BACKEND: unknown backend 'cud', must be one of auto, reference" in capsys.readouterr().out
