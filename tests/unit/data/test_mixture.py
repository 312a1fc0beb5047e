from collections import Counter

import numpy as np
import pytest
import torch

from modmoe.data import MixtureDataset, PackedDataset, PackedStream, SourceConfig, StreamingMixture
from modmoe.data.documents import Document
from modmoe.data.mixture import EpochShuffle, MixtureSchedule
from modmoe.data.packing import collate_packed
from modmoe.data.sources import Source
from modmoe.data.store import build_store

from .conftest import make_texts, write_jsonl

LENGTH = 32


@pytest.fixture
def domains(tmp_path, encoder):
    def domain(name, texts):
        documents = [Document(text, text) for text in texts]
        store = build_store(tmp_path / name, lambda: iter(documents), encoder, shard_tokens=2000)
        return PackedDataset(store, LENGTH, encoder.make_example)

    return {
        "large": domain("large", make_texts(150, seed=1)),
        "small": domain("small", make_texts(10, seed=2)),
    }


def test_blocks_decode_to_the_documents(domains, tokenizer, encoder):
    blocks = [domains["small"][i]["input_ids"] for i in range(len(domains["small"]))]
    decoded = tokenizer.decode(np.concatenate(blocks)).split("<|endoftext|>")
    texts = make_texts(10, seed=2)
    assert decoded[:-1] == texts[: len(decoded) - 1]
    assert len(decoded) >= 10
    assert texts[len(decoded) - 1].startswith(decoded[-1]) if len(decoded) == 10 else decoded[-1] == ""
    with pytest.raises(IndexError, match="block"):
        domains["small"][len(domains["small"])]


def test_every_block_once_per_epoch_in_a_new_order():
    shuffle = EpochShuffle("a", 100, seed=3)
    epochs = [[shuffle.block(epoch * 100 + i) for i in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [shuffle.block(i) for i in range(100)] == epochs[0]
    assert [EpochShuffle("b", 100, seed=3).block(i) for i in range(100)] != epochs[0]


def test_schedule_counts_draws_without_gaps():
    schedule = MixtureSchedule({"a": 1, "b": 2, "rare": 1e-6}, seed=0)
    draws = Counter()
    for index in range(9000):
        name, draw = schedule.locate(index)
        assert draw == draws[name]
        draws[name] += 1
        if index % 1234 == 0:
            assert schedule.counts(index + 1) == {key: draws[key] for key in ("a", "b", "rare")}
    assert draws["b"] / draws["a"] == pytest.approx(2, rel=0.01)
    assert draws["rare"] in (2, 3)


def test_a_mixture_is_determined_by_its_index(domains):
    weights = {"large": 3.0, "small": 1.0}
    mixture = MixtureDataset(domains, weights, num_blocks=5000, seed=7)
    assert len(mixture) == 5000
    places = [mixture.locate(i) for i in range(5000)]
    resumed = MixtureDataset(domains, weights, num_blocks=5000, seed=7)
    assert [resumed.locate(i) for i in range(4900, 5000)] == places[4900:]
    assert [resumed.locate(i) for i in range(10)] == places[:10]
    assert np.array_equal(mixture[42]["input_ids"], resumed[42]["input_ids"])
    other = MixtureDataset(domains, weights, num_blocks=5000, seed=8)
    assert [other.locate(i) for i in range(5000)] != places
    with pytest.raises(IndexError, match="example 5000 of 5000"):
        mixture[5000]

    counts = Counter(name for name, _ in places)
    assert counts["large"] / counts["small"] == pytest.approx(3, rel=0.03)
    assert mixture.epochs == {name: counts[name] / len(domain) for name, domain in domains.items()}
    for name, domain in domains.items():
        whole = counts[name] // len(domain) * len(domain)
        seen = Counter(block for other_name, block in places if other_name == name)
        assert whole > 0
        assert set(seen.values()) <= {whole // len(domain), whole // len(domain) + 1}


def test_a_data_loader_reads_it(domains):
    mixture = MixtureDataset(domains, {"large": 1, "small": 1}, num_blocks=8, seed=0)
    loader = torch.utils.data.DataLoader(mixture, batch_size=4, collate_fn=collate_packed)
    batches = list(loader)
    assert [batch["input_ids"].shape for batch in batches] == [(4, LENGTH), (4, LENGTH)]
    assert batches[1]["input_ids"][0].tolist() == mixture[4]["input_ids"].tolist()


@pytest.fixture
def stream(tmp_path, encoder):
    path = write_jsonl(tmp_path / "stream.jsonl", make_texts(20, seed=3))
    source = Source(SourceConfig(name="stream", files=[str(path)], streaming=True, validation_fraction=0))
    return PackedStream(source, encoder, LENGTH)


def test_streams_mix_with_stored_domains(domains, stream, tokenizer):
    weights = {"stream": 1.0, "small": 1.0}
    mixture = StreamingMixture({"stream": stream, "small": domains["small"]}, weights, num_blocks=400, seed=0)
    first, second = list(mixture), list(mixture)
    assert len(first) == len(mixture) == 400
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
    text = tokenizer.decode(np.concatenate([example["input_ids"] for example in first]))
    assert "3-0 " in text
    assert "2-0 " in text


@pytest.mark.parametrize("workers", [1, 2])
def test_data_workers_do_not_change_the_order_of_streams(domains, stream, workers):
    mixture = StreamingMixture({"stream": stream, "small": domains["small"]}, {"stream": 1, "small": 1}, 40, seed=0)
    mixture.batch_size = 4
    loader = torch.utils.data.DataLoader(mixture, batch_size=4, collate_fn=collate_packed, num_workers=workers)
    rows = [row.tolist() for batch in loader for row in batch["input_ids"]]
    assert rows == [example["input_ids"].tolist() for example in mixture]


def test_a_stream_shorter_than_a_block_is_an_error(tmp_path, encoder):
    path = write_jsonl(tmp_path / "short.jsonl", ["few words"])
    source = Source(SourceConfig(name="short", files=[str(path)], streaming=True, validation_fraction=0))
    with pytest.raises(ValueError, match="source 'short': training text is shorter than one block of 512 tokens"):
        next(iter(PackedStream(source, encoder, 512)))
