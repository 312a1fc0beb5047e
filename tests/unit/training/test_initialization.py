"""Starting from saved weights, and from directories that cannot be started from."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modmoe import ModMoEForCausalLM
from modmoe.data import train_bpe
from modmoe.training.errors import ConfigError
from modmoe.training.initialization import build_model, model_config

from .conftest import MODEL


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter(["some text to learn from"] * 3), 270)


@pytest.fixture
def saved(tokenizer, tmp_path):
    torch.manual_seed(1)
    model = ModMoEForCausalLM(model_config(MODEL, tokenizer))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model


def refused(run, tokenizer):
    with pytest.raises(ConfigError) as caught:
        build_model(run, tokenizer)
    return str(caught.value)


def test_fresh_weights_follow_the_seed_and_the_tokenizer(make_run, tokenizer):
    torch.manual_seed(3)
    first = build_model(make_run(), tokenizer)
    torch.manual_seed(3)
    second = build_model(make_run(), tokenizer)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.config.vocab_size == len(tokenizer)
    assert first.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("with_model_section", [True, False])
def test_init_takes_the_weights(make_run, tokenizer, saved, with_model_section):
    directory, model = saved
    run = make_run({"init": str(directory)} | ({} if with_model_section else {"model": {}}))
    loaded = build_model(run, tokenizer)
    assert loaded.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert loaded.get_parameter(name).equal(parameter), name


def test_missing_directory(make_run, tokenizer, tmp_path):
    missing = tmp_path / "nowhere"
    assert refused(make_run({"init": str(missing)}), tokenizer) == f"init directory {missing} does not exist"


def test_not_a_model(make_run, tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(make_run({"init": str(tmp_path / "empty")}), tokenizer)


def test_no_weights(make_run, tokenizer, saved):
    (saved[0] / "model.safetensors").unlink()
    assert "has neither model.safetensors" in refused(make_run({"init": str(saved[0])}), tokenizer)


def test_truncated_weights(make_run, tokenizer, saved):
    weights = saved[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    text = refused(make_run({"init": str(saved[0])}), tokenizer)
    assert f"weights {weights} are damaged or truncated" in text


def test_missing_shard(make_run, tokenizer, saved):
    saved[1].save_pretrained(saved[0], max_shard_size="20KB")
    shard = next(saved[0].glob("model-00002*"))
    shard.unlink()
    assert refused(make_run({"init": str(saved[0])}), tokenizer).startswith(
        f"cannot start from {saved[0]}: {shard} is missing"
    )


def test_pickles(make_run, tokenizer, saved):
    (saved[0] / "model.safetensors").rename(saved[0] / "pytorch_model.bin")
    text = refused(make_run({"init": str(saved[0])}), tokenizer)
    assert "only pickled weights (pytorch_model.bin)" in text
    assert "save the model as safetensors" in text


@pytest.mark.parametrize("change", [{"model.hidden_size": 32}, {"model.num_hidden_layers": 3}])
def test_weights_of_another_model(make_run, tokenizer, saved, change):
    text = refused(make_run({"init": str(saved[0]), **change}), tokenizer)
    assert text.startswith(f"cannot start from {saved[0]}: ")


def test_a_tokenizer_too_large_for_the_saved_model(make_run, tokenizer, saved):
    larger = train_bpe(iter(["completely different words, and many more of them"] * 3), 290)
    text = refused(make_run({"init": str(saved[0]), "model": {}}), larger)
    assert f"cannot start from {saved[0]}: the tokenizer has {len(larger)} ids and the model {len(tokenizer)}" in text


@pytest.mark.parametrize("changes", [{}, {"model": {}}])
def test_another_tokenizer_of_the_same_size(make_run, tokenizer, saved, changes):
    """Nothing would fail: every embedding would just belong to another token."""
    tokenizer.save_pretrained(saved[0])
    build_model(make_run({"init": str(saved[0]), **changes}), tokenizer)
    other = train_bpe(iter(["completely different words, and many more of them"] * 3), len(tokenizer))
    assert len(other) == len(tokenizer)
    text = refused(make_run({"init": str(saved[0]), **changes}), other)
    assert f"use the one saved with it, tokenizer: {{name: {saved[0]}}}" in text


def test_a_damaged_saved_tokenizer(make_run, tokenizer, saved):
    (saved[0] / "tokenizer.json").write_text("{")
    assert "tokenizer.json is damaged" in refused(make_run({"init": str(saved[0])}), tokenizer)


def test_ids_with_gaps_all_have_an_embedding(make_run, tokenizer):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i if i < 2 else i + 50 for token, i in vocabulary.items()}
    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>")
    assert build_model(make_run(), gaps).config.vocab_size == len(tokenizer) + 50


def test_a_damaged_config(make_run, tokenizer, saved):
    (saved[0] / "config.json").write_text("{")
    text = refused(make_run({"init": str(saved[0]), "model": {}}), tokenizer)
    assert text.startswith(f"cannot start from {saved[0]}: ")


def test_a_damaged_index(make_run, tokenizer, saved):
    index = saved[0] / "model.safetensors.index.json"
    index.write_text("{}")
    assert (
        refused(make_run({"init": str(saved[0])}), tokenizer)
        == f"cannot start from {saved[0]}: {index} is damaged: it names no weight files"
    )


def test_another_architecture(make_run, tokenizer, tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer)
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    text = refused(make_run({"init": str(tmp_path / "llama"), "model": {}}), tokenizer)
    assert "it holds a LlamaForCausalLM, not a modular model; make one of a dense model with tools/" in text


def test_code_that_comes_with_a_model_is_not_run(make_run, tokenizer, saved, tmp_path, monkeypatch):
    (saved[0] / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    remote = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (saved[0] / "config.json").write_text(json.dumps(remote))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    assert "cannot start from" in refused(make_run({"init": str(saved[0]), "model": {}}), tokenizer)
    assert not (tmp_path / "ran").exists()


def test_a_vocabulary_too_small_for_the_tokenizer(make_run, tokenizer):
    text = refused(make_run({"model.vocab_size": 100}), tokenizer)
    assert "model.vocab_size=100 is smaller than the tokenizer's" in text
