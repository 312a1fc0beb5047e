"""Experts out of use against models from which they are removed."""

import pytest
import torch

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.surgery.expert_tensors import ExpertCheckpoint
from modmoe.surgery.prune import Pruning
from modmoe.surgery.retire import retire
from modmoe.surgery.routed_modules import find_routed_modules

FIELDS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "head_dim": 8,
    "num_attn_experts": 4,
    "intermediate_size": 16,
    "num_experts": 5,
    "router_hidden_size": 8,
    "initializer_range": 0.4,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_weight": 0.1,
}
GONE = {(0, "attn"): [1], (0, "ffn"): [0, 3], (1, "ffn"): [4]}


def make(**fields):
    torch.manual_seed(0)
    model = ModMoEForCausalLM(ModMoEConfig(**(FIELDS | fields)))
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.copy_(torch.linspace(0, 0.3, len(buffer)))
    return model


def retire_all(model, gone, denominator):
    for module in find_routed_modules(model):
        if (module.layer, module.side) in gone:
            retire(module.router, gone[module.layer, module.side], denominator)
    return model


def removed(model, gone, denominator, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    checkpoint = ExpertCheckpoint(tmp_path / "whole")
    kept = {
        place: [e for e in range(pool.num_experts) if e not in gone.get(place, [])]
        for place, pool in checkpoint.pools.items()
    }
    Pruning(checkpoint, kept, denominator).write(tmp_path / "pruned")
    return ModMoEForCausalLM.from_pretrained(tmp_path / "pruned")


@pytest.mark.parametrize("denominator", ["keep", "drop"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": True},
        {"router_aux_loss_type": "concentration", "router_type": "linear"},
        {"unit_gates": True},
        {"use_selection_bias": True},
        {"use_selection_bias": True, "norm_topk_prob": True},
        {"num_experts_per_tok": 4},  # more than are left
        {"num_experts_per_tok": 4, "norm_topk_prob": True},
    ],
    ids=[
        "plain",
        "renormalised",
        "concentration",
        "unit gates",
        "biased",
        "biased, renormalised",
        "few left",
        "few left, renormalised",
    ],
)
def test_logits_loss_and_gradients_are_those_of_the_pruned_model(tmp_path, denominator, fields):
    model = make(**fields)
    pruned = removed(model, GONE, denominator, tmp_path).train()
    retire_all(model, GONE, denominator).train()
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    outputs = [m(input_ids=ids, labels=ids) for m in (model, pruned)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    for output in outputs:
        output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.gate.in_proj.weight"):
        if fields.get("router_type") != "linear" or "gate" not in name:
            torch.testing.assert_close(model.get_parameter(name).grad, pruned.get_parameter(name).grad)
    for (layer, side), gone in GONE.items():
        if side == "ffn":
            assert not model.model.layers[layer].mlp.experts.down_proj.grad[gone].any()
            assert not outputs[0].tokens_per_expert[layer][gone].any()


def test_balancing_is_among_those_that_are_left(tmp_path):
    gone = {(0, "ffn"): [0, 3]}
    model = make(use_selection_bias=True)
    pruned = removed(model, gone, "drop", tmp_path)
    retire_all(model, gone, "drop")
    others = [torch.ones(5)], [torch.ones(4)] * 2
    # Of ten choices, three are fewer than one of three experts should get, and more than one of five.
    model.update_selection_bias([torch.tensor([0.0, 5, 3, 0, 2]), *others[0]], others[1])
    pruned.update_selection_bias([torch.tensor([5.0, 3, 2]), *others[0]], others[1])
    bias = pruned.model.layers[0].mlp.gate.selection_bias
    assert model.model.layers[0].mlp.gate.selection_bias[[1, 2, 4]].equal(bias)


def test_more_may_go_later(tmp_path):
    model = make()
    steps = ({(0, "ffn"): [2]}, {(0, "ffn"): [2, 0]})
    for gone in steps:
        retire_all(model, gone, "drop")
    ids = torch.arange(12)[None]
    pruned = removed(make(), steps[1], "drop", tmp_path)
    torch.testing.assert_close(model(input_ids=ids).logits, pruned(input_ids=ids).logits)
    assert not any("retired" in name or "selection_bias" in name for name in model.state_dict())


def test_drawn_experts_are_never_retired_ones():
    model = retire_all(make(sample_topk=1), GONE, "keep").train()
    outputs = model(input_ids=torch.randint(0, 40, (4, 64)), labels=torch.zeros(4, 64, dtype=torch.long))
    assert not outputs.tokens_per_expert[0][[0, 3]].any()
    assert outputs.tokens_per_expert[0].sum() == 4 * 64 * 2


def test_what_cannot_be():
    router = find_routed_modules(make())[0].router
    with pytest.raises(ValueError, match="all 4 experts of a router would be retired: leave at least one"):
        retire(router, range(4), "drop")
    router = find_routed_modules(make(sample_topk=1))[0].router
    with pytest.raises(ValueError, match="sample_topk=1 cannot draw from 1 experts: keep 2"):
        retire(router, range(3), "drop")
