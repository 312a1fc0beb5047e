"""tools/expert_report.py as its user runs it, on small random models."""

import json
import shutil
from pathlib import Path

import expert_report
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modmoe.data import train_bpe
from modmoe.surgery import UsageReport

from ..layers.test_grouped_experts import TINY
from ..models.conftest import build

IBM = Path(__file__).parents[2] / "golden" / "data" / "moduleformer" / "a_mlp_mi"
TEXT = "def main(): return 1\n\nThe quick brown fox jumps over the lazy dog.\n\n" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter([TEXT]), 280)


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer with fewer ids than bytes."""
    vocabulary = {token: i for i, token in enumerate(["<end>", "?", *sorted(set(TEXT))])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>")


@pytest.fixture(scope="module")
def native(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("models") / "native"
    build(vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")

    def call(model, *arguments, data=("notes=notes.txt", "english=embedded:english")):
        small = ["--tokens", "96", "--sequence-length", "16", "--batch-size", "4"]
        capsys.readouterr()  # what saving the model has written
        code = expert_report.main(["--model", str(model), "--data", *data, "--out", "out", *small, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_native_model(native, run, tmp_path):
    code, out, err = run(native)
    assert (code, err) == (0, "")
    assert "tokens: notes 96, english 96" in out
    assert "written to out/index.html" in out
    report = UsageReport.load(tmp_path / "out" / "usage.json")
    assert report.tokens == {"notes": 96, "english": 96}
    assert report.arguments["sequence_length"] == 16
    report.check_model(native)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_models_of_transformers(name, run, tmp_path, tokenizer):
    experts = {"num_local_experts" if name == "Mixtral" else "num_experts": 5, "vocab_size": len(tokenizer)}
    config = getattr(transformers, f"{name}Config")(**(TINY | experts))
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code, _, err = run(tmp_path / "model", data=("notes=notes.txt",))
    assert (code, err) == (0, "")
    report = UsageReport.load(tmp_path / "out" / "usage.json")
    assert [(router.layer, router.side, router.num_experts) for router in report.routers] == [
        (0, "ffn", 5),
        (1, "ffn", 5),
    ]
    report.check_model(tmp_path / "model")


def test_a_directory_of_ibm(run, tmp_path):
    directory = shutil.copytree(IBM, tmp_path / "model")
    characters().save_pretrained(directory)
    code, _, err = run(directory, data=("notes=notes.txt",))
    assert (code, err) == (0, "")
    report = UsageReport.load(tmp_path / "out" / "usage.json")
    assert {router.side for router in report.routers} == {"attn", "ffn"}
    report.check_model(directory)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a=nowhere.txt", "no file at 'nowhere.txt'"),
        ("a=empty.txt", "source 'a': no text"),
        ("a=rows.jsonl", "no column 'text'; set text_field to one of"),
        ("notes=notes.txt", "two domains are called 'notes'"),
    ],
)
def test_texts_that_are_refused(native, run, tmp_path, data, message):
    code, _, err = run(native, data=("notes=notes.txt", data))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_models_that_are_refused(native, run, tmp_path, tokenizer):
    pickled, dense, small, unknown = (tmp_path / name for name in ("pickled", "dense", "small", "unknown"))
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").touch()
    build(vocab_size=len(tokenizer), num_experts=1, num_attn_experts=1).save_pretrained(dense)
    build(vocab_size=97).save_pretrained(small)
    shutil.copytree(native, unknown)
    config = json.loads((native / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    for directory in (dense, small):
        tokenizer.save_pretrained(directory)
    for model, message in (
        (tmp_path / "nowhere", "nowhere has no config.json"),
        (pickled, "only pickled weights"),
        (dense, "'modmoe' has no routed experts"),
        (unknown, "has model type `nonsense`"),
        (small, "tokens but the model knows 97"),
    ):
        code, _, err = run(model)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_an_output_directory_in_use_is_refused_before_anything_is_measured(native, run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    monkeypatch.setattr(expert_report, "load_model", lambda _: pytest.fail("the model was loaded"))
    code, _, err = run(native)
    assert code == 2
    assert "out holds mine.txt" in err
    code, _, err = run(native, "--out", "out/mine.txt/report")
    assert code == 2
    assert "out/mine.txt/report cannot be made, since out/mine.txt is a file" in err


def test_a_report_does_not_go_into_the_model(native, run):
    code, _, err = run(native, "--out", str(native / "usage"))
    assert code == 2
    assert "which is not modified: name one elsewhere" in err
    assert not (native / "usage").exists()


def test_weights_that_transformers_would_make_up(run, tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    config = transformers.OlmoeConfig(**(TINY | {"num_experts": 5, "vocab_size": len(tokenizer)}))
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "layers.1.mlp.gate" not in k}, weights, {"format": "pt"})
    code, _, err = run(tmp_path / "model", data=("notes=notes.txt",))
    assert code == 2
    assert "model.layers.1.mlp.gate.weight" in err
