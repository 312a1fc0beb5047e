import numpy as np
import pytest
import torch

from modmoe.data.packing import collate_packed, pack_documents, packed_example

EOS = 0


def test_positions_and_labels():
    example = packed_example(np.array([5, 6, EOS, 7, EOS, 8, 9, 10], dtype=np.uint16), EOS)
    assert example["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    # The first token of a document is predicted from nothing; its end is predicted.
    assert example["labels"].tolist() == [-100, 6, EOS, -100, EOS, -100, 9, 10]
    assert example["input_ids"].tolist() == [5, 6, EOS, 7, EOS, 8, 9, 10]
    assert {array.dtype for array in example.values()} == {np.dtype(np.int64)}


def test_an_end_on_the_last_token_starts_the_next_block():
    assert packed_example(np.array([5, 6, EOS]), EOS)["position_ids"].tolist() == [0, 1, 2]
    assert packed_example(np.array([EOS, EOS]), EOS)["labels"].tolist() == [-100, -100]


def test_stream_packing_keeps_every_token_in_order():
    generator = np.random.default_rng(0)
    documents = [np.append(generator.integers(1, 9, size=n), EOS) for n in generator.integers(0, 40, size=60)]
    everything = np.concatenate(documents)
    for length in (1, 7, 16, 64):
        blocks = list(pack_documents(documents, length))
        assert all(block.shape == (length,) for block in blocks)
        assert np.array_equal(np.concatenate(blocks), everything[: len(everything) // length * length])


def test_collate():
    examples = [packed_example(np.array([5, 6, EOS, 7]), EOS), packed_example(np.array([1, 2, 3, 4]), EOS)]
    batch = collate_packed(examples)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert batch["input_ids"].dtype == torch.int64
    assert batch["labels"].tolist() == [[-100, 6, EOS, -100], [-100, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"one length, got \[3, 4\]; nothing is padded"):
        collate_packed([packed_example(np.array([5, 6, 7]), EOS), examples[0]])
