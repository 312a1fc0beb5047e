"""Which checkpoints count, and what they say."""

import logging

import pytest

from modmoe.training.checkpoint import (
    check_world_size,
    checkpoints,
    defect,
    latest_complete,
    prune_checkpoints,
    writing,
)
from modmoe.training.errors import RunError

from .conftest import save_checkpoint as save


def test_the_newest_complete_checkpoint_counts(tmp_path, caplog):
    save(tmp_path, 9)
    good = save(tmp_path, 10)
    interrupted = save(tmp_path, 11, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest_complete(tmp_path) == good
    assert f"skipping checkpoint {interrupted}: its save was interrupted" in caplog.text


def test_none_without_checkpoints(tmp_path):
    assert latest_complete(tmp_path / "not there") is None


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda d: (d / "shards" / "weights").write_bytes(b"x" * 60), "shards/weights has 60 bytes instead of 100"),
        (lambda d: (d / "shards" / "weights").unlink(), "shards/weights is missing"),
        (lambda d: (d / "complete.json").write_text("{"), "its complete.json is damaged"),
        (lambda d: (d / "complete.json").write_text("[]"), "its complete.json is damaged"),
        (lambda d: (d / "complete.json").write_text('{"world_size": 1}'), "its complete.json is damaged"),
        (lambda d: (d / "complete.json").unlink(), "its save was interrupted"),
    ],
)
def test_damage_is_found(tmp_path, damage, expected):
    directory = save(tmp_path, 1)
    assert defect(directory) is None
    damage(directory)
    assert defect(directory) == expected


def test_pruning_keeps_the_newest_complete_ones(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2, complete=False)
    kept = [save(tmp_path, 3), save(tmp_path, 4, complete=False), save(tmp_path, 5)]
    prune_checkpoints(tmp_path, keep=2)
    assert checkpoints(tmp_path) == kept


def test_another_number_of_processes_is_refused(tmp_path):
    directory = save(tmp_path, 1)
    check_world_size(directory, 1)
    with pytest.raises(RunError, match="was written by 1 processes and cannot be resumed by 2: .*--init"):
        check_world_size(directory, 2)


def test_a_failed_write_says_how_much_space_is_left_and_where_the_run_can_go_on(tmp_path):
    kept = save(tmp_path, 3)
    save(tmp_path, 4, complete=False)
    with pytest.raises(RunError) as caught, writing(tmp_path / "x", tmp_path):
        raise OSError("no space")
    assert str(caught.value).startswith(f"could not write {tmp_path / 'x'}: no space (")
    assert "MB of its disk are free" in str(caught.value)
    assert str(caught.value).endswith(f"; {kept} is untouched: run the same command again to resume")


def test_a_failed_write_into_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match="could not write .*: no"), writing(tmp_path / "a" / "b", tmp_path / "a"):
        raise OSError("no")
