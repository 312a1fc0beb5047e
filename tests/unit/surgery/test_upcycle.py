"""Upcycled directories: logits of the dense parent, nothing else lost, and what is refused."""

import json
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.models.dense import from_dense
from modmoe.models.safetensors_stream import SavedWeights
from modmoe.surgery import upcycle as upcycle_file
from modmoe.surgery.upcycle import upcycle

from ..models.conftest import build
from .conftest import dense_model

ALL = {"num_experts": 8, "num_experts_per_tok": 8}
FEW = {"num_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture
def saved(tmp_path):
    """Saves a dense model and says where."""

    def save(kind="llama", dtype=torch.float32, **options):
        dense_model(kind).to(dtype).save_pretrained(tmp_path / "dense", **options)
        return tmp_path / "dense"

    return save


def load(directory) -> ModMoEForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def bytes_of(directory) -> dict:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@torch.no_grad()
def test_the_skeleton_has_the_logits_of_every_family(kind, ids):
    dense = dense_model(kind)
    model, mask = from_dense(dense), torch.ones_like(ids)
    mask[0, :7] = 0
    real = mask.bool()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours, theirs = (m(ids, attention_mask=mask, position_ids=positions).logits[real] for m in (model, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # An end token among so few words would end a row early, in both.
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(*(m.generate(ids, pad_token_id=0, **settings) for m in (model, dense)))


@torch.no_grad()
@pytest.mark.parametrize("gates", [{"norm_topk_prob": True}, {"unit_gates": True}], ids=str)
@pytest.mark.parametrize(("method", "fields"), [("copy", FEW), ("cluster", ALL)], ids=["copy", "cluster"])
def test_a_dense_model_of_our_own_whatever_it_says_of_gates_it_does_not_have(ids, tmp_path, method, fields, gates):
    dense = build(num_experts=1, num_attn_experts=1, **gates).eval()
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "out", method, fields)
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("method", "fields"), [("copy", FEW), ("cluster", ALL)], ids=["copy", "cluster"])
def test_logits_are_the_parents(kind, ids, saved, tmp_path, method, fields, wide_norms):
    source = saved(kind)
    upcycle(source, tmp_path / "out", method, fields)
    model, dense = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source)
    assert len(model.routed_pools()) == 2
    theirs = dense(ids).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(model(ids).logits, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.double()(ids).logits, dense.double()(ids).logits, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation_gives_them(ids, saved, tmp_path, implementation):
    source = saved("gpt2")
    upcycle(source, tmp_path / "out", "cluster", {"num_experts": 4, "num_experts_per_tok": 4})
    model = load(tmp_path / "out")
    model.set_experts_implementation(implementation)
    theirs = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    torch.testing.assert_close(model(ids).logits, theirs, rtol=0, atol=1e-4)


def test_training_starts_from_it(ids, saved, tmp_path):
    upcycle(saved(), tmp_path / "out", "cluster", FEW)
    model = load(tmp_path / "out").train()
    loss = model(ids, labels=ids).cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        assert all(router.weight.grad.any() for router, _ in model.routed_pools())
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).cross_entropy < loss


@torch.no_grad()
def test_layers_may_stay_dense_between_copies(ids, saved, tmp_path):
    source = saved()
    upcycle(source, tmp_path / "out", "copy", {"num_experts": [1, 4], "num_experts_per_tok": 2, "router_type": "mlp"})
    model = load(tmp_path / "out")
    assert len(model.routed_pools()) == 1
    torch.testing.assert_close(model(ids).logits, load(source)(ids).logits, rtol=0, atol=1e-4)


def test_everything_that_belongs_to_the_model_comes_along(saved, tmp_path):
    source = saved(dtype=torch.bfloat16, max_shard_size="20kB")
    GenerationConfig(max_new_tokens=7).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"):
        (source / name).write_text(name)
    before = bytes_of(source)
    sentence = upcycle(source, tmp_path / "new" / "out", "cluster", FEW)
    out = tmp_path / "new" / "out"
    assert (
        sentence
        == f"{out}: 8 experts of 6 neurons in each of 2 layers, 2 for each token; it equals its parent with all 8"
    )
    assert (out / "merges.txt").read_text() == "merges.txt"
    assert (out / "chat_template.jinja").exists()
    model = load(out)
    assert model.generation_config.max_new_tokens == 7
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert model.config.to_dict().items() >= {"num_experts": 8, "intermediate_size": 6, "unit_gates": True}.items()
    assert bytes_of(source) == before
    assert os.listdir(tmp_path / "new") == ["out"]
    saved_again = tmp_path / "again"
    model.save_pretrained(saved_again)
    ours, theirs = load_file(out / "model.safetensors"), load_file(saved_again / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_seed_decides(saved, tmp_path):
    source = saved()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(source, tmp_path / name, "copy", FEW, reinit=0.5, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_routers_start_as_asked(saved, tmp_path):
    source = saved()
    upcycle(source, tmp_path / "centroid", "cluster", FEW)
    upcycle(source, tmp_path / "random", "cluster", FEW, router="random")
    for name, spread in (("centroid", None), ("random", 0.3)):  # the second is initializer_range
        weights = load_file(tmp_path / name / "model.safetensors")
        rows = weights["model.layers.1.mlp.gate.weight"]
        if spread:
            assert rows.std().item() == pytest.approx(spread, rel=0.2)
        else:
            scale = weights["model.layers.1.post_attention_layernorm.weight"]
            torch.testing.assert_close((rows * scale).norm(dim=-1), torch.ones(8))


def test_one_layer_is_read_at_a_time(saved, tmp_path, monkeypatch):
    """Of the tensors that were read, those that are still held are never more than one layer's FFN."""
    source, held, most = saved(), [], 0
    read = SavedWeights.__getitem__

    def counted(self, name):
        nonlocal most
        tensor = read(self, name)
        held.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in held))
        return tensor

    monkeypatch.setattr(SavedWeights, "__getitem__", counted)
    upcycle(source, tmp_path / "out", "cluster", FEW)
    assert len(held) > 20
    assert most <= 4


def test_nothing_is_left_of_a_failure(saved, tmp_path, monkeypatch):
    source = saved()
    monkeypatch.setattr(upcycle_file, "split_ffn", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upcycle(source, tmp_path / "out", "copy", FEW)
    assert sorted(os.listdir(tmp_path)) == ["dense"]


@pytest.mark.parametrize(
    ("method", "fields", "options", "message"),
    [
        ("split", FEW, {}, "method='split' must be one of copy, cluster"),
        ("copy", {}, {}, r"num_experts is not given: say it \(--experts and --top-k"),
        ("copy", {"num_experts": 4}, {}, "num_experts_per_tok is not given"),
        (
            "copy",
            {"num_experts": 4, "num_experts_per_tok": 5},
            {},
            "num_experts_per_tok=5 in layer 0 must be between 1 and",
        ),
        (
            "cluster",
            {"num_experts": 7, "num_experts_per_tok": 2},
            {},
            "num_experts=7 does not divide the 48 neurons.*as 6",
        ),
        ("cluster", {"num_experts": [8, 4], "num_experts_per_tok": 2}, {}, "clusters have one size in all layers"),
        (
            "copy",
            FEW | {"hidden_size": 64},
            {},
            "hidden_size=64 contradicts the dense model .* 32 follows: leave it out",
        ),
        ("cluster", FEW | {"norm_topk_prob": True}, {}, "norm_topk_prob=True contradicts .* False follows"),
        ("copy", FEW | {"routertype": "mlp"}, {}, "unknown field routertype='mlp'.*did you mean router_type"),
        ("copy", FEW, {"reinit": -0.1}, "reinit=-0.1 must be a share between 0 and 1"),
        ("cluster", FEW, {"reinit": 0.1}, "reinit=0.1 would break up the clusters"),
        ("copy", FEW, {"router": "centroid"}, "router='centroid' needs method='cluster'"),
        ("cluster", FEW, {"router": "middle"}, "router='middle' must be centroid or random"),
        (
            "cluster",
            FEW | {"router_type": "mlp"},
            {},
            "router_type='mlp' cannot start from centroids: .* router='random'",
        ),
    ],
)
def test_settings_that_contradict_the_model_or_each_other(saved, tmp_path, method, fields, options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(saved(), tmp_path / "out", method, fields, **options)
    assert sorted(os.listdir(tmp_path)) == ["dense"]


def test_directories_that_are_no_dense_model(saved, tmp_path):
    def refused(message, error=ValueError):
        with pytest.raises(error, match=message):
            upcycle(source, tmp_path / "out", "copy", FEW)

    source = tmp_path / "nowhere"
    refused("nowhere has no config.json: give the directory of a saved model", FileNotFoundError)
    source = saved()
    MixtralConfig(num_local_experts=4).save_pretrained(source)
    refused(r"'mixtral' model is not dense: it has experts already \(num_local_experts=4\)")
    ModMoEConfig().save_pretrained(source)
    refused("'modmoe' model is not dense")
    (source / "config.json").write_text("{")
    refused("config.json is damaged")
    (source / "config.json").write_text(json.dumps({"model_type": "t5"}))
    refused("model_type='t5' is not a dense model known here: llama, mistral")


def test_weights_that_are_no_dense_model(saved, tmp_path):
    def refused(message, error=ValueError):
        with pytest.raises(error, match=message):
            upcycle(source, tmp_path / "out", "copy", FEW)
        assert not (tmp_path / "out").exists()

    source = saved()
    weights = load_file(source / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, source / "model.safetensors")
    refused("the weights lack model.norm.weight")
    save_file(weights | {"model.norm.weight": norm[:-1].clone()}, source / "model.safetensors")
    refused(r"model.norm.weight would be \(31,\), but config.json says \(32,\)")
    weights |= {"model.norm.weight": norm, "model.layers.0.self_attn.sinks": norm.clone()}
    save_file(weights, source / "model.safetensors")
    refused("model.layers.0.self_attn.sinks has no place in the model")
    (source / "model.safetensors").unlink()
    refused("dense has neither model.safetensors nor", FileNotFoundError)
    torch.save(weights, source / "pytorch_model.bin")
    refused(r"only pickled weights \(pytorch_model.bin\), which can run code when read", FileNotFoundError)


def test_output_in_use(saved, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists: name a new directory"):
        upcycle(saved(), tmp_path / "out", "copy", FEW)
    with pytest.raises(ValueError, match="which is not modified"):
        upcycle(saved(), saved() / "out", "copy", FEW)
