"""tools/prune.py as its user runs it, on small random models."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import prune
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.data import train_bpe
from modmoe.models.safetensors_stream import SavedWeights, TensorSpec, WeightsWriter
from modmoe.surgery.fingerprint import checkpoint_identity
from modmoe.surgery.routing_sums import RoutingSums
from modmoe.surgery.usage import RouterUsage, UsageReport, measure_usage

from ..models.conftest import TINY, build

TOOL = Path(prune.__file__)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """native/ with a tokenizer and a card, its usage.json, and models that are something else."""
    directory = tmp_path_factory.mktemp("models")
    native = directory / "native"
    build(vocab_size=280).save_pretrained(native)
    train_bpe(iter(["the quick brown fox " * 50]), 280).save_pretrained(native)
    (native / "README.md").write_text("# A model\n")
    (native / "training_args.bin").write_bytes(b"pickle")
    model = AutoModelForCausalLM.from_pretrained(native)
    domains = {"low": torch.arange(0, 40), "high": torch.arange(200, 240)}
    batches = {name: [{"input_ids": ids[None]}] for name, ids in domains.items()}
    measure_usage(model, batches, identity=checkpoint_identity(native)).save(directory / "usage.json")
    build(num_experts=1, num_attn_experts=1).save_pretrained(directory / "dense")
    (directory / "ibm").mkdir()
    (directory / "ibm" / "config.json").write_text('{"model_type": "moduleformer"}')
    llama = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(llama).save_pretrained(directory / "llama")
    return directory


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, model="native", usage=models / "usage.json", out=("--out", "out")):
        before = {p: p.read_bytes() for p in (models / "native").rglob("*") if p.is_file()}
        code = prune.main(["--model", str(models / model), "--usage", str(usage), *map(str, arguments), *out])
        assert {p: p.read_bytes() for p in (models / "native").rglob("*") if p.is_file()} == before
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_written_directory_is_a_whole_model(run, tmp_path, models):
    code, out, err = run("--keep", 0.5, "--metric", "reap")
    assert (code, err) == (0, "")
    assert "4 -> 2" in out
    assert "6 -> 3" in out
    assert out.endswith("written to out\n")
    native = {p.name for p in (models / "native").iterdir()}
    assert {p.name for p in Path("out").iterdir()} == native - {"training_args.bin"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    model = AutoModelForCausalLM.from_pretrained("out")
    prompt = AutoTokenizer.from_pretrained("out")("the quick", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2).shape[1] == prompt["input_ids"].shape[1] + 2
    card = Path("out/README.md").read_text()
    assert card.startswith("# A model\n\n## Pruned\n")
    assert "--keep 0.5 --metric reap" in card
    assert "| 1 | ffn | 6 -> 3 | 2 |" in card
    assert Path("out").stat().st_mode == (models / "native").stat().st_mode


def test_keeping_all_copies_the_weights(run, models):
    assert run("--keep", 1)[0] == 0
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (Path("out") / name).read_bytes() == (models / "native" / name).read_bytes()


def test_a_dry_run_writes_nothing(run, tmp_path):
    code, out, err = run("--keep-experts", 1, "--domain", "low", "--sides", "ffn", "--dry-run", out=())
    assert code == 0
    assert not list(tmp_path.iterdir())
    assert "nothing written" in out
    assert "4 -> " not in out
    assert out.count("6 -> 1") == 2
    assert err == (
        "warning: fewer ffn experts stay than a token uses, so it uses fewer (layer 0: 2 to 1, layer 1: 2 to 1): "
        "keep at least 2 in each layer to avoid it\n"
    )


def test_global_and_keep(run):
    assert run("--keep", 0.4, "--scope", "global", "--denominator", "keep", "--metric", "gate")[0] == 0
    config = json.loads(Path("out/config.json").read_text())
    counts = config["num_experts"] if isinstance(config["num_experts"], list) else [config["num_experts"]] * 2
    assert sum(counts) == 5
    pruned = config["num_pruned_experts"] if isinstance(config["num_pruned_experts"], list) else None
    assert pruned == [6 - count for count in counts]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--keep", 0], {}, "keep=0.0 is not a fraction of the experts: give more than 0 and at most 1"),
        (["--keep-experts", 0], {}, "keep_experts=0 would remove everything: give at least 1"),
        (["--keep-experts", 7], {}, "keep_experts=7 is more than any pool has: give 1 to 6"),
        (["--threshold", 2], {}, "threshold=2 would remove every"),
        (["--keep", 1, "--domain", "c"], {}, "the usage report has no domain 'c'; it has low, high"),
        (["--keep", 1], {"usage": "no.json"}, "no usage report at no.json: make one with tools/expert_report.py"),
        (["--keep", 1], {"model": "nowhere"}, "nowhere has no config.json: give the directory of a saved model"),
        (["--keep", 1], {"model": "llama"}, "model type 'llama' of "),
        (
            ["--keep", 1],
            {"model": "ibm"},
            "is in IBM's format: make it a native model with tools/convert",
        ),
        (["--keep", 1], {"model": "dense"}, "is dense: there are no experts to remove"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, tmp_path, arguments, changes, message):
    code, out, err = run(*arguments, **changes)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "1", "--metric", "size"], "argument --metric: invalid choice: 'size'"),
        (["--keep", "1", "--sides", "left"], "must be attn, ffn or attn,ffn, got 'left'"),
        (["--keep", "1", "--keep-experts", "1"], "not allowed with argument"),
        ([], "one of the arguments --keep --keep-experts --threshold is required"),
    ],
)
def test_unknown_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        prune.main(["--model", "a", "--usage", "b", "--out", "c", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_an_output_directory_in_use(run, models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "error: out exists: name a new directory" in run("--keep", 1)[2]
    (tmp_path / "out" / "notes.txt").unlink()
    assert run("--keep", 1)[0] == 0  # an empty one is free
    inside = ("--out", str(models / "native" / "pruned"))
    assert "which is not modified: name one elsewhere" in run("--keep", 1, out=inside)[2]
    (tmp_path / "file").touch()
    assert "file/out cannot be made, since file is a file" in run("--keep", 1, out=("--out", "file/out"))[2]


@pytest.fixture
def copy(models, tmp_path):
    shutil.copytree(models / "native", tmp_path / "copy")
    return tmp_path / "copy"


def test_a_report_of_another_model(run, copy):
    build(vocab_size=280, initializer_range=0.2).save_pretrained(copy)
    err = run("--keep", 1, model=copy)[2]
    assert "error: the usage report is of another model (" in err
    assert "make one of this model with tools/expert_report.py --model" in err


def test_broken_weights(run, copy):
    build(vocab_size=280).save_pretrained(copy, max_shard_size="40KB")
    (copy / "model.safetensors").unlink()
    shards = sorted(copy.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:1000])
    assert f"{shards[1]} is damaged or truncated" in run("--keep", 1, model=copy)[2]
    shards[1].unlink()
    assert f"error: {shards[1]} is missing" in run("--keep", 1, model=copy)[2]
    for file in copy.glob("model*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only pickled weights (pytorch_model.bin), which can run code" in run("--keep", 1, model=copy)[2]


# ---- A model larger than the memory that the tool may take ----

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 15,
    "intermediate_size": 1024,
    "num_experts": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def write_large(directory: Path) -> dict[str, TensorSpec]:
    """1.6 GB of weights, the same 4 MB over and over."""
    config = ModMoEConfig(**(TINY | LARGE | {"dtype": "bfloat16"}))
    config.save_pretrained(directory)
    with torch.device("meta"):
        state = ModMoEForCausalLM(config).to(torch.bfloat16).state_dict()
    specs = {name: TensorSpec.of(tensor) for name, tensor in state.items()}
    block = torch.randn(2**21).bfloat16()
    with WeightsWriter(directory, specs, max_shard_bytes=400_000_000) as writer:
        for name, spec in specs.items():
            for start in range(0, spec.numel, len(block)):
                writer.write(name, block[: spec.numel - start].to(spec.dtype))
    return specs


def made_up_report(directory: Path) -> UsageReport:
    def sums(num_experts: int) -> RoutingSums:
        counts = torch.arange(1, num_experts + 1)
        numbers = dict.fromkeys(("gate", "probability", "output_norm", "saliency"), counts.double())
        return RoutingSums(tokens=counts.sum(), chosen_together=counts.diag(), entropy=torch.zeros(()), **numbers)

    config = ModMoEConfig.from_pretrained(directory)
    routers = [
        RouterUsage(layer, side, f"model.layers.{layer}.{name}", 2, {"d": sums(count)})
        for layer in range(config.num_hidden_layers)
        for side, name, count in (("attn", "self_attn", 4), ("ffn", "mlp", 16))
    ]
    return UsageReport(routers, model=checkpoint_identity(directory))


def anonymous_memory(process: subprocess.Popen) -> Iterator[int]:
    """RssAnon in bytes, many times a second, until the process ends."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "RssAnon" in status:  # not in a process that is ending
            yield int(status.split("RssAnon:")[1].split()[0]) * 1024
        time.sleep(0.005)


def start(model: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable,
        str(TOOL),
        "--model",
        str(model),
        "--usage",
        str(model.parent / "usage.json"),
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_model_and_an_interruption_leaves_nothing(tmp_path):
    model, out = tmp_path / "large", tmp_path / "out"
    model.mkdir()
    specs = write_large(model)
    made_up_report(model).save(tmp_path / "usage.json")
    total, largest = sum(s.nbytes for s in specs.values()), max(s.nbytes for s in specs.values())
    allowed = 2 * largest + 200_000_000
    assert total > 4 * allowed

    peaks = []
    for arguments in (["--dry-run"], ["--out", str(out)]):
        process = start(model, "--keep", "0.8", *arguments)
        peaks.append(max(anonymous_memory(process)))
        assert process.wait() == 0
    grown = peaks[1] - peaks[0]
    print(f"model {total:,} bytes, largest tensor {largest:,}, allowed {allowed:,}, grown {grown:,}, {peaks}")
    assert grown <= allowed
    weights = SavedWeights(out)
    assert weights.spec("model.layers.14.mlp.experts.down_proj").shape == (13, 1024, 1024)
    last = SavedWeights(model).rows("model.layers.14.mlp.experts.down_proj", 15, 16)
    assert torch.equal(weights.rows("model.layers.14.mlp.experts.down_proj", 12, 13), last)
    shutil.rmtree(out)

    process = start(model, "--keep", "0.8", "--out", str(out))
    while process.poll() is None and not list(tmp_path.glob(".out.*/written/.model*")):
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert {p.name for p in tmp_path.iterdir()} == {"large", "usage.json"}
    shutil.rmtree(model)
