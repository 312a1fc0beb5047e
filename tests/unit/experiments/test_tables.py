"""What docs/results shows follows from the measurements that lie beside it."""

import importlib
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[3] / "docs" / "results"


@pytest.mark.parametrize("name", ["specialise_and_prune", "extend"])
def test_a_table_is_that_of_its_measurements(name):
    seeds = sorted((RESULTS / name).glob("seed-*.json"))
    assert len(seeds) == 3
    table = importlib.import_module(name).table([json.loads(seed.read_text()) for seed in seeds])
    assert (RESULTS / name / "table.md").read_text() == table
