"""What docs/results shows follows from the measurements that lie beside it."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("name", ["specialise_and_prune", "extend", "distill"])
def test_a_table_is_that_of_its_measurements(name):
    seeds = sorted((RESULTS / name).glob("seed-*.json"))
    assert len(seeds) == 3
    experiment = runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))
    table = experiment["table"]([json.loads(seed.read_text()) for seed in seeds])
    assert (RESULTS / name / "table.md").read_text() == table
