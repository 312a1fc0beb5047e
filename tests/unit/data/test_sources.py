import gzip
import json
import sys

import pytest

from modmoe.data import SourceConfig
from modmoe.data.sources import Source, stable_hash

from .conftest import make_texts, write_jsonl


def open_files(*paths, **options) -> Source:
    return Source(SourceConfig(name="mine", files=[str(path) for path in paths], **options))


def texts_of(source, split="train"):
    return [document.text for document in source.documents(split)]


def test_split_by_hash_is_disjoint_complete_and_stable(tmp_path):
    texts = make_texts(300)
    forward = open_files(write_jsonl(tmp_path / "a.jsonl", texts))
    backward = open_files(write_jsonl(tmp_path / "b.jsonl", texts[::-1]))
    train, validation = texts_of(forward), texts_of(forward, "validation")
    assert set(train).isdisjoint(validation)
    assert set(train) | set(validation) == set(texts)
    assert texts_of(forward) == train
    assert texts_of(backward) == train[::-1]
    assert texts_of(backward, "validation") == validation[::-1]


def test_all_kinds_of_files(tmp_path):
    pytest.importorskip("datasets")
    from datasets import Dataset

    texts = make_texts(6)
    write_jsonl(tmp_path / "a.jsonl", texts[:1])
    (tmp_path / "b.txt").write_bytes(b"one\r\nfile")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[2]}).encode()))
    Dataset.from_dict({"text": texts[3:5], "id": [0, 1]}).to_parquet(tmp_path / "d.parquet")
    expected = [texts[0], "one\r\nfile", texts[2], *texts[3:5]]
    assert texts_of(open_files(tmp_path, validation_fraction=0)) == expected
    assert texts_of(open_files(tmp_path / "*.jsonl*", validation_fraction=0)) == [texts[0], texts[2]]


def test_one_large_text_file_has_documents_to_hold_out(tmp_path):
    path = tmp_path / "book.txt"
    text = "\n\n".join(make_texts(400))
    path.write_text(text)
    source = open_files(path)
    train, validation = texts_of(source), texts_of(source, "validation")
    assert len(validation) >= 2
    assert sorted("".join(train + validation)) == sorted(text)
    assert "".join(texts_of(open_files(path, validation_fraction=0))) == text


def test_hidden_files_of_a_directory_are_left_out(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (tmp_path / "a.txt").write_text("text")
    assert texts_of(open_files(tmp_path, validation_fraction=0)) == ["text"]


def test_own_validation_files(tmp_path):
    texts = make_texts(10)
    source = open_files(
        write_jsonl(tmp_path / "a.jsonl", texts[:8]),
        validation_files=[str(write_jsonl(tmp_path / "b.jsonl", texts[8:]))],
        max_bytes=1,
    )
    assert texts_of(source) == texts[:1]
    assert texts_of(source, "validation") == texts[8:]


def test_a_file_is_not_for_training_and_validation(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"source 'mine': b\.jsonl is in both files and validation_files, .* remove it"
    ):
        open_files(tmp_path, validation_files=["b.jsonl"])


def test_suffixes_in_upper_case(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_jsonl(tmp_path / "A.JSONL", ["a"])
    (tmp_path / "B.Json.GZ").write_bytes(gzip.compress(b'{"text": "b"}'))
    datasets.Dataset.from_dict({"text": ["c"]}).to_parquet(tmp_path / "C.PARQUET")
    assert texts_of(open_files(tmp_path, validation_fraction=0)) == ["a", "b", "c"]


def test_byte_order_marks_are_dropped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("b", encoding="utf-8-sig")
    assert texts_of(open_files(tmp_path, validation_fraction=0)) == ["a", "b"]


def test_byte_limits(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["é" * 50] * 20)
    assert len(texts_of(open_files(path, validation_fraction=0, max_bytes=250))) == 3
    many = write_jsonl(tmp_path / "b.jsonl", make_texts(500))
    everything, limited = open_files(many), open_files(many, max_validation_bytes=2000)
    assert sum(map(len, texts_of(limited, "validation")[:-1])) < 2000
    # What is over the limit stays out of training.
    assert texts_of(limited) == texts_of(everything)


def test_files_that_are_not_text_are_skipped_and_listed(tmp_path):
    (tmp_path / "a.txt").write_text("good text")
    (tmp_path / "b.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "c.txt").write_bytes("gut für".encode("latin-1"))
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "e.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "f.jsonl").write_text('{"text": "\\ud800"}\n{"text": null}\n{"text": "fine"}\n')
    source = open_files(tmp_path, validation_fraction=0)
    assert texts_of(source) == ["good text", "fine"]
    names = {name.removeprefix(f"{tmp_path}/") for name in source.reader.skipped}
    assert names == {"b.bin", "c.txt", "d.jsonl", "e.txt.gz", "f.jsonl, line 1"}


def test_damaged_parquet_files_are_skipped_and_listed(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"row {i} of a table" for i in range(2000)]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "good.parquet")
    sound = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "junk.parquet").write_bytes(b"junk" * 50)
    (tmp_path / "cut.parquet").write_bytes(sound[: len(sound) // 2])
    (tmp_path / "page.parquet").write_bytes(sound[:1000] + b"\xff" * 2000 + sound[3000:])
    source = open_files(tmp_path, validation_fraction=0)
    assert texts_of(source) == rows
    assert source.reader.skipped == {str(tmp_path / f"{name}.parquet") for name in ("junk", "cut", "page")}
    with pytest.raises(ValueError, match=r"'mine': no text to train on \(skipped as not readable UTF-8 text: 1\)"):
        texts_of(open_files(tmp_path / "junk.parquet", validation_fraction=0))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source 'mine': no file at '.*nothing\*\.txt'"):
        open_files(tmp_path / "nothing*.txt")
    with pytest.raises(FileNotFoundError, match="no file at"):
        open_files(tmp_path / "absent.jsonl")


def test_broken_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": "cut off\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not valid JSON \(.*\); expected one object per line"):
        texts_of(open_files(path))
    path.write_text('{"text": "good"}\n["list"]\n')
    with pytest.raises(ValueError, match=r"line 2: expected one JSON object per line, got list"):
        texts_of(open_files(path))


def test_missing_text_field_lists_the_columns(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"], field="content")
    with pytest.raises(ValueError, match=r"line 1: no column 'text'; set text_field to one of \['content'\]"):
        texts_of(open_files(path))
    assert texts_of(open_files(path, text_field="content", validation_fraction=0)) == ["x"]
    path.write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"line 1: column 'text' must hold text, got int 3"):
        texts_of(open_files(path))


def test_missing_parquet_column_lists_the_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": ["x"], "id": [0]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; set text_field to one of \['body', 'id'\]"):
        texts_of(open_files(tmp_path / "a.parquet"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_corpus(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"source 'mine': no text to train on, beside .* \(skipped .*: 0\)"):
        texts_of(open_files(path))


def test_a_single_document_cannot_be_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["only one"])
    with pytest.raises(ValueError, match="add documents or set validation_fraction to 0"):
        texts_of(open_files(path))
    assert texts_of(open_files(path, validation_fraction=0)) == ["only one"]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_by_directory(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = make_texts(12)
    directory = tmp_path / "corpus"
    directory.mkdir()
    write_jsonl(directory / "train.jsonl", texts[:9])
    write_jsonl(directory / "validation.jsonl", texts[9:])

    def open_dataset(**options):
        return Source(SourceConfig(name="hub", dataset=str(directory), streaming=streaming, **options))

    source = open_dataset()
    assert texts_of(source) == texts[:9]
    assert texts_of(source, "validation") == texts[9:]
    assert json.dumps(source.fingerprint)
    by_hash = open_dataset(split="validation")
    assert set(texts_of(by_hash)) | set(texts_of(by_hash, "validation")) == set(texts[9:])
    with pytest.raises(ValueError, match=r"corpus: no column 'body'; set text_field to one of \['text'\]"):
        texts_of(open_dataset(text_field="body"))


def test_datasets_package_is_asked_for_only_when_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert texts_of(open_files(write_jsonl(tmp_path / "a.jsonl", ["x"]), validation_fraction=0)) == ["x"]
    with pytest.raises(ImportError, match="pip install datasets"):
        texts_of(Source(SourceConfig(name="hub", dataset="wikitext")))


def test_fingerprint_follows_the_content(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    before = stable_hash(open_files(path).fingerprint)
    assert stable_hash(open_files(path).fingerprint) == before
    assert stable_hash(open_files(path, max_bytes=10).fingerprint) != before
    write_jsonl(path, ["x", "y", "z"])
    assert stable_hash(open_files(path).fingerprint) != before
