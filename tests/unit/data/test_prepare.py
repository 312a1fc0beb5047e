import dataclasses
import gzip
import logging

import numpy as np
import pytest

from modmoe.data import MixtureDataset, SourceConfig, StreamingMixture, TokenizerConfig, prepare_data

from .conftest import make_texts, write_jsonl


@pytest.fixture(autouse=True)
def tokenizer_threads(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def prepare(sources, cache_dir, *, sequence_length=64, vocab_size=300, num_train_blocks=50):
    config = TokenizerConfig(vocab_size=vocab_size)
    return prepare_data(sources, config, sequence_length, cache_dir, seed=0, num_train_blocks=num_train_blocks)


@pytest.fixture
def sources(tmp_path):
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", make_texts(150, seed)) for seed, name in enumerate("ab")}
    return [SourceConfig(name=name, files=[str(path)], weight=1 + (name == "a")) for name, path in paths.items()]


def test_everything_a_trainer_needs(sources, tmp_path):
    data = prepare(sources, tmp_path / "cache")
    assert isinstance(data.train, MixtureDataset)
    assert len(data.train) == 50
    assert set(data.validation) == set(data.statistics) == {"a", "b"}
    example = data.train[0]
    assert {key: array.shape for key, array in example.items()} == dict.fromkeys(example, (64,))

    statistics = data.statistics["a"]
    assert statistics.train.documents + statistics.validation.documents == 150
    assert statistics.validation.tokens // 64 == len(data.validation["a"])
    tokens = np.concatenate([block["input_ids"] for block in data.validation["a"]])
    text = data.tokenizer.decode(tokens, skip_special_tokens=True).encode()
    assert statistics.validation.bytes_per_token == pytest.approx(len(text) / len(tokens), rel=0.02)
    assert statistics.gzip_bits_per_byte == pytest.approx(8 * len(gzip.compress(text)) / len(text), rel=0.05)
    assert 3 < statistics.byte_unigram_entropy < 5


def test_a_source_of_weight_0_is_only_evaluated(sources, tmp_path):
    alone = prepare(sources[:1], tmp_path / "cache")
    watched = [sources[0], dataclasses.replace(sources[1], weight=0)]
    data = prepare(watched, tmp_path / "cache")
    assert data.tokenizer.get_vocab() == alone.tokenizer.get_vocab()
    assert {data.train.locate(i)[0] for i in range(50)} == {"a"}
    assert set(data.validation) == {"a", "b"}
    assert data.statistics["b"].train is None
    assert not list((tmp_path / "cache" / "tokens").glob("b-train-*"))


def test_weights_of_0_that_leave_nothing_to_do(sources, tmp_path):
    watched = [dataclasses.replace(source, weight=0) for source in sources]
    with pytest.raises(ValueError, match="weight is 0 for all sources, a, b: give one"):
        prepare(watched, tmp_path / "cache")
    useless = dataclasses.replace(watched[1], validation_fraction=0.0)
    with pytest.raises(ValueError, match="source 'b': weight is 0 and no text is held out"):
        prepare([sources[0], useless], tmp_path / "cache")


def test_a_second_run_reads_nothing(sources, tmp_path, monkeypatch):
    first = prepare(sources, tmp_path / "cache")
    monkeypatch.setattr("modmoe.data.sources.FileReader.read", lambda *_: pytest.fail("text was read again"))
    second = prepare(sources, tmp_path / "cache")
    assert first.statistics == second.statistics
    for index in (0, 17, 49):
        assert np.array_equal(first.train[index]["input_ids"], second.train[index]["input_ids"])


def test_another_tokenizer_or_limit_makes_another_store(sources, tmp_path):
    prepare(sources[:1], tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
    prepare(sources[:1], tmp_path / "cache", vocab_size=280)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 4


def test_streaming_sources(sources, tmp_path):
    config = SourceConfig(name="s", files=sources[0].files, streaming=True)
    data = prepare([config, sources[1]], tmp_path / "cache")
    assert isinstance(data.train, StreamingMixture)
    assert len(list(data.train)) == 50
    assert data.statistics["s"].train is None
    stored = prepare(sources, tmp_path / "other").statistics["a"]
    assert data.statistics["s"].validation.documents == stored.validation.documents
    assert len(data.validation["s"]) > 0


def test_embedded_domains(tmp_path):
    configs = [SourceConfig(name=name, embedded=name, max_bytes=200_000) for name in ("python", "english", "c")]
    data = prepare(configs, tmp_path, sequence_length=128, vocab_size=512)
    assert len(data.tokenizer) == 512
    for statistics in data.statistics.values():
        assert statistics.train.bytes_per_token > 1.5
        assert 1 < statistics.gzip_bits_per_byte < statistics.byte_unigram_entropy < 6


def test_skipped_files_are_counted(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", make_texts(50))
    (folder / "b.bin").write_bytes(b"\0\xff")
    (folder / "c.txt").write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING):
        prepare([SourceConfig(name="mine", files=[str(folder)])], tmp_path / "cache")
    assert "source 'mine': skipped 2 that are not readable UTF-8 text: " in caplog.text
    assert "b.bin" in caplog.text


def test_epochs_are_reported(sources, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        data = prepare(sources, tmp_path / "cache")
    assert f"source 'a': {data.train.epochs['a']:.2f} epochs of " in caplog.text


def test_bad_arguments(sources, tmp_path):
    with pytest.raises(ValueError, match=r"source names must differ, got \['a'\] more than once"):
        prepare([sources[0], sources[0]], tmp_path)
    with pytest.raises(ValueError, match="at least one source of text, got none"):
        prepare([], tmp_path)
    with pytest.raises(ValueError, match="sequence_length must be >= 2, got 1"):
        prepare(sources, tmp_path, sequence_length=1)
    with pytest.raises(ValueError, match="num_train_blocks must be >= 1, got 0"):
        prepare(sources, tmp_path, num_train_blocks=0)


def test_empty_corpus_leaves_nothing_behind(tmp_path):
    path = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="source 'mine': no text to train on"):
        prepare([SourceConfig(name="mine", files=[str(path)])], tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_corpus_smaller_than_one_block(sources, tmp_path):
    path = write_jsonl(tmp_path / "short.jsonl", ["few words"])
    config = SourceConfig(name="mine", files=[str(path)], validation_fraction=0)
    with pytest.raises(ValueError, match=r"'mine': train text has \d+ tokens, fewer than one block of 64; add text"):
        prepare([config], tmp_path / "cache")
    with pytest.raises(ValueError, match=r"validation text has .* 100000; .* raise validation_fraction or set it"):
        prepare(sources, tmp_path / "cache", sequence_length=100_000)
