"""State in pieces: whatever cut wrote it, any other cut reads the same numbers."""

import json
import random

import pytest
import torch

from modmoe.training.checkpoints.sharded_state import Piece, ShardedState, rank_file, write_index, write_pieces

TENSORS = {
    "experts": torch.randn(4, 3, 5),
    "vector": torch.randn(7),
    "half": torch.randn(6, 2).bfloat16(),
    "count": torch.tensor(11),
    "flags": torch.tensor([True, False, True]),
}


def random_cut(draw, numel, parts):
    """Interval of each of `parts` owners; some are empty."""
    bounds = sorted(draw.randint(0, numel) for _ in range(parts - 1))
    return list(zip([0, *bounds], [*bounds, numel], strict=True))


def save(directory, tensors, world_size, draw, values=None):
    """Cut every tensor at random places among the ranks."""
    cuts = {name: random_cut(draw, tensor.numel(), world_size) for name, tensor in tensors.items()}
    for rank in range(world_size):
        pieces = [
            Piece(name, tuple(tensor.shape), cuts[name][rank][0], tensor.reshape(-1)[slice(*cuts[name][rank])])
            for name, tensor in tensors.items()
        ]
        write_pieces(directory, rank, pieces, values or {})
    write_index(directory, world_size)


@pytest.mark.parametrize("seed", range(12))
def test_any_cut_reads_what_any_other_cut_wrote(tmp_path, seed):
    draw = random.Random(seed)
    save(tmp_path, TENSORS, draw.choice([1, 2, 3, 5]), draw)
    state = ShardedState(tmp_path)
    assert {name: tuple(spec) for name, spec in state.specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        for start, stop in random_cut(draw, tensor.numel(), draw.choice([1, 2, 4, 7])):
            out = torch.empty(stop - start, dtype=tensor.dtype)
            state.read(name, start, out)
            assert out.equal(tensor.reshape(-1)[start:stop]), (name, start, stop)
        assert torch.cat(list(state.pieces(name))).equal(tensor.reshape(-1))


def test_a_slice_of_experts_is_an_interval(tmp_path):
    """Two processes with two experts each write what one process with all four, or three of them, reads."""
    whole = TENSORS["experts"]
    for rank, experts in enumerate(whole.split(2)):
        write_pieces(tmp_path, rank, [Piece("experts", (4, 3, 5), rank * 30, experts.reshape(-1))], {})
    write_index(tmp_path, 2)
    out = torch.empty(3, 3, 5)
    ShardedState(tmp_path).read("experts", 15, out.view(-1))
    assert out.equal(whole[1:])


def test_numbers_are_cast_to_the_reader_s_dtype(tmp_path):
    save(tmp_path, TENSORS, 1, random.Random(0))
    out = torch.empty(7, dtype=torch.bfloat16)
    ShardedState(tmp_path).read("vector", 0, out)
    assert out.equal(TENSORS["vector"].bfloat16())


def test_values_travel_along(tmp_path):
    save(tmp_path, TENSORS, 2, random.Random(0), {"step": 3})
    assert ShardedState(tmp_path).values == {"step": 3}


def test_an_owner_reads_only_the_files_that_it_needs(tmp_path):
    for rank, part in enumerate(torch.arange(8.0).split(4)):
        write_pieces(tmp_path, rank, [Piece("t", (8,), rank * 4, part)], {})
    write_index(tmp_path, 2)
    (tmp_path / rank_file(0)).unlink()
    out = torch.empty(3)
    ShardedState(tmp_path).read("t", 5, out)
    assert out.tolist() == [5, 6, 7]
    with pytest.raises(FileNotFoundError, match="rank-00000.safetensors is missing"):
        ShardedState(tmp_path).read("t", 3, out)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(0, 4), (5, 8)], "elements 4 to 5 of t are held by no process"),
        ([(0, 5), (4, 8)], "elements 4 to 5 of t are held by two processes"),
        ([(0, 4), (4, 7)], "elements 7 to 8 of t are held by no process"),
        ([(1, 8)], "elements 0 to 1 of t are held by no process"),
        ([(0, 8), (0, 8)], "elements 0 to 8 of t are held by two processes"),
    ],
)
def test_pieces_that_do_not_make_a_whole_are_refused(tmp_path, pieces, expected):
    for rank, (start, stop) in enumerate(pieces):
        write_pieces(tmp_path, rank, [Piece("t", (8,), start, torch.zeros(stop - start))], {})
    with pytest.raises(ValueError, match=expected):
        write_index(tmp_path, len(pieces))
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("other", "values", "expected"),
    [
        (Piece("t", (9,), 4, torch.zeros(4)), {}, "differ in dtype or shape of t"),
        (Piece("t", (8,), 4, torch.zeros(4).double()), {}, "differ in dtype or shape of t"),
        (
            Piece("t", (8,), 4, torch.zeros(4)),
            {"step": 2},
            "rank-00001.safetensors says 2 of step, and another file 1",
        ),
    ],
)
def test_processes_that_disagree_are_refused(tmp_path, other, values, expected):
    write_pieces(tmp_path, 0, [Piece("t", (8,), 0, torch.zeros(4))], {"step": 1})
    write_pieces(tmp_path, 1, [other], values)
    with pytest.raises(ValueError, match=expected):
        write_index(tmp_path, 2)


def test_a_process_whose_file_is_not_there(tmp_path):
    write_pieces(tmp_path, 0, [], {})
    with pytest.raises(FileNotFoundError, match="rank-00001.safetensors is missing"):
        write_index(tmp_path, 2)


def test_a_truncated_file_is_named(tmp_path):
    save(tmp_path, TENSORS, 1, random.Random(0))
    with (tmp_path / rank_file(0)).open("r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match="rank-00000.safetensors is damaged or truncated"):
        ShardedState(tmp_path).read("vector", 0, torch.empty(7))


def test_a_file_of_another_save_is_noticed(tmp_path):
    save(tmp_path, TENSORS, 1, random.Random(0))
    write_pieces(tmp_path, 0, [Piece("vector", (6,), 0, torch.zeros(6))], {})
    with pytest.raises(ValueError, match="rank-00000.safetensors is not the file that index.json speaks of"):
        ShardedState(tmp_path).read("vector", 0, torch.empty(7))


@pytest.mark.parametrize("content", ["{", "[]", '{"tensors": {}}', json.dumps({"tensors": {"t": 1}, "values": {}})])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json is damaged"):
        ShardedState(tmp_path)


def test_another_format_and_a_missing_index_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="index.json is missing"):
        ShardedState(tmp_path)
    (tmp_path / "index.json").write_text('{"tensors": {}, "values": {}, "format": 2}')
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        ShardedState(tmp_path)
