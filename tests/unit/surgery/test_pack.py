"""Packs: applied and removed bit for bit, refused where they do not belong, and composed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modmoe import ModMoEForCausalLM
from modmoe.models.extension import Extension
from modmoe.surgery.extend import add_extension, train_only
from modmoe.surgery.model_directory import ModelDirectory
from modmoe.surgery.pack import Base, Pack, apply_packs, create_pack, merge_common, remove_extension

from .conftest import logits

A = Extension("a", num_experts=3, num_experts_per_tok=2, num_attn_experts=2)
B = Extension("b", num_experts=1)
ROWS = Extension("rows", num_experts=2, num_attn_experts=1, mode="common")
MORE = Extension("more", num_attn_experts=2, mode="common")


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def same_model(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].equal(b[name]) for name in a
    ) and json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())  # fmt: skip


@pytest.fixture
def extended(saved, tmp_path):
    """Extend a base at random; returns both directories."""

    def extend(extension, base=None, dtype=torch.float32, **changes):
        base = base or saved(dtype=dtype, **changes)
        add_extension(base, tmp_path / f"with-{extension.name}", extension, init="random")
        return base, tmp_path / f"with-{extension.name}"

    return extend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extension", [A, ROWS], ids=["group", "common"])
def test_a_pack_applies_to_its_base_and_lifts_off_it(extended, tmp_path, ids, extension, dtype):
    base, model = extended(extension, dtype=dtype)
    before = contents(base), contents(model)
    create_pack(model, extension.name, tmp_path / "pack")
    apply_packs(base, [tmp_path / "pack"], tmp_path / "applied")
    remove_extension(tmp_path / "applied", extension.name, tmp_path / "removed")
    assert same_model(tmp_path / "applied", model)
    assert same_model(tmp_path / "removed", base)
    assert logits(tmp_path / "applied", ids).equal(logits(model, ids))
    assert logits(tmp_path / "removed", ids).equal(logits(base, ids))
    assert not logits(model, ids).equal(logits(base, ids))
    assert (contents(base), contents(model)) == before
    assert json.loads((tmp_path / "removed" / "config.json").read_text())["extensions"] == []


def test_what_training_saved_is_the_same_as_base_and_pack(extended, tmp_path, ids):
    base, model = extended(A)
    trained = ModMoEForCausalLM.from_pretrained(model)
    optimizer = torch.optim.AdamW([trained.get_parameter(name) for name in train_only(trained, "a")], lr=0.1)
    trained(ids, labels=ids).loss.backward()
    optimizer.step()
    trained.config.router_aux_loss_type = "concentration"  # of training: no other base
    trained.save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    assert len(list((tmp_path / "trained").glob("*.safetensors"))) > 1
    create_pack(tmp_path / "trained", "a", tmp_path / "pack")
    apply_packs(base, [tmp_path / "pack"], tmp_path / "applied")
    found = ModMoEForCausalLM.from_pretrained(tmp_path / "applied").eval()
    expected = trained.state_dict()
    assert all(expected[name].equal(tensor) for name, tensor in found.state_dict().items())
    assert found(ids).logits.equal(trained.eval()(ids).logits)


def test_a_pack_is_as_large_as_what_is_new(extended, tmp_path):
    _, model = extended(A, hidden_size=64, vocab_size=4000)
    create_pack(model, "a", tmp_path / "pack")
    new = sum(tensor.nbytes for name, tensor in load_file(model / "model.safetensors").items() if A.owns(name))
    size = sum(len(content) for content in contents(tmp_path / "pack").values())
    assert new < size < new + 6000
    assert contents(tmp_path / "pack").keys() == {"README.md", "extension.safetensors", "pack.json"}
    card = (tmp_path / "pack" / "README.md").read_text()
    assert "3 FFN experts and 2 attention experts" in card
    assert Pack.load(tmp_path / "pack").base.fingerprint in card


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_two_packs_make_one_model(extended, tmp_path, ids, order):
    base, with_a = extended(A)
    _, with_b = extended(B, base)
    create_pack(with_a, "a", tmp_path / "a")
    create_pack(with_b, "b", tmp_path / "b")
    apply_packs(base, [tmp_path / name for name in order], tmp_path / "both")
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "both").eval()
    assert "".join(extension.name for extension in model.config.extension_list()) == order
    # One after the other is the same, and each lifts off.
    apply_packs(base, [tmp_path / order[0]], tmp_path / "first")
    apply_packs(tmp_path / "first", [tmp_path / order[1]], tmp_path / "second")
    assert same_model(tmp_path / "second", tmp_path / "both")
    remove_extension(tmp_path / "both", "b", tmp_path / "rest")
    assert same_model(tmp_path / "rest", with_a)
    # Each pool adds what it adds: with the other's outputs at zero, its own model is left.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if B.owns(name) and name.endswith("down_proj"):
                parameter.zero_()
        assert model(ids).logits.equal(logits(with_a, ids))


def test_a_pack_says_what_was_beside_it(extended, saved, tmp_path):
    base, with_a = extended(A)
    _, both = extended(B, with_a)
    assert create_pack(with_a, "a", tmp_path / "a").beside == []
    create_pack(both, "b", tmp_path / "b")
    assert Pack.load(tmp_path / "b").beside == ["a"]
    assert "The model had these extensions too when the pack was made: a." in (tmp_path / "b/README.md").read_text()
    assert apply_packs(base, [tmp_path / "b"], tmp_path / "out")[0].extension == B


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"router_type": "gmm"}, "router_type is 'mlp' there and 'gmm' here"),
        ({"num_experts": 7, "norm_eps": 1e-6}, "norm_eps is 1e-05 there and 1e-06 here and 1 more"),
        ({"initializer_range": 0.31}, "the configs agree, the weights differ"),
        ({"dtype": torch.bfloat16}, "the configs agree, the weights differ, as after more training or in another"),
    ],
)
def test_another_base_is_refused(extended, saved, tmp_path, change, difference):
    base, model = extended(A)
    create_pack(model, "a", tmp_path / "pack")
    other = saved("other", **change)
    with pytest.raises(ValueError, match=difference) as error:
        apply_packs(other, [tmp_path / "pack"], tmp_path / "out")
    for directory in (base, other):
        assert Base.of(ModelDirectory(directory)).fingerprint in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_bit_makes_another_base(extended, tmp_path):
    base, model = extended(A)
    create_pack(model, "a", tmp_path / "pack")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj"].view(torch.int32)[5, 3, 7] ^= 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the configs agree, the weights differ"):
        apply_packs(base, [tmp_path / "pack"], tmp_path / "out")


def test_fields_that_are_younger_than_a_pack_have_their_defaults(extended, tmp_path):
    base, model = extended(A)
    create_pack(model, "a", tmp_path / "pack")
    fields = json.loads((tmp_path / "pack" / "pack.json").read_text())
    assert fields["base"]["config"].pop("attend_current") is True
    (tmp_path / "pack" / "pack.json").write_text(json.dumps(fields))
    apply_packs(base, [tmp_path / "pack"], tmp_path / "out")


def test_damaged_packs(extended, tmp_path):
    base, model = extended(A)
    pack = tmp_path / "pack"
    create_pack(model, "a", pack)
    good = contents(pack)
    fields = json.loads(good["pack.json"])
    narrow = {name: tensor[:1].clone() for name, tensor in load_file(pack / "extension.safetensors").items()}

    def put(name, content):
        for file, original in good.items():
            (pack / file).write_bytes(original)
        (pack / name).write_bytes(content)

    def refused(kind, message):
        with pytest.raises(kind, match=message):
            apply_packs(base, [pack], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    put("pack.json", json.dumps(fields | {"format": 9}).encode())
    refused(ValueError, "has format 9, known is 1")
    put("pack.json", json.dumps(fields | {"base": {}}).encode())
    refused(ValueError, r"pack.json is damaged \(KeyError\('config'\)\): copy the pack again")
    put("pack.json", json.dumps(fields | {"extension": fields["extension"] | {"num_experts": 4}}).encode())
    refused(ValueError, "are not those of extension 'a'")
    put("extension.safetensors", good["extension.safetensors"][:-100])
    refused(ValueError, "extension.safetensors is damaged or truncated")
    put("pack.json", good["pack.json"])
    save_file(narrow, pack / "extension.safetensors")
    refused(ValueError, "are not those of extension 'a'")
    (pack / "extension.safetensors").unlink()
    refused(FileNotFoundError, "extension.safetensors is missing")
    (pack / "pack.json").unlink()
    refused(FileNotFoundError, "has no pack.json: give the directory of a pack")


def test_names_and_directories(extended, tmp_path):
    base, model = extended(A)
    create_pack(model, "a", tmp_path / "pack")
    with pytest.raises(ValueError, match="has no extension 'x': it has a"):
        create_pack(model, "x", tmp_path / "out")
    with pytest.raises(ValueError, match="has no extension 'a': it has none"):
        remove_extension(base, "a", tmp_path / "out")
    for packs, directory in (([tmp_path / "pack"], model), ([tmp_path / "pack"] * 2, base)):
        with pytest.raises(ValueError, match="has an extension 'a' already"):
            apply_packs(directory, packs, tmp_path / "out")
    for call in (
        lambda: create_pack(model, "a", base),
        lambda: apply_packs(base, [tmp_path / "pack"], base),
        lambda: remove_extension(model, "a", base),
    ):
        with pytest.raises(FileExistsError, match="base exists: name a new directory"):
            call()
    assert {file.name for file in tmp_path.iterdir()} == {"base", "with-a", "pack"}


@pytest.mark.parametrize(
    "counts",
    [
        {},
        {"num_experts": [6, 3], "num_experts_per_tok": [2, 1]},
        {"num_pruned_experts": 2, "num_pruned_attn_experts": 1},
    ],
)
def test_merged_rows_are_ordinary_experts(extended, tmp_path, ids, counts):
    _, model = extended(ROWS, **counts)
    add_extension(model, tmp_path / "two", MORE, init="random")
    with pytest.raises(ValueError, match="extension 'more' comes after 'rows': merge 'rows' first"):
        merge_common(tmp_path / "two", "more", tmp_path / "out")
    merge_common(tmp_path / "two", "rows", tmp_path / "one")
    merge_common(tmp_path / "one", "more", tmp_path / "none")
    merged = ModMoEForCausalLM.from_pretrained(tmp_path / "none").eval()
    assert merged.config.extensions == []
    assert merged.config.num_experts == ([8, 5] if "num_experts" in counts else 8)
    assert merged.config.num_attn_experts == 4 + 1 + 2
    for directory in ("one", "none"):
        torch.testing.assert_close(logits(tmp_path / directory, ids), logits(tmp_path / "two", ids))


def test_a_group_is_not_merged(extended, tmp_path):
    _, model = extended(A)
    with pytest.raises(ValueError, match="has a router of its own"):
        merge_common(model, "a", tmp_path / "out")
