"""tools/upcycle.py: its command line, and mistakes told in one sentence."""

import sys

import pytest
import torch
import upcycle
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3))
    model.save_pretrained(tmp_path / "dense")
    return model.eval()


@pytest.fixture
def tool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["upcycle.py", "--dense", "dense", "--out", "out", *arguments])
        return upcycle.main()

    return run


@torch.no_grad()
def test_clusters_with_all_experts_equal_the_parent(dense, tool, tmp_path, capsys):
    assert tool("--method", "cluster", "--experts", "4", "--top-k", "4") == 0
    assert capsys.readouterr().out.strip() == (
        "out: 4 experts of 6 neurons in each of 1 layers, 4 for each token; it equals its parent"
    )
    ids = torch.arange(20)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["fields.yaml", "fields.json"])
def test_fields_come_from_a_file_and_the_command_line_goes_before(dense, tool, tmp_path, name):
    text = '{"num_experts": 4, "num_experts_per_tok": 1, "router_type": "mlp", "router_hidden_size": 8}'
    (tmp_path / name).write_text(text)
    assert tool("--method", "copy", "--config", name, "--top-k", "2", "--reinit", "0.5") == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_experts, config.num_experts_per_tok, config.router_hidden_size) == (4, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "cluster", "--experts", "5", "--top-k", "2"], "num_experts=5 does not divide the 24 neurons"),
        (["--method", "copy", "--experts", "4", "--top-k", "9"], "num_experts_per_tok=9 in layer 0 must be between"),
        (["--method", "copy", "--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["--method", "copy", "--experts", "4"], "num_experts_per_tok is not given"),
        (["--method", "copy", "--config", "wrong.yaml"], "router_type"),
    ],
)
def test_mistakes_are_one_sentence(dense, tool, tmp_path, capsys, arguments, message):
    (tmp_path / "wrong.yaml").write_text("{num_experts: 4, num_experts_per_tok: 2, router_type: hash}")
    assert tool(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()
