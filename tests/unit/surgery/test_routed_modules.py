"""What is observed on models of each family against products written out token by token."""

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from modmoe.surgery.routed_modules import find_routed_modules, observing

from ..layers.test_grouped_experts import MODELS, TINY, randomize
from ..models.conftest import build as build_native

IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def build(name: str, implementation: str = "eager") -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**(TINY | MODELS[name]), experts_implementation=implementation)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomize(model)
    return model


@torch.no_grad()
def observe(model: nn.Module, ids: torch.Tensor = IDS) -> list[tuple]:
    """Routed module, its input (rows as its projection or its experts get them), and what the observer was told."""
    modules = find_routed_modules(model)
    seen: list = [None] * len(modules)
    rows: list = [None] * len(modules)

    def note(number, *figures):
        assert seen[number] is None, "observed twice in one pass"
        seen[number] = figures

    def keep(number):
        return lambda _, arguments: rows.__setitem__(number, arguments[0])

    targets = [m.experts.o_proj if m.side == "attn" else m.experts for m in modules]
    handles = [target.register_forward_pre_hook(keep(i)) for i, target in enumerate(targets)]
    with observing(modules, note):
        model.base_model(ids)
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks for m in model.modules()), "a hook was left"
    return list(zip(modules, rows, seen, strict=True))


def gated(experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
    return experts.down_proj[expert] @ (nn.functional.silu(gate) * up)


@pytest.mark.parametrize("implementation", ["eager", "modmoe", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_transformers_models_by_hand(name, implementation):
    observed = observe(build(name, implementation))
    assert [(m.layer, m.side, m.name) for m, _, _ in observed] == [
        (0, "ffn", "model.layers.0.mlp"),
        (1, "ffn", "model.layers.1.mlp"),
    ]
    for module, rows, (logits, index, gates, norms) in observed:
        assert_close(logits, rows @ module.router.weight.T)
        probabilities = logits.softmax(-1)
        best, chosen = probabilities.topk(2)
        assert torch.equal(index, chosen)
        # Mixtral always divides the gates by their sum, the others if their config says so.
        divides = getattr(module.router, "norm_topk_prob", True)
        assert_close(gates, best / best.sum(-1, keepdim=True) if divides else best)
        for token in range(len(rows)):
            for slot in range(2):
                output = gated(module.experts, int(index[token, slot]), rows[token])
                assert_close(norms[token, slot], output.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GraniteMoe", "Qwen2Moe", "DeepseekV3", "GptOss"])
def test_gated_outputs_of_further_families_have_the_norm_of_their_sum(name):
    """With a gate of its own, each single-expert sum is gate * norm: the module itself says what its experts do."""
    for module, rows, (logits, index, gates, norms) in observe(build(name)):
        assert logits.shape == (18, module.num_experts)
        one_slot = module.experts(rows.flatten(0, -2), index[:, :1], gates[:, :1])
        assert_close(one_slot.norm(dim=-1), gates[:, 0].abs() * norms[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated_ffn": False},
        {"router_type": "gmm"},
        {"router_type": "linear", "norm_topk_prob": True},
        {"attention_type": "softmax"},
        {"num_experts": [3, 6], "num_attn_experts": [1, 4], "num_experts_per_tok": [1, 3]},
    ],
    ids=["default", "plain", "gmm", "linear", "softmax", "per-layer"],
)
def test_native_models_by_hand(changes):
    model = build_native(**changes).eval()
    with torch.no_grad():
        outputs = model.model(IDS, output_router_logits=True)
    expected = {
        "attn": [outputs.attn_router_logits, outputs.attn_router_indices],
        "ffn": [outputs.router_logits, outputs.router_indices],
    }
    count = {"attn": 0, "ffn": 0}
    for module, rows, (logits, index, gates, norms) in observe(model):
        router_logits, router_indices = (part[count[module.side]] for part in expected[module.side])
        count[module.side] += 1
        assert torch.equal(logits, router_logits)
        assert torch.equal(index, router_indices)
        weights = logits.softmax(-1).gather(1, index)
        assert_close(gates, weights / weights.sum(-1, keepdim=True) if changes.get("norm_topk_prob") else weights)
        top_k = index.shape[1]
        for token in range(len(index)):
            for slot in range(top_k):
                expert = int(index[token, slot])
                if module.side == "attn":
                    output = module.experts.o_proj.weight[expert] @ rows[token * top_k + slot]
                else:
                    x, experts = rows[token], module.experts
                    up = getattr(experts, experts.up_name)[expert] @ x
                    output = experts.down_proj[expert] @ experts.activate(up)
                assert_close(norms[token, slot], output.norm(), rtol=1e-4, atol=1e-5)
    assert count["ffn"] == 2
    assert count["attn"] == (1 if "num_attn_experts" in changes else 2)


def test_observing_changes_no_output():
    model = build_native().eval()
    with torch.no_grad():
        before = model(IDS).logits
        with observing(find_routed_modules(model), lambda *_: None):
            during = model(IDS).logits
    assert torch.equal(before, during)


def test_hooks_go_when_the_model_fails():
    model = build_native()
    with pytest.raises(ValueError, match="no tokens"), observing(find_routed_modules(model), lambda *_: None):
        model(torch.zeros(1, 0, dtype=torch.long))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="'modmoe' has no routed experts"):
        find_routed_modules(build_native(num_experts=1, num_attn_experts=1))
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match="'llama' has no routed experts.*Mixtral"):
        find_routed_modules(llama)


def test_experts_without_a_router_are_refused():
    model = build("Mixtral")
    del model.model.layers[1].mlp.gate
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts has no router beside it"):
        find_routed_modules(model)


def test_two_stacks_are_refused():
    both = nn.ModuleDict({"encoder": build("Mixtral"), "decoder": build("Mixtral")})
    with pytest.raises(ValueError, match="several ffn routers count as layer 0"):
        find_routed_modules(both)
