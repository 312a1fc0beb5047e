"""Domains of a command line, and batches of their text."""

import json

import pytest

from modmoe.data import train_bpe
from modmoe.data.tokenizer import DocumentEncoder
from modmoe.surgery.texts import load_saved_tokenizer, parse_domains, text_batches

TEXT = "one two three four five six seven eight nine ten\n\n" * 20


@pytest.fixture(scope="module")
def encoder():
    return DocumentEncoder(train_bpe(iter([TEXT]), 280))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def batches(argument, encoder, text_field="text", **changes):
    (source,) = parse_domains([argument], text_field).values()
    options = {"sequence_length": 8, "batch_size": 3, "max_tokens": 60, "with_positions": True} | changes
    return list(text_batches(source, encoder, **options))


def test_places_are_told_apart(place):
    sources = parse_domains(["a=notes.txt", "b=embedded:english", "c=dataset:owner/name:part", "d=*.jsonl"])
    configs = {name: source.config for name, source in sources.items()}
    assert list(configs) == ["a", "b", "c", "d"]
    assert configs["a"].files == ["notes.txt"]
    assert configs["b"].embedded == "english"
    assert configs["b"].validation_fraction > 0  # validation text stays unseen
    assert (configs["c"].dataset, configs["c"].config, configs["c"].streaming) == ("owner/name", "part", True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["notes.txt"], ValueError, "'notes.txt' is not NAME=PLACE: write for example"),
        (["=notes.txt"], ValueError, "is not NAME=PLACE"),
        (["a=notes.txt", "a=rows.jsonl"], ValueError, "two domains are called 'a'"),
        (["a=nowhere.txt"], FileNotFoundError, "source 'a': no file at 'nowhere.txt'"),
        (["a=python"], FileNotFoundError, "the embedded text is written a=embedded:python"),
        (["a=embedded:klingon"], ValueError, "embedded must be one of"),
        (["a b=notes.txt"], ValueError, "must consist of letters"),
    ],
)
def test_arguments_that_are_refused(place, arguments, error, message):
    with pytest.raises(error, match=message):
        parse_domains(arguments)


def test_batches_hold_whole_blocks_up_to_the_limit(place, encoder):
    found = batches("a=notes.txt", encoder)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 8), (3, 8), (1, 8)]
    assert found[0]["position_ids"][0].tolist() == list(range(8))
    assert found[0].keys() == {"input_ids", "position_ids"}
    assert batches("a=notes.txt", encoder, with_positions=False)[0].keys() == {"input_ids"}
    assert [len(b["input_ids"]) for b in batches("a=notes.txt", encoder, max_tokens=1)] == [1]


def test_all_of_a_file_is_read_and_a_column_of_rows(place, encoder):
    whole = sum(b["input_ids"].numel() for b in batches("a=notes.txt", encoder, max_tokens=10**6))
    assert 0 <= len(encoder.encode([TEXT])[0]) - whole < 8
    assert batches("a=rows.jsonl", encoder, text_field="body")


def test_texts_that_are_refused(place, encoder):
    with pytest.raises(ValueError, match="no column 'text'; set text_field to one of .*body"):
        batches("a=rows.jsonl", encoder)
    with pytest.raises(ValueError, match="source 'a': no text"):
        batches("a=empty.txt", encoder)
    with pytest.raises(ValueError, match="domain 'a' has fewer tokens than one sequence of 5000"):
        batches("a=notes.txt", encoder, sequence_length=5000)


def test_a_model_without_a_tokenizer(place):
    with pytest.raises(ValueError, match=r"holds no tokenizer that can be used \(.+\): save the model's there$"):
        load_saved_tokenizer(place)
