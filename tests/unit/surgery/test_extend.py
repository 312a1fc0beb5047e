"""Extending a saved model: it answers as before, learns with its new experts, and forgets nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.models.extension import Extension
from modmoe.ops import use_backend
from modmoe.surgery.extend import MostUsed, add_extension, gate_bound, train_only
from modmoe.surgery.fingerprint import checkpoint_identity
from modmoe.surgery.model_directory import ModelDirectory
from modmoe.surgery.routed_modules import find_routed_modules
from modmoe.surgery.usage import measure_usage

from ..models.conftest import TINY, VARIANTS
from .conftest import logits

NEW = Extension("new", num_experts=3, num_experts_per_tok=2, num_attn_experts=2)
COMMON = Extension("rows", num_experts=3, num_attn_experts=2, mode="common")


def is_routed(fields):
    config = ModMoEConfig(**(TINY | fields))
    return bool(config.router_rows_at(0) or config.attn_router_rows_at(0))


def tensors(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [name for name, fields in VARIANTS.items() if is_routed(fields)])
def test_zero_gives_the_old_logits_bit_for_bit(saved, tmp_path, ids, variant, dtype):
    base = saved(dtype=dtype, **VARIANTS[variant])
    add_extension(base, tmp_path / "out", NEW)
    assert logits(tmp_path / "out", ids).equal(logits(base, ids))
    old, new = tensors(base), tensors(tmp_path / "out")
    assert all(new[name].equal(tensor) for name, tensor in old.items())
    assert {tensor.dtype for name, tensor in new.items() if NEW.owns(name)} <= {torch.float32, dtype}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_zero_keeps_every_bit_whatever_computes(saved, tmp_path, backend):
    """Long inputs, which kernels cut into blocks, packed documents, padding, and one token at a time."""
    base = saved(num_attention_heads=2, num_key_value_heads=1)
    add_extension(base, tmp_path / "out", NEW)
    models = [ModMoEForCausalLM.from_pretrained(path).eval() for path in (base, tmp_path / "out")]
    ids = torch.randint(0, 97, (2, 150), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(150).expand(2, -1) % 70
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    with use_backend(backend):
        for arguments in ({}, {"attention_mask": mask}, {"position_ids": positions}):
            a, b = (model(ids, **arguments).logits for model in models)
            assert a.equal(b)
        caches = [model(ids, use_cache=True).past_key_values for model in models]
        a, b = (m(ids[:, :1], past_key_values=c).logits for m, c in zip(models, caches, strict=True))
        assert a.equal(b)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_zero_keeps_every_bit_of_softmax_attention(saved, tmp_path, ids, implementation):
    base = saved(attention_type="softmax")
    add_extension(base, tmp_path / "out", NEW)
    options = {"attn_implementation": implementation, "experts_implementation": "eager"}
    assert logits(tmp_path / "out", ids, **options).equal(logits(base, ids, **options))


def test_the_model_is_copied_with_what_belongs_to_it_and_not_touched(saved, tmp_path):
    base = saved()
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    add_extension(base, tmp_path / "out", NEW)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["extensions"][0]["name"] == "new"
    assert config | {"extensions": []} == json.loads(before["config.json"])


def test_gradient_reaches_outputs_first_and_the_router_next(saved, tmp_path, ids):
    add_extension(saved(), tmp_path / "out", NEW)
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "out", router_aux_loss_type="none").train()
    trainable = train_only(model, "new")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        reached.append({name for name in trainable if model.get_parameter(name).grad.any()})
        optimizer.step()
    assert reached[0] == {name for name in trainable if name.endswith(("down_proj", "o_proj.weight"))}
    assert reached[1] == set(trainable)


@pytest.mark.parametrize("extension", [NEW, COMMON], ids=["group", "common"])
def test_training_uses_the_new_experts_and_leaves_the_old_weights(saved, tmp_path, extension):
    """50 steps of AdamW with weight decay, on a domain that the model has not seen: counting."""
    add_extension(saved(initializer_range=0.05, use_selection_bias=extension is NEW), tmp_path / "out", extension)
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "out").train()
    train_only(model, [extension.name])
    old = {name: tensor.clone() for name, tensor in model.state_dict().items() if not extension.owns(name)}
    new = {name: tensor.clone() for name, tensor in model.state_dict().items() if extension.owns(name)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    start = torch.arange(8)[:, None] * 11
    losses = []
    for _ in range(50):
        ids = (start + torch.arange(16)) % 97
        out = model(ids, labels=ids)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if model.config.use_selection_bias:
            model.update_selection_bias(out.tokens_per_expert, out.attn_tokens_per_expert)
        losses.append(float(out.cross_entropy.detach()))
    assert losses[-1] < 0.8 * losses[0]
    if extension is NEW:
        loads = out.extension_tokens_per_expert["new"]
    else:
        loads = [load[6:] for load in out.tokens_per_expert] + [load[4:] for load in out.attn_tokens_per_expert]
    assert all(load.sum() > 0 for load in loads)
    state = model.state_dict()
    assert all(state[name].equal(tensor) for name, tensor in old.items())
    assert not any(state[name].equal(tensor) for name, tensor in new.items())
    model.save_pretrained(tmp_path / "trained")
    assert all(tensors(tmp_path / "trained")[name].equal(tensor) for name, tensor in old.items())


def test_the_same_seed_gives_the_same_weights(saved, tmp_path):
    base = saved()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(int.from_bytes(name.encode()))
        add_extension(base, tmp_path / name, NEW, seed=seed)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    a, c = (tensors(tmp_path / name)["model.layers.1.mlp.extensions.new.gate.weight"] for name in "ac")
    assert not a.equal(c)


def test_random_weights_are_those_of_a_new_model(saved, tmp_path, ids):
    base = saved()
    add_extension(base, tmp_path / "out", NEW, init="random")
    for name, tensor in tensors(tmp_path / "out").items():
        if name.endswith("context_weight"):
            assert not tensor.any()
        elif NEW.owns(name) and not name.endswith("bias"):
            assert 0.2 < tensor.std() < 0.4, name
    assert not logits(tmp_path / "out", ids).equal(logits(base, ids))


@pytest.mark.parametrize("router_type", ["linear", "mlp", "gmm"])
@pytest.mark.parametrize("mode", ["group", "common"])
def test_clones_are_copies_of_experts_and_routers(saved, tmp_path, router_type, mode):
    base = saved(router_type=router_type)
    add_extension(base, tmp_path / "out", Extension("e", 8, 1, 2, 1, mode), init="clone")
    found = tensors(tmp_path / "out")
    for side, count, projection in (("mlp", 8, "down_proj"), ("self_attn", 2, "q_proj.weight")):
        old, new = f"model.layers.1.{side}", f"model.layers.1.{side}.extensions.e"
        wanted = torch.arange(count) % len(found[f"{old}.experts.{projection}"])
        assert found[f"{new}.experts.{projection}"].equal(found[f"{old}.experts.{projection}"][wanted])
        rows = found[f"{new}.gate.weight"]
        if mode == "group":
            torch.testing.assert_close(rows[0], found[f"{old}.gate.weight"].mean(0))
            rows = rows[1:]
            assert all(found[f"{new}.gate.{rest}"].equal(found[f"{old}.gate.{rest}"])
                       for rest in ("in_proj.weight", "log_temperature") if f"{old}.gate.{rest}" in found)  # fmt: skip
        assert rows.equal(found[f"{old}.gate.weight"][wanted])


@torch.no_grad()
def usage_of(directory, ids):
    model = ModMoEForCausalLM.from_pretrained(directory)
    batches = {"a": [{"input_ids": ids[:1]}], "b": [{"input_ids": ids[1:]}]}
    return measure_usage(model, batches, identity=checkpoint_identity(directory))


@pytest.mark.parametrize("mode", ["group", "common"])
@pytest.mark.parametrize("domain", [None, "b"])
def test_clones_of_the_most_used_experts(saved, tmp_path, ids, mode, domain):
    base = saved(num_experts=[6, 1])
    report = usage_of(base, ids)
    new = Extension("e", 8 if mode == "group" else 0, 1, 3, 1, mode)
    add_extension(base, tmp_path / "out", new, init="clone", most_used=MostUsed(report, domain))
    old, all_tensors = tensors(base), tensors(tmp_path / "out")
    pools = {(0, "attn", 4): "self_attn", (1, "attn", 4): "self_attn"}
    pools |= {(0, "ffn", 6): "mlp"} if mode == "group" else {}
    for (layer, side, count), name in pools.items():
        load = report.scores("frequency", domain, layer=layer, side=side).tolist()
        order = sorted(range(count), key=lambda expert: -load[expert])
        assert order != list(range(count))  # else it would not tell the two ways apart
        where = f"model.layers.{layer}.{name}"
        gate = all_tensors[f"{where}.extensions.e.gate.weight"][mode == "group" :]
        weight = "o_proj.weight" if side == "attn" else "down_proj"
        copies = all_tensors[f"{where}.extensions.e.experts.{weight}"]
        for i, (row, copy) in enumerate(zip(gate, copies, strict=True)):
            assert copy.equal(old[f"{where}.experts.{weight}"][order[i % count]])
            assert row.equal(old[f"{where}.gate.weight"][order[i % count]])


def test_usage_that_cannot_choose(saved, tmp_path, ids):
    base, other = saved(), saved("other", initializer_range=0.2)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    report = usage_of(base, ids)
    for init, most_used, message in (
        ("zero", MostUsed(report), "init='zero' copies no experts"),
        ("clone", MostUsed(usage_of(other, ids)), "the usage report is of another model"),
        ("clone", MostUsed(report, "c"), "has no domain 'c'; it has a, b"),
    ):
        with pytest.raises(ValueError, match=message):
            add_extension(base, tmp_path / "out", NEW, init=init, most_used=most_used)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "other"]


@pytest.mark.parametrize("init", ["zero", "clone"])
@pytest.mark.parametrize("extension", [NEW, COMMON], ids=["group", "common"])
def test_rows_of_pruned_experts_are_nobodys(saved, tmp_path, ids, extension, init):
    base = saved(num_pruned_experts=2, num_pruned_attn_experts=1)
    tensors_of_base = tensors(base)
    for layer in (0, 1):
        rows = tensors_of_base[f"model.layers.{layer}.mlp.gate.expert_rows"]
        rows.copy_(torch.tensor([0, 2, 3, 4, 6, 7]))
    save_file(tensors_of_base, base / "model.safetensors", {"format": "pt"})
    add_extension(base, tmp_path / "out", extension, init=init)
    name = f"model.layers.1.mlp.extensions.{extension.name}.gate.weight"
    own = tensors_of_base["model.layers.1.mlp.gate.weight"][rows]
    found = tensors(tmp_path / "out")[name]
    if init == "clone":
        assert found[-3:].equal(own[:3])
    elif extension is COMMON:
        torch.testing.assert_close(found, own.mean(0).expand(3, -1))
    out = ModMoEForCausalLM.from_pretrained(tmp_path / "out")(ids, output_router_logits=True)
    assert out.router_logits[1].shape[1] == (6 + 3 if extension is COMMON else 6)
    assert int(out.router_indices[1].max()) < out.router_logits[1].shape[1]


@torch.no_grad()
@pytest.mark.parametrize("router_type", ["linear", "mlp", "gmm"])
@pytest.mark.parametrize("init", ["zero", "clone"])
def test_common_rows_take_no_more_than_the_bound(saved, tmp_path, ids, router_type, init):
    base = saved(router_type=router_type)
    add_extension(base, tmp_path / "out", COMMON, init=init)
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "out")
    out = model(ids, output_router_logits=True)
    taken = max(float(x.softmax(-1)[:, 6:].sum(-1).max()) for x in out.router_logits)
    taken = max(taken, max(float(x.softmax(-1)[:, 4:].sum(-1).max()) for x in out.attn_router_logits))
    bound = gate_bound(ModelDirectory(base), COMMON, init)
    assert 0.1 < taken <= bound + 1e-6
    assert bound == (0.5 if init == "clone" else pytest.approx(3 / (3 + 6 * (0.1353 if router_type == "gmm" else 1)),
                                                               abs=1e-3))  # fmt: skip
    assert gate_bound(ModelDirectory(base), COMMON, "random") is None


def test_two_extensions_in_order(saved, tmp_path, ids):
    base = saved()
    add_extension(base, tmp_path / "one", NEW)
    add_extension(tmp_path / "one", tmp_path / "two", Extension("other", 2))
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "two").eval()
    assert [extension.name for extension in model.config.extension_list()] == ["new", "other"]
    assert model(ids).logits.equal(logits(base, ids))
    train_only(model, "other")
    assert {p.requires_grad for name, p in model.named_parameters() if NEW.owns(name)} == {False}


@torch.no_grad()
def test_the_cost_is_what_the_model_counts(saved, tmp_path):
    base = saved()
    for extension in (NEW, COMMON):
        cost = add_extension(base, tmp_path / extension.name, extension)
        old, new = (ModMoEForCausalLM.from_pretrained(path) for path in (base, tmp_path / extension.name))
        assert cost.parameters == new.num_parameters() - old.num_parameters()
        assert cost.active_parameters == new.num_active_parameters() - old.num_active_parameters()
        biases = sum(p.numel() for name, p in new.named_parameters() if extension.owns(name) and p.ndim == 1)
        assert cost.multiply_adds == cost.active_parameters - biases
        # 2 layers, one slot of 4 heads of 8 and 2 kv heads for the context of the document, read and added up
        assert cost.multiply_adds_per_key == (2 * (1 * 4 + 2) * 8 * 2 if extension is NEW else 0)


def test_usage_is_measured_on_the_models_own_routers(saved, tmp_path):
    add_extension(saved(), tmp_path / "out", NEW)
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "out")
    assert [module.num_experts for module in find_routed_modules(model)] == [4, 6, 4, 6]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["modmoe", "grouped_mm"])
def test_usage_leaves_out_experts_in_common_routers(saved, tmp_path, ids, implementation):
    add_extension(saved(), tmp_path / "out", COMMON, init="random")
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "out", experts_implementation=implementation)
    outputs = model.model(ids, output_router_logits=True)
    expected = zip(outputs.attn_router_indices, outputs.router_indices, strict=True)
    chosen = [index for layer in expected for index in layer]
    for router, index in zip(measure_usage(model, {"text": [{"input_ids": ids}]}).routers, chosen, strict=True):
        assert (index >= router.num_experts).any(), "nobody chose a new expert"
        assert router.on().assignments.equal(index.flatten().bincount()[: router.num_experts])
        assert router.num_experts == {"attn": 4, "ffn": 6}[router.side]


def test_other_classes_are_extended(saved, tmp_path, ids):
    model = ModMoEForCausalLM.from_pretrained(saved())
    model.model.save_pretrained(tmp_path / "headless")
    add_extension(tmp_path / "headless", tmp_path / "out", NEW)
    extended = type(model.model).from_pretrained(tmp_path / "out")
    assert extended(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("extension", "changes", "message"),
    [
        (NEW, {"extensions": [{"name": "new", "num_experts": 1}]}, "has an extension 'new' already: choose another"),
        (NEW, {"num_experts": 1, "num_attn_experts": 1}, "needs a model with experts"),
        (COMMON, {"num_attn_experts": 1}, "layer 0 is dense: use mode='group'"),
    ],
)
def test_what_does_not_fit_is_refused(saved, tmp_path, extension, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        add_extension(saved(**changes), tmp_path / "out", extension)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_directories_that_will_not_do(saved, tmp_path):
    base = saved()
    with pytest.raises(FileExistsError, match="base exists: name a new directory"):
        add_extension(base, base, NEW)
    with pytest.raises(ValueError, match="init='none' is not one of zero, clone, random"):
        add_extension(base, tmp_path / "out", NEW, init="none")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        add_extension(tmp_path / "nowhere", tmp_path / "out", NEW)
    for text, message in (
        ("{", "config.json is damaged"),
        ("[]", "holds no object"),
        ('{"model_type": "llama"}', "'llama', not 'modmoe': upcycle it first"),
        ('{"model_type": "moduleformer"}', "convert it with tools/convert_moduleformer.py first"),
    ):
        (base / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            add_extension(base, tmp_path / "out", NEW)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_training_extensions_that_are_not_there():
    model = ModMoEForCausalLM(ModMoEConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, intermediate_size=8))
    with pytest.raises(ValueError, match="no extension 'x': it has none; add one with tools/extend.py"):
        train_only(model, "x")
    with pytest.raises(ValueError, match="no extension"):
        train_only(model, [])
