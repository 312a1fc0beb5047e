"""A checkpoint is known again wherever it lies, and another one is not taken for it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modmoe.surgery.fingerprint import checkpoint_fingerprint, difference

from ..models.conftest import build


@pytest.fixture
def checkpoint(tmp_path):
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(checkpoint, edit) -> None:
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, {"format": "pt"})


def test_a_copy_cut_into_shards_is_the_same(checkpoint, tmp_path):
    expected = checkpoint_fingerprint(checkpoint)
    copy = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, copy)
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[1::2], "model-00002-of-00002.safetensors": names[::2]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, copy / file, {"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert checkpoint_fingerprint(copy) == expected
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing \(1 of 2 files"):
        checkpoint_fingerprint(copy)


def test_the_writers_version_does_not_count(checkpoint):
    expected = checkpoint_fingerprint(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"transformers_version": "6.0"}))
    assert checkpoint_fingerprint(checkpoint) == expected


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.0.self_attn.experts.o_proj.weight"])
def test_one_other_value_is_another_model(checkpoint, name):
    expected = checkpoint_fingerprint(checkpoint)
    change(checkpoint, lambda state: state[name].view(-1)[7].add_(1e-3))
    found = checkpoint_fingerprint(checkpoint)
    assert found["tensors"] == expected["tensors"]
    assert "same shapes but other values" in difference(expected, found)
    assert difference(found, found) is None


def test_other_shapes_and_another_config_are_named(checkpoint):
    expected = checkpoint_fingerprint(checkpoint)
    change(checkpoint, lambda state: state.update(extra=torch.ones(1)))
    assert "shapes" in difference(expected, checkpoint_fingerprint(checkpoint))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    assert "config.json" in difference(expected, checkpoint_fingerprint(checkpoint))


@pytest.mark.parametrize("place", [0, 1 << 19, (1 << 20) - 1])
def test_large_tensors_are_read_at_both_ends_and_in_the_middle(tmp_path, place):
    (tmp_path / "config.json").write_text("{}")
    large = torch.zeros(1 << 20, dtype=torch.int16)
    save_file({"large": large}, tmp_path / "model.safetensors")
    expected = checkpoint_fingerprint(tmp_path)
    large[place] = 1
    save_file({"large": large}, tmp_path / "model.safetensors")
    assert checkpoint_fingerprint(tmp_path) != expected


def test_bad_directories(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere has no config.json"):
        checkpoint_fingerprint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        checkpoint_fingerprint(tmp_path)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        checkpoint_fingerprint(checkpoint)
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        checkpoint_fingerprint(checkpoint)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors"):
        checkpoint_fingerprint(checkpoint)
    (checkpoint / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pickled weights \(pytorch_model\.bin\)"):
        checkpoint_fingerprint(checkpoint)
