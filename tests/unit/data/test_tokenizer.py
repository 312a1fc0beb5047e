import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modmoe.data import SourceConfig, TokenizerConfig, train_bpe
from modmoe.data import tokenizer as tokenizer_module
from modmoe.data.sources import Source
from modmoe.data.tokenizer import DocumentEncoder, load_tokenizer

from .conftest import make_texts, write_jsonl

ODD_TEXT = "naïve \t  日本語\r\n\n\x01 <|endoftext|> 🙂 don't   \n"


def test_any_text_survives(tokenizer):
    ids = tokenizer(ODD_TEXT.replace("<|endoftext|>", ""))["input_ids"]
    assert tokenizer.decode(ids) == ODD_TEXT.replace("<|endoftext|>", "")
    assert tokenizer("")["input_ids"] == []


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|endoftext|>",
        "<|pad|>",
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert len(tokenizer) == 300


def test_text_that_spells_the_end_token_does_not_end_the_document(tokenizer, encoder):
    ids = encoder.encode([ODD_TEXT, ""])
    assert [np.flatnonzero(array == encoder.eos_token_id).tolist() for array in ids] == [
        [len(ids[0]) - 1],
        [0],
    ]
    assert tokenizer.decode(ids[0][:-1]) == ODD_TEXT
    # The tokenizer itself is left as it was.
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]


def test_encoder_dtype_follows_the_vocabulary(tokenizer, encoder):
    assert encoder.dtype == np.uint16
    large = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(70_000)}, unk_token="0")),
        eos_token="1",
    )
    assert DocumentEncoder(large).encode(["69999"])[0].tolist() == [69999, 1]


def test_training_is_deterministic(texts):
    def trained():
        return train_bpe(iter(texts), 300).backend_tokenizer.to_str()

    assert trained() == trained()


def test_vocabulary_must_hold_all_bytes():
    with pytest.raises(ValueError, match=r">= 258 .* got 200"):
        train_bpe(iter(["text"]), 200)


def test_cache_hit_gives_the_same_tokenizer(tmp_path, monkeypatch):
    source = Source(SourceConfig(name="a", files=[str(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))]))
    config = TokenizerConfig(vocab_size=280)
    first = load_tokenizer(config, [source], tmp_path / "cache")
    trained = []
    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda *arguments: trained.append(arguments))
    second = load_tokenizer(config, [source], tmp_path / "cache")
    assert not trained
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert DocumentEncoder(first).fingerprint == DocumentEncoder(second).fingerprint
    with pytest.raises(AttributeError):
        load_tokenizer(TokenizerConfig(vocab_size=281), [source], tmp_path / "cache")
    assert trained


@pytest.mark.parametrize(("content", "reason"), [('{"version', "JSONDecodeError: "), ("{}", "KeyError: ")])
def test_a_damaged_cached_tokenizer_is_made_again(tmp_path, caplog, content, reason):
    source = Source(SourceConfig(name="a", files=[str(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))]))
    config = TokenizerConfig(vocab_size=280)
    first = load_tokenizer(config, [source], tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*/tokenizer.json")
    sound = path.read_bytes()
    path.write_text(content)
    again = load_tokenizer(config, [source], tmp_path / "cache")
    assert f"{path.parent} is damaged ({reason}" in caplog.text
    assert "making it again" in caplog.text
    assert path.read_bytes() == sound
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert list((tmp_path / "cache").iterdir()) == [path.parent]


def test_the_first_of_two_processes_publishes(tmp_path, tokenizer):
    for _ in range(2):
        tokenizer_module._publish(tokenizer, tmp_path / "cache" / "key")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["key"]
    assert AutoTokenizer.from_pretrained(tmp_path / "cache" / "key").eos_token_id == 0


def test_other_weights_train_another_tokenizer(tmp_path):
    paths = [str(write_jsonl(tmp_path / f"{seed}.jsonl", make_texts(50, seed))) for seed in (0, 1)]
    config = TokenizerConfig(vocab_size=280, sample_bytes=10_000)
    for weight in (1, 1.0, 2):
        sources = [
            Source(SourceConfig(name=p[-7], files=[p], weight=w)) for p, w in zip(paths, (1, weight), strict=True)
        ]
        load_tokenizer(config, sources, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_sample_follows_the_weights_and_leaves_validation_out(tmp_path):
    def source(name, seed, weight):
        path = write_jsonl(tmp_path / f"{name}.jsonl", make_texts(400, seed))
        return Source(SourceConfig(name=name, files=[str(path)], weight=weight))

    sources = [source("a", 1, 3), source("b", 2, 1)]
    sample = list(tokenizer_module._weighted_sample(sources, 80_000))
    sizes = [sum(len(text) for text in sample if text.startswith(prefix)) for prefix in ("1-", "2-")]
    assert sizes[0] == pytest.approx(60_000, abs=1500)
    assert sizes[1] == pytest.approx(20_000, abs=1500)
    assert set(sample).isdisjoint(document.text for s in sources for document in s.documents("validation"))


def test_a_saved_tokenizer_is_loaded_by_directory(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(TokenizerConfig(name=str(tmp_path)), [], tmp_path / "cache")
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert AutoTokenizer.from_pretrained(tmp_path).decode(loaded("a b")["input_ids"]) == "a b"


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent/tokenizer", "some/absent/tokenizer", "runs/absent"])
def test_a_path_without_a_tokenizer_is_not_taken_for_a_hub_name(tmp_path, monkeypatch, name):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=f"^{name} is not a directory with a tokenizer and, being a path, not "
    ):
        load_tokenizer(TokenizerConfig(name=name), [], tmp_path / "cache")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_hub_names_are_not_taken_for_paths(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert tokenizer_module._checked_name(name) == name


def test_a_tokenizer_needs_an_end_token(tmp_path, tokenizer):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    assert "eos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match="has no eos_token, which separates documents"):
        load_tokenizer(TokenizerConfig(name=str(tmp_path)), [], tmp_path)
