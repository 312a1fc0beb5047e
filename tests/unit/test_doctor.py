"""`python -m modmoe.doctor` names every backend of every op, what is in use, and why something is not."""

import os
import subprocess
import sys
from pathlib import Path

from modmoe import doctor


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
