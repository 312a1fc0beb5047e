"""Which checkpoints count, and what they say."""

import logging

import pytest
import torch

from modmoe.training.checkpoints.checkpoint import (
    check_batch,
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


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 2, 12), (2, 2, 6), (3, 8, 1), (24, 1, 1)])
def test_a_step_of_as_many_blocks_goes_on(tmp_path, world, micro, accumulation):
    check_batch(save(tmp_path, 1, blocks_per_step=24), world, micro, accumulation)


@pytest.mark.parametrize(
    ("world", "micro", "accumulation", "remedy"),
    [
        (2, 2, 12, "24 blocks per step, and micro_batch_size=2 x gradient_accumulation=12 x 2 processes are 48: "),
        (2, 2, 12, "set optimization.gradient_accumulation to 6$"),
        (1, 3, 1, "set optimization.gradient_accumulation to 8$"),
        (3, 5, 2, "set optimization.gradient_accumulation to 2 and optimization.micro_batch_size to 4$"),
        (12, 4, 1, "set optimization.gradient_accumulation to 1 and optimization.micro_batch_size to 2$"),
        (5, 2, 2, "start a number of processes that divides 24$"),
        (48, 1, 1, "start a number of processes that divides 24$"),
    ],
)
def test_a_step_of_another_size_is_refused_with_one_that_fits(tmp_path, world, micro, accumulation, remedy):
    with pytest.raises(RunError, match=remedy):
        check_batch(save(tmp_path, 1, blocks_per_step=24), world, micro, accumulation)


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RunError("no teacher")])
def test_what_else_fails_during_a_write_speaks_for_itself(tmp_path, error):
    with pytest.raises(RuntimeError) as caught, writing(tmp_path / "x", tmp_path):
        raise error
    assert caught.value is error
