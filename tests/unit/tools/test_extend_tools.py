"""tools/extend.py and tools/pack.py as their user runs them."""

import extend
import pack
import pytest
import torch
from safetensors.torch import load_file

from modmoe.surgery.fingerprint import checkpoint_identity
from modmoe.surgery.usage import measure_usage

from ..models.conftest import build


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build().save_pretrained("base")
    capsys.readouterr()

    def call(tool, command):
        code = tool.main(command.split())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_pack_makes_the_round(run, tmp_path):
    code, out, err = run(extend, "--model base --experts 3 --top-k 2 --attn-experts 2 --name c --out extended")
    assert (code, err) == (0, "")
    assert "24,576 new parameters, of which a token uses 15,872 at most" in out
    assert "15,808 more multiply-adds per token, and 192 for each key" in out
    assert out.endswith("written to extended\n")
    assert "c: group, 3 FFN and 2 attention experts in each layer, top-2 and top-1, 24,576 parameters" in run(
        pack, "list --model extended"
    )[1]  # fmt: skip
    assert "bytes, for base" in run(pack, "create --model extended --name c --out packed")[1]
    assert run(pack, "apply --model base --pack packed --out again") == (0, "again: with c\n", "")
    assert run(pack, "remove --model again --name c --out old") == (0, "old: without c\n", "")
    for one, other in (("again", "extended"), ("old", "base")):
        assert (tmp_path / one / "config.json").read_bytes() == (tmp_path / other / "config.json").read_bytes()
        found, expected = (load_file(tmp_path / name / "model.safetensors") for name in (one, other))
        assert found.keys() == expected.keys()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert run(pack, "list --model old") == (0, "old has no extensions\n", "")


def test_packs_go_elsewhere_too(run, tmp_path):
    run(extend, "--model base --experts 1 --name c --out extended")
    run(pack, "create --model extended --name c --out packed")
    for command in (
        "create --model extended --name c --out extended/out",
        "apply --model base --pack packed --out packed/out",
        "apply --model base --pack packed --out base/out",
        "remove --model extended --name c --out extended/out",
    ):
        code, _, err = run(pack, command)
        assert code == 2
        assert "which is not modified: name one elsewhere" in err
    assert not list(tmp_path.glob("*/out"))


def test_common_rows_print_their_bound_and_merge(run):
    code, out, _ = run(extend, "--model base --experts 2 --attn-experts 1 --mode common --init zero --out extended")
    assert code == 0
    assert "approximate: untrained, the new rows take at most 25.0% of a token's softmax" in out
    assert run(pack, "list --model extended")[1].startswith("extension: common, 2 FFN and 1 attention experts")
    assert run(pack, "merge --model extended --name extension --out merged")[0] == 0
    _, out, _ = run(extend, "--model base --experts 2 --mode common --init random --out other")
    assert "random rows may take any share" in out


def test_what_a_pack_was_made_beside_is_told(run):
    run(extend, "--model base --experts 1 --name a --out a")
    run(extend, "--model a --experts 1 --name b --out b")
    run(pack, "create --model b --name b --out packed")
    code, out, _ = run(pack, "apply --model base --pack packed --out out")
    assert code == 0
    assert out.startswith("note: pack 'b' was made in a model with extension 'a', which is not here\n")


def test_clones_follow_a_usage_report(run, tmp_path):
    ids = torch.arange(97)[None]
    report = measure_usage(build(), {"d": [{"input_ids": ids}]}, identity=checkpoint_identity(tmp_path / "base"))
    report.save(tmp_path / "usage.json")
    clone = "--model base --experts 2 --attn-experts 1 --init clone"
    assert run(extend, f"{clone} --out first")[0] == 0
    assert run(extend, f"{clone} --usage usage.json --domain d --out used")[0] == 0
    first, used = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "used"))
    assert any(not tensor.equal(first[name]) for name, tensor in used.items())


@pytest.mark.parametrize(
    ("tool", "command", "message"),
    [
        (extend, "--model base --experts 1 --init clone --usage no.json --out out", "no usage report at no.json"),
        (extend, "--model base --experts 1 --domain c --out out", "--domain c is of a usage report: give one with"),
        (extend, "--model base --out out", "give it at least one expert"),
        (extend, "--model base --experts 2 --top-k 3 --out out", "num_experts_per_tok=3 of extension 'extension'"),
        (extend, "--model nowhere --experts 2 --out out", "nowhere has no config.json"),
        (extend, "--model base --experts 2 --out base", "base exists: name a new directory"),
        (extend, "--model base --experts 2 --out base/out", "lies in base, which is not modified: name one elsewhere"),
        (extend, "--model base --experts 2 --out base/config.json/x", "base/config.json/x lies in base"),
        (extend, "--model base --experts 2 --init random --out file/x", "cannot be made, since file is a file"),
        (pack, "create --model base --name c --out out", "base has no extension 'c': it has none"),
        (pack, "apply --model base --pack base --out out", "base has no pack.json: give the directory of a pack"),
    ],
)
def test_errors_are_one_line(run, tmp_path, tool, command, message):
    (tmp_path / "file").touch()
    before = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    code, out, err = run(tool, command)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"base", "file"}
