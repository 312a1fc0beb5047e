"""tools/upcycle.py: its command line, and mistakes told in one sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import upcycle
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modmoe.models.safetensors_stream import TensorSpec, WeightsWriter

from .test_prune import anonymous_memory


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


@pytest.mark.parametrize(
    ("out", "message"),
    [("dense/out", "lies in dense, which is not modified"), ("file/out", "file is a file"), ("dense", "dense exists")],
)
def test_places_that_are_taken(dense, tool, tmp_path, capsys, out, message):
    (tmp_path / "file").touch()
    assert tool("--method", "copy", "--experts", "4", "--top-k", "2", "--out", out) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "file"}
    assert not (tmp_path / "dense" / "out").exists()


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


# ---- A model larger than the memory that the tool may take ----


def write_large(directory):
    """1.7 GB of weights, the same 4 MB over and over; returns bytes in all and of the largest tensor to be made."""
    sizes = {"vocab_size": 64, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 80}
    config = LlamaConfig(**sizes, num_attention_heads=8, dtype="bfloat16")
    config.save_pretrained(directory)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    specs = {name: TensorSpec.of(tensor) for name, tensor in state.items()}
    block = torch.randn(2**21).bfloat16()
    with WeightsWriter(directory, specs, max_shard_bytes=400_000_000) as writer:
        for name, spec in specs.items():
            for start in range(0, spec.numel, len(block)):
                writer.write(name, block[: spec.numel - start])
    return sum(spec.nbytes for spec in specs.values()), 2 * 2 * 2048 * 1024 * 2  # gates and ups of two experts


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", [["copy", "--reinit", "0.5"], ["cluster"]], ids=["copy", "cluster"])
def test_memory_does_not_grow_with_the_model(tmp_path, how):
    dense, out = tmp_path / "dense", tmp_path / "out"
    dense.mkdir()
    total, largest = write_large(dense)
    allowed = 2 * largest + 200_000_000
    assert total > 5 * allowed
    peaks = []
    for directory, code in ((dense, 2), (out, 0)):  # the first is refused, and shows what the imports take
        command = [sys.executable, upcycle.__file__, "--dense", str(dense), "--out", str(directory)]
        command += ["--experts", "2", "--top-k", "2", "--method", *how]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peaks.append(max(anonymous_memory(process)))
        assert process.wait() == code
    grown = peaks[1] - peaks[0]
    print(f"model {total:,} bytes, allowed {allowed:,}, grown {grown:,}, {peaks}")
    assert grown <= allowed
    for directory in (dense, out):
        shutil.rmtree(directory)
