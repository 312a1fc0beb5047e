"""A pruned model is the model without the experts that went, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modmoe import ModMoEForCausalLM
from modmoe.losses.router import RouterStatistics
from modmoe.models.safetensors_stream import SavedWeights
from modmoe.surgery.expert_tensors import ExpertCheckpoint
from modmoe.surgery.fingerprint import checkpoint_identity
from modmoe.surgery.prune import Pruning, choose_pruning
from modmoe.surgery.prune_table import active_after, active_before, size_after, size_before, table
from modmoe.surgery.usage import UsageReport, measure_usage

from ..models.conftest import VARIANTS, build
from .test_routed_modules import build as build_foreign

PER_LAYER = {"num_experts": [3, 6], "num_attn_experts": [1, 4], "num_experts_per_tok": [1, 3]}


def save(directory: Path, model=None, **changes) -> Path:
    model = build(**changes) if model is None else model
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer.copy_(torch.linspace(0, 0.1, len(buffer)))
    model.save_pretrained(directory)
    return directory


def load(directory: Path):
    """
    Weights moved out of the files: where a tensor lies in its file decides the last bit of some products on a CPU.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))


def prune(source: Path, out: Path, kept: dict, denominator: str = "drop") -> Path:
    Pruning(ExpertCheckpoint(source), kept, denominator).write(out)
    return out


def report_of(directory: Path, **domains: torch.Tensor) -> UsageReport:
    model = AutoModelForCausalLM.from_pretrained(directory)
    batches = {name: [{"input_ids": tokens}] for name, tokens in domains.items()}
    return measure_usage(model, batches, identity=checkpoint_identity(directory))


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids).logits


def without_experts(model, kept: dict, denominator: str):
    """The model whose experts are taken away in its routers alone: what pruning must equal."""
    for (layer, side), experts in kept.items():
        block = model.model.layers[layer]
        router = (block.self_attn if side == "attn" else block.mlp).gate
        gone = torch.tensor([expert not in experts for expert in range(router.num_experts)])
        bias = torch.zeros(len(gone)) if router.selection_bias is None else router.selection_bias
        router.selection_bias = bias.masked_fill(gone, -torch.inf)
        if denominator == "drop":
            router.scores = lambda x, scores=router.scores, gone=gone: scores(x).masked_fill(gone, -torch.inf)
    return model


KEPT = {(0, "ffn"): [0, 2, 3], (1, "ffn"): [1, 4, 5], (0, "attn"): [1, 3], (1, "attn"): [0, 2, 3]}


@pytest.mark.parametrize("denominator", ["keep", "drop"])
@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"dense", "dense-attention", "per-layer", "pruned"}))
def test_equals_the_model_whose_router_does_not_know_them(name, denominator, tmp_path, ids):
    source = save(tmp_path / "a", **VARIANTS[name])
    pruned = load(prune(source, tmp_path / "b", KEPT, denominator))
    expected = without_experts(load(source), KEPT, denominator)
    torch.testing.assert_close(logits(pruned, ids), logits(expected, ids), rtol=2e-5, atol=2e-5)
    assert [e.num_experts for _, e in pruned.routed_pools()] == [3, 3, 2, 3]
    assert all(router.num_pruned == 0 for router, _ in pruned.routed_pools()) == (denominator == "drop")


@pytest.mark.parametrize("changes", [{}, {"num_shared_experts": 1}, PER_LAYER, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("denominator", ["keep", "drop"])
def test_what_stays_is_unchanged_bit_for_bit(tmp_path, changes, denominator):
    source = save(tmp_path / "a", **changes)
    kept = {(0, "ffn"): [0, 2], (1, "attn"): [1, 2, 3]}
    before = SavedWeights(source)
    after = SavedWeights(prune(source, tmp_path / "b", kept, denominator))
    added = {
        "model.layers.0.mlp.gate.expert_rows": [0, 2],
        "model.layers.1.self_attn.gate.expert_rows": [1, 2, 3],
    }
    assert set(after) - set(before) == (set(added) if denominator == "keep" else set())
    assert not set(before) - set(after)
    for name, tensor in before.items():
        part = {"layers.0.mlp": [0, 2], "layers.1.self_attn": [1, 2, 3]}.get(".".join(name.split(".")[1:4]))
        stacked = ".experts." in name or (name.endswith("gate.weight") and denominator == "drop")
        expected = tensor[part] if part and stacked else tensor
        assert torch.equal(after[name], expected), name
    if denominator == "keep":
        assert {name: after[name].tolist() for name in added} == added


@pytest.mark.parametrize("denominator", ["keep", "drop"])
def test_keeping_all_changes_nothing(tmp_path, ids, denominator):
    source = save(tmp_path / "a", use_selection_bias=True)
    files = {p.name: p.read_bytes() for p in source.iterdir()}
    out = tmp_path / "b"
    pruning = choose_pruning(
        ExpertCheckpoint(source), report_of(source, d=ids), keep=1.0, denominator=denominator, metric="reap"
    )
    pruning.write(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    mapped = [AutoModelForCausalLM.from_pretrained(d) for d in (source, out)]
    assert torch.equal(logits(mapped[0], ids), logits(mapped[1], ids))


def with_unused_experts(**changes) -> ModMoEForCausalLM:
    """A model whose experts 1 and 4 (1 of the attention) are never chosen but have a share of the softmax."""
    model = build(router_type="linear", num_experts_per_tok=2, use_selection_bias=True, **changes)
    for router, _ in model.routed_pools():
        for unused in (1, 4):
            if unused < router.num_experts:
                router.selection_bias[unused] = -10.0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalise", [True, False])
def test_removing_unused_experts_leaves_logits_unchanged_with_their_rows_kept(tmp_path, ids, renormalise, dtype):
    source, out = tmp_path / "a", tmp_path / "b"
    with_unused_experts(norm_topk_prob=renormalise).to(dtype).save_pretrained(source)
    report = report_of(source, d=ids)
    pruning = choose_pruning(ExpertCheckpoint(source), report, threshold=1e-9, denominator="keep")
    assert not any(1 in experts for experts in pruning.kept.values())
    pruning.write(out)
    before, after = load(source), load(out)
    assert before.dtype == after.dtype == dtype
    assert torch.equal(logits(before, ids), logits(after, ids))
    dropped = load(prune(source, tmp_path / "c", pruning.kept, "drop"))
    assert renormalise or not torch.equal(logits(dropped, ids), logits(before, ids))


def test_dtypes_and_shards(tmp_path, ids):
    """Cut into shards as small as tensors, in bfloat16, and written into shards again."""
    model = build().to(torch.bfloat16)
    whole, shards, out = tmp_path / "whole", tmp_path / "shards", tmp_path / "out"
    model.save_pretrained(whole)
    model.save_pretrained(shards, max_shard_size="10KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    Pruning(ExpertCheckpoint(shards), KEPT).write(out, max_shard_bytes=8_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    pruned = load(out)
    assert pruned.dtype == torch.bfloat16
    assert (
        SavedWeights(out)["model.layers.0.mlp.gate.weight"].dtype
        == SavedWeights(whole).spec("model.layers.0.mlp.gate.weight").dtype
    )
    assert torch.equal(logits(pruned, ids), logits(load(prune(whole, tmp_path / "o", KEPT)), ids))


def fields(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def test_counts_of_the_config(tmp_path):
    source = save(tmp_path / "a")
    same = {(0, "ffn"): [0, 1], (1, "ffn"): [4, 5]}
    uniform = fields(prune(source, tmp_path / "b", same))
    assert (uniform["num_experts"], uniform["num_attn_experts"], uniform["num_experts_per_tok"]) == (2, 4, 2)
    different = fields(prune(source, tmp_path / "c", {(1, "ffn"): [0, 1, 5]}, "keep"))
    assert (different["num_experts"], different["num_pruned_experts"]) == ([6, 3], [0, 3])
    rest = {name for name, value in fields(source).items() if different.get(name) != value}
    assert rest == {"num_experts", "num_pruned_experts"}


@pytest.mark.parametrize("denominator", ["keep", "drop"])
def test_tokens_use_fewer_experts_where_fewer_stay(tmp_path, ids, denominator):
    """Top-k falls in that layer alone, down to a single expert, which is dense unless its gate is a share."""
    source = save(tmp_path / "a", sample_topk=2, num_experts_per_tok=3)
    kept = {(0, "ffn"): [4], (1, "ffn"): [1, 3], (1, "attn"): [2]}
    pruning = Pruning(ExpertCheckpoint(source), kept, denominator)
    attn, ffn, *sampling = pruning.warnings
    assert attn == (
        "fewer attn experts stay than a token uses, so it uses fewer (layer 1: 2 to 1): keep at least 2 in each layer "
        "to avoid it"
    )
    assert "uses fewer (layer 0: 3 to 1, layer 1: 3 to 2): keep at least 3" in ffn
    assert sampling == (
        ["sample_topk falls from 2 to 1, the fewest experts that a token now uses"] if denominator == "keep" else []
    )
    pruning.write(tmp_path / "b")
    pruned = load(tmp_path / "b")
    config = pruned.config
    assert (config.num_experts, config.num_experts_per_tok) == ([1, 2], [1, 2])
    assert (config.num_attn_experts, config.num_attn_experts_per_tok) == ([4, 1], [2, 1])
    assert len(pruned.routed_pools()) == (4 if denominator == "keep" else 2)
    expected = load(source)
    for (layer, side), experts in kept.items():
        block = expected.model.layers[layer]
        module = block.mlp if side == "ffn" else block.self_attn
        module.gate.top_k = len(experts)
        if side == "attn":
            module.top_k = len(experts)
    expected = without_experts(expected, kept, denominator)
    torch.testing.assert_close(logits(pruned, ids), logits(expected, ids), rtol=2e-5, atol=2e-5)
    pruned.train()(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("router", ["linear", "mlp", "gmm"])
@pytest.mark.parametrize(("first", "second"), [("keep", "keep"), ("keep", "drop"), ("drop", "keep"), ("drop", "drop")])
def test_pruning_again(tmp_path, ids, router, first, second):
    """In two steps as in one, where the steps agree; and a second step that drops keeps the rows of the first."""
    source = save(tmp_path / "a", router_type=router, use_selection_bias=True)
    once = prune(source, tmp_path / "b", {(0, "ffn"): [0, 2, 3, 5], (1, "attn"): [1, 2, 3]}, first)
    twice = prune(once, tmp_path / "c", {(0, "ffn"): [1, 3], (1, "attn"): [0, 2]}, second)
    kept = {(0, "ffn"): [2, 5], (1, "attn"): [1, 3]}
    if first == second:
        direct = prune(source, tmp_path / "d", kept, first)
        a, b = SavedWeights(twice), SavedWeights(direct)
        assert set(a) == set(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert fields(twice) == fields(direct)
    else:
        ghosts = [1, 4] if first == "keep" else [0, 3]
        expected = load(prune(source, tmp_path / "d", {(0, "ffn"): sorted([2, 5, *ghosts])}))
        gate = load(twice).model.layers[0].mlp.gate
        assert torch.equal(gate.weight, expected.model.layers[0].mlp.gate.weight)
        assert gate.expert_rows.tolist() == [sorted([2, 5, *ghosts]).index(expert) for expert in (2, 5)]
    assert logits(load(twice), ids).isfinite().all()


def test_the_statistics_of_a_pruned_router_are_those_of_the_experts_it_has(tmp_path, ids):
    model = load(prune(save(tmp_path / "a"), tmp_path / "b", KEPT, "keep"))
    output = model(ids, labels=ids, output_router_logits=True)
    assert [len(load) for load in output.tokens_per_expert] == [3, 3]
    assert [t.shape[-1] for t in output.router_logits] == [3, 3]
    assert all(load.sum() == 2 * ids.numel() for load in output.tokens_per_expert)
    statistics = RouterStatistics.of(output.router_logits, output.router_indices)
    assert torch.equal(statistics.tokens_per_expert()[0], output.tokens_per_expert[0])
    # Otherwise all mass on a row without an expert would be the best concentration.
    assert statistics.vectors[0][:3].sum().item() == pytest.approx(ids.numel(), rel=1e-5)
    report = measure_usage(model, {"d": [{"input_ids": ids}]})
    assert report.scores("frequency", layer=0, side="ffn").shape == (3,)


def test_a_pruned_model_generates_trains_saves_and_is_measured_and_pruned_again(tmp_path, ids):
    source = save(tmp_path / "a", use_selection_bias=True)
    once = prune(source, tmp_path / "b", KEPT, "keep")
    model = ModMoEForCausalLM.from_pretrained(once)
    prompt = ids[:2, :5]
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (2, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model.train()(ids, labels=ids)
    first.loss.backward()
    gate = model.model.layers[0].mlp.gate
    assert gate.weight.grad.abs().sum(1).gt(0).all()  # a row without an expert learns by its share of the softmax
    optimizer.step()
    model.update_selection_bias(first.tokens_per_expert, first.attn_tokens_per_expert)
    assert model(ids, labels=ids).loss < first.loss
    model.save_pretrained(tmp_path / "c")
    report = report_of(tmp_path / "c", d=ids)
    pruning = choose_pruning(ExpertCheckpoint(tmp_path / "c"), report, keep_experts=2, metric="gate")
    pruning.write(tmp_path / "d")
    assert logits(load(tmp_path / "d"), ids).isfinite().all()


def test_a_base_model_alone(tmp_path, ids):
    source = tmp_path / "a"
    model = build().eval()
    model.model.save_pretrained(source)
    out = prune(source, tmp_path / "b", KEPT)
    found = {n.removeprefix("model.") for n in SavedWeights(out)}
    assert any(name.startswith("layers.0.mlp.experts") for name in found)
    assert SavedWeights(out).spec("layers.0.mlp.experts.down_proj").shape[0] == 3


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_models_of_transformers(name, tmp_path):
    source, out = tmp_path / "a", tmp_path / "b"
    build_foreign(name).save_pretrained(source)
    ids = torch.randint(1, 61, (4, 10), generator=torch.Generator().manual_seed(1))
    pruning = choose_pruning(ExpertCheckpoint(source), report_of(source, d=ids), keep_experts=3, metric="reap")
    pruning.write(out)
    pruned, expected = load(out), load(source)
    assert pruned.config.num_local_experts == 3
    for (layer, _), kept in pruning.kept.items():
        block, mlp = expected.model.layers[layer].mlp, pruned.model.layers[layer].mlp
        assert torch.equal(mlp.gate.weight, block.gate.weight[kept])
        assert torch.equal(mlp.experts.gate_up_proj, block.experts.gate_up_proj[kept])
        assert torch.equal(mlp.experts.down_proj, block.experts.down_proj[kept])
    assert logits(pruned, ids).isfinite().all()
    with pytest.raises(ValueError, match="denominator 'keep' needs a native model, and this is"):
        Pruning(ExpertCheckpoint(source), pruning.kept, "keep")
    place = min(pruning.kept)
    with pytest.raises(ValueError, match="the same number of experts in all layers, not 2 to 3: use scope 'layer'"):
        Pruning(ExpertCheckpoint(source), pruning.kept | {place: [0, 1]})


def test_the_domain_decides(tmp_path):
    source = save(tmp_path / "a")
    report = report_of(source, low=torch.arange(0, 8)[None], high=torch.arange(80, 97)[None])
    checkpoint = ExpertCheckpoint(source)
    for domain in ("low", "high", None):
        kept = choose_pruning(checkpoint, report, keep=0.5, domain=domain, metric="gate").kept
        best = report.scores("gate", domain, layer=0, side="ffn").topk(3).indices
        assert set(kept[0, "ffn"]) == set(best.tolist())
    assert choose_pruning(checkpoint, report, keep=0.5, domain="low").kept != kept


def test_only_the_sides_that_were_named_lose_experts(tmp_path, ids):
    source = save(tmp_path / "a")
    pruning = choose_pruning(ExpertCheckpoint(source), report_of(source, d=ids), keep=0.5, sides=["attn"])
    assert {side: len(pruning.pools[0, side].experts) for side in ("attn", "ffn")} == {"attn": 2, "ffn": 6}


@pytest.mark.parametrize("denominator", ["keep", "drop"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"attention_type": "softmax", "position_embedding": "learned"},
        {"extensions": [{"name": "new", "num_experts": 3, "num_attn_experts": 2, "num_experts_per_tok": 2}]},
        {"extensions": [{"name": "new", "num_experts": 3, "num_attn_experts": 2, "mode": "common"}]},
    ],
    ids=["tied", "untied", "learned positions", "group", "common"],
)
def test_sizes_and_active_weights_are_those_of_the_models(tmp_path, denominator, changes):
    source = save(tmp_path / "a", **changes)
    pruning = Pruning(
        ExpertCheckpoint(source), KEPT | {(0, "ffn"): [1] if "extensions" not in changes else [1, 2]}, denominator
    )
    pruning.write(tmp_path / "b")
    for directory, size, active in [
        (source, size_before(pruning), active_before(pruning)),
        (tmp_path / "b", size_after(pruning), active_after(pruning)),
    ]:
        model = ModMoEForCausalLM.from_pretrained(directory)
        assert size.parameters == model.num_parameters()
        tensors = load_file(directory / "model.safetensors").values()
        assert size.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert active == model.num_active_parameters() + model.lm_head.weight.numel()


def test_the_table_says_what_goes(tmp_path):
    pruning = Pruning(ExpertCheckpoint(save(tmp_path / "a")), KEPT)
    lines = table(pruning).splitlines()
    assert len(lines) == 1 + 4 + 1 + 3
    assert [line.split()[:5] for line in lines[1:3]] == [["0", "attn", "4", "->", "2"], ["0", "ffn", "6", "->", "3"]]
    assert "1, 4-5" in lines[2]
    assert [line.split(":")[0] for line in lines[6:]] == ["parameters", "bytes", "operations per token"]


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("group", {(0, "attn"): [1], (0, "ffn"): [0], (1, "attn"): [0], (1, "ffn"): [2]}), ("common", {(0, "ffn"): [3]})],
)
def test_an_extension_keeps_the_router_that_it_needs(tmp_path, ids, mode, kept):
    extension = {"name": "new", "num_experts": 2, "mode": mode}
    checkpoint = ExpertCheckpoint(save(tmp_path / "model", extensions=[extension]))
    with pytest.raises(ValueError, match=r"what is left would be no model \(extension 'new' .*keep more experts"):
        Pruning(checkpoint, kept)
    Pruning(checkpoint, kept, "keep").write(tmp_path / "out")
    assert logits(load(tmp_path / "out"), ids).isfinite().all()


def test_no_half_of_a_directory_is_left(tmp_path, monkeypatch):
    source = save(tmp_path / "a")

    def interrupt(*_) -> None:
        assert len(list(tmp_path.glob(".b.*"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(SavedWeights, "rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "b", KEPT)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_weights_that_are_not_those_of_the_config(tmp_path):
    source = save(tmp_path / "a")
    content = fields(source) | {"num_experts": 5}
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"do not match the config, which says 5 experts in model.layers.0.mlp"):
        ExpertCheckpoint(source)
    content["num_experts"] = 6
    (source / "config.json").write_text(json.dumps(content))
    state = load_file(source / "model.safetensors")
    del state["model.layers.1.mlp.gate.weight"]
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not match the config, which says 6 experts in model.layers.1.mlp"):
        ExpertCheckpoint(source)
