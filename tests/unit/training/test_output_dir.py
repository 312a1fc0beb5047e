"""Whose output directory it is."""

import pytest
import yaml

from modmoe.training.checkpoints.checkpoint import checkpoints
from modmoe.training.checkpoints.output_dir import claim_output_dir, clear_foreign_run, locked, save_run_file
from modmoe.training.errors import ConfigError, RunError
from modmoe.training.yaml_config import load_yaml

from .conftest import save_checkpoint


def start(run):
    save_run_file(run, run.output_dir, {"processes": 1})
    return save_checkpoint(run.output_dir, 3)


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
    assert "holds checkpoints or the final model of another run" in text
    assert "model.hidden_size is 16 there and 32 here" in text
    assert "optimization.learning_rate is 0.01 there and 0.5 here" in text
    assert "--overwrite_output true" in text


def test_checkpoints_of_unknown_origin_are_refused(make_run):
    run = make_run()
    save_checkpoint(run.output_dir, 3)
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


def test_a_final_model_without_checkpoints_is_a_run_too(make_run):
    run = make_run()
    save_run_file(run, run.output_dir, {})
    (run.output_dir / "final").mkdir()
    assert claim_output_dir(run) is None
    with pytest.raises(ConfigError, match="final model of another run"):
        claim_output_dir(make_run({"seed": 7}))


def test_a_run_that_saved_nothing_is_in_nobodys_way(make_run):
    run = make_run()
    save_run_file(run, run.output_dir, {})
    assert claim_output_dir(make_run({"seed": 7})) is None


def test_a_config_of_the_users_is_not_overwritten(make_run):
    run = make_run()
    (run.output_dir / "run.yaml").write_text("# my notes\nseed: 1\n")
    with pytest.raises(ConfigError, match=r"run\.yaml was not written by a run and would be overwritten: rename it"):
        claim_output_dir(run)


@pytest.mark.parametrize("path", ["file", "file/run"])
def test_a_file_in_the_way(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made: a file is in the way"), locked(tmp_path / path):
        pass


def test_one_run_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(RunError, match="another run is at work in output_dir"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_run_file_is_a_config_with_versions(make_run, tmp_path):
    run = make_run()
    save_run_file(run, tmp_path, {"precision": "fp32"})
    assert load_yaml(tmp_path / "run.yaml") == yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))
    header = (tmp_path / "run.yaml").read_text()
    assert "# torch: " in header
    assert "# precision: fp32" in header
