"""Which checkpoints count, and whose output directory it is."""

import logging

import pytest
import yaml

from modmoe.training.checkpoint import (
    CheckpointError,
    check_world_size,
    checkpoint_dir,
    checkpoints,
    claim_output_dir,
    clear_foreign_run,
    defect,
    latest_complete,
    mark_complete,
    prune_checkpoints,
    save_run_file,
)
from modmoe.training.yaml_config import ConfigError, load_yaml


def save(output_dir, step, complete=True):
    directory = checkpoint_dir(output_dir, step)
    (directory / "shards").mkdir(parents=True)
    (directory / "shards" / "weights").write_bytes(b"x" * 100)
    if complete:
        mark_complete(directory, world_size=1)
    return directory


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
    with pytest.raises(CheckpointError, match="was written by 1 processes and cannot be resumed by 2: .*--init"):
        check_world_size(directory, 2)


def start(run):
    save_run_file(run, run.output_dir, {"processes": 1})
    return save(run.output_dir, 3)


def test_an_empty_directory_is_free(make_run):
    assert claim_output_dir(make_run()) is None


def test_the_same_run_resumes_whatever_its_logging(make_run):
    checkpoint = start(make_run())
    assert claim_output_dir(make_run({"logging.interval": 5, "max_minutes": 3, "checkpoint.keep": 1})) == checkpoint


def test_another_run_is_refused_by_name_of_the_difference(make_run):
    start(make_run())
    with pytest.raises(ConfigError) as caught:
        claim_output_dir(make_run({"model.hidden_size": 32, "optimization.learning_rate": 0.5}))
    text = str(caught.value)
    assert "holds checkpoints of another run" in text
    assert "model.hidden_size is 16 there and 32 here" in text
    assert "optimization.learning_rate is 0.01 there and 0.5 here" in text
    assert "--overwrite_output true" in text


def test_checkpoints_of_unknown_origin_are_refused(make_run):
    run = make_run()
    save(run.output_dir, 3)
    with pytest.raises(ConfigError, match=r"run\.yaml is 'missing' there"):
        claim_output_dir(run)


def test_overwriting_deletes_the_other_run_and_nothing_else(make_run):
    start(make_run())
    run = make_run({"seed": 7, "overwrite_output": True})
    (run.output_dir / "metrics.jsonl").write_text("{}\n")
    (run.output_dir / "notes.txt").write_text("mine")
    assert claim_output_dir(run) is None
    clear_foreign_run(run)
    assert [p.name for p in run.output_dir.iterdir()] == ["notes.txt"]


def test_overwriting_does_not_touch_the_run_itself(make_run):
    run = make_run({"overwrite_output": True})
    checkpoint = start(run)
    assert claim_output_dir(run) == checkpoint
    clear_foreign_run(run)
    assert checkpoints(run.output_dir) == [checkpoint]


def test_a_file_in_the_way(make_run, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        claim_output_dir(make_run())


def test_the_run_file_is_a_config_with_versions(make_run, tmp_path):
    run = make_run()
    save_run_file(run, tmp_path, {"precision": "fp32"})
    assert load_yaml(tmp_path / "run.yaml") == yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))
    header = (tmp_path / "run.yaml").read_text()
    assert "# torch: " in header
    assert "# precision: fp32" in header
