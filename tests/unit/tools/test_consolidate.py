"""The command; what it does is tested with the checkpoints of the trainer."""

import consolidate


def test_a_directory_that_is_no_checkpoint(tmp_path, capsys):
    assert consolidate.main([str(tmp_path), str(tmp_path / "out")]) == 2
    error = f"error: {tmp_path} is not a complete checkpoint: its save was interrupted"
    assert capsys.readouterr().err.strip() == error
    assert not (tmp_path / "out").exists()
