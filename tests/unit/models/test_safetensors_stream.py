"""Safetensors in pieces: what is written is what safetensors itself and transformers read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modmoe.models.safetensors_stream import SafetensorsWriter, SavedWeights, TensorSpec, WeightsWriter

from .conftest import build

TENSORS = {
    "bytes": torch.arange(3, dtype=torch.uint8),
    "weight": torch.randn(4, 3, 5),
    "half": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
}
SPECS = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}


def write_in_pieces(writer, tensors, size=4):
    """The tensors in turns, a few elements each time."""
    pieces = {name: list(tensor.reshape(-1).split(size)) for name, tensor in tensors.items()}
    while any(pieces.values()):
        for name, left in pieces.items():
            if left:
                writer.write(name, left.pop(0))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name


def test_safetensors_reads_what_was_written_in_pieces(tmp_path):
    path = tmp_path / "file.safetensors"
    with SafetensorsWriter(path, SPECS, {"note": "x"}) as writer:
        write_in_pieces(writer, TENSORS)
    assert_same(load_file(path), TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert size % 8 == 0
    assert all(header[name]["data_offsets"][0] % spec.dtype.itemsize == 0 for name, spec in SPECS.items())


def test_a_slice_of_another_layout_is_written_in_its_own_order(tmp_path):
    tensor = torch.randn(3, 4).T
    with SafetensorsWriter(tmp_path / "f", {"t": TensorSpec.of(tensor)}) as writer:
        writer.write("t", tensor)
    assert load_file(tmp_path / "f")["t"].equal(tensor)


def test_tensors_begin_where_vector_units_like_it(tmp_path):
    """All that fill whole units of 64 bytes, whatever odd ones are in the file."""
    specs = {"odd": TensorSpec(torch.int64, (3,)), "a": TensorSpec(torch.bfloat16, (32,)), "rest": SPECS["weight"]}
    specs |= {"b": TensorSpec(torch.float32, (4, 16)), "byte": TensorSpec(torch.uint8, (1,))}
    with SafetensorsWriter(tmp_path / "f", specs) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.zeros(spec.shape, dtype=spec.dtype))
    content = (tmp_path / "f").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert all((8 + size + header[name]["data_offsets"][0]) % 64 == 0 for name in ("a", "b"))
    assert load_file(tmp_path / "f").keys() == specs.keys()


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        (torch.zeros(2), "t lacks 1 of its 3 elements"),
        (torch.zeros(4), r"t has 3 elements of shape \(3,\), got more"),
        (torch.zeros(3).half(), "t was announced as torch.float32, got a piece in torch.float16"),
    ],
)
def test_what_does_not_fill_the_tensor_leaves_the_old_file(tmp_path, piece, expected):
    (tmp_path / "f").write_text("old")
    with (
        pytest.raises(ValueError, match=expected),
        SafetensorsWriter(tmp_path / "f", {"t": TensorSpec(torch.float32, (3,))}) as writer,
    ):
        writer.write("t", piece)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_dtype_that_the_format_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="t: safetensors cannot hold torch.complex32"):
        SafetensorsWriter(tmp_path / "f", {"t": TensorSpec(torch.complex32, (3,))})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [10**9, 1])
def test_the_same_tensors_are_the_same_files_in_whatever_order_they_are_announced(tmp_path, limit):
    for directory, names in (("a", list(SPECS)), ("b", list(SPECS)[::-1])):
        (tmp_path / directory).mkdir()
        with WeightsWriter(tmp_path / directory, {name: SPECS[name] for name in names}, limit) as writer:
            write_in_pieces(writer, TENSORS)
    one, other = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab")
    assert one == other


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (100, 2), (1, 6)])
def test_weights_are_cut_into_files_by_size(tmp_path, limit, files):
    with WeightsWriter(tmp_path, SPECS, max_shard_bytes=limit) as writer:
        write_in_pieces(writer, TENSORS)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    weights = SavedWeights(tmp_path)
    assert_same(dict(weights.items()), TENSORS)
    assert weights.rows("weight", 1, 3).equal(TENSORS["weight"][1:3])
    assert {name: weights.spec(name) for name in weights} == SPECS
    assert not list(tmp_path.glob(".*"))


def test_transformers_loads_the_files(tmp_path):
    model = build()
    model.config.save_pretrained(tmp_path)
    tensors = model.state_dict()
    with WeightsWriter(tmp_path, {n: TensorSpec.of(t) for n, t in tensors.items()}, max_shard_bytes=4_000) as writer:
        write_in_pieces(writer, tensors, 1_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), tensors)


def test_a_failure_leaves_no_files(tmp_path):
    with pytest.raises(RuntimeError), WeightsWriter(tmp_path, SPECS, max_shard_bytes=100):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        SavedWeights(tmp_path)
    save_file({"t": torch.zeros(100)}, tmp_path / "model.safetensors")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        SavedWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="model-1.safetensors is missing"):
        SavedWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="it names no weight files"):
        SavedWeights(tmp_path)
