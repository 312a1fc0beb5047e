"""`experts_implementation="modmoe"` on the experts of transformers: the numbers of their own eager loops."""

import importlib

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import modmoe  # noqa: F401  (registers the implementation)

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
# Name of the model -> what its config needs besides.
MODELS = {
    "Mixtral": {"num_local_experts": 5},
    "Olmoe": {"num_experts": 5},
    "Qwen2Moe": {"num_experts": 5, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 12},
    "GraniteMoe": {"num_local_experts": 5},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    },
    # Transposed weights, biases, gate and up alternating, an activation of its own.
    "GptOss": {"num_local_experts": 5, "layer_types": ["sliding_attention", "full_attention"]},
}


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Every parameter, biases and norms included: a term that is zero at the start would hide its absence."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def build(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**(TINY | MODELS[name]), experts_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomize(model)
    return model


def logits_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    model.zero_grad()
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, **gradients}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        scale = theirs[name].abs().max().clamp(min=1e-6)
        assert_close(ours[name] / scale, theirs[name] / scale, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, tmp_path, monkeypatch):
    model = build(name)
    theirs = logits_and_gradients(model)
    assert any("experts" in key for key in theirs)
    calls = count_calls(monkeypatch)
    model.set_experts_implementation("modmoe")
    assert_same(logits_and_gradients(model), theirs)
    assert calls, "the implementation was never used"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="modmoe")
    calls.clear()
    assert_close(loaded(torch.arange(1, 9)[None]).logits, model(torch.arange(1, 9)[None]).logits)
    assert calls


def count_calls(monkeypatch) -> list[str]:
    from modmoe.layers import grouped_experts

    calls, plan = [], grouped_experts.dispatch_plan
    monkeypatch.setattr(grouped_experts, "dispatch_plan", lambda *args: calls.append("plan") or plan(*args))
    return calls


# What no small causal LM has: module -> class, fields of its config.
CLASSES = {
    "muse_spark": (  # a norm behind every expert
        "MuseSparkExperts",
        {"num_local_experts": 5, "moe_hidden_size": 16, "moe_intermediate_size": 12, "hidden_act": "silu"},
    ),
    "nemotron_h": (  # no gate
        "NemotronHExperts",
        {
            "n_routed_experts": 5,
            "hidden_size": 16,
            "moe_intermediate_size": 12,
            "moe_latent_size": None,
            "mlp_hidden_act": "relu2",
        },
    ),
    "aria": (  # transposed
        "AriaExperts",
        {"moe_num_experts": 5, "hidden_size": 16, "intermediate_size": 12},
    ),
    "openai_privacy_filter": (  # transposed, biases, gate and up in halves
        "OpenAIPrivacyFilterExperts",
        {
            "num_local_experts": 5,
            "hidden_size": 16,
            "intermediate_size": 12,
            "swiglu_alpha": 1.7,
            "swiglu_limit": 7.0,
        },
    ),
}


def experts_of(module: str) -> nn.Module:
    name, fields = CLASSES[module]
    config = transformers.PreTrainedConfig(experts_implementation="eager")
    for field, value in (fields | {"post_norm_eps": 1e-5}).items():
        setattr(config, field, value)
    cls = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    experts = cls(config)
    randomize(experts)
    return experts


# Only some of their own loops know the id for a slot without an expert.
@pytest.mark.parametrize(
    ("module", "absent"), [*((name, False) for name in CLASSES), ("muse_spark", True), ("aria", True)]
)
def test_every_layout_of_experts(module, absent):
    experts = experts_of(module)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 16, generator=generator, requires_grad=True)
    index = torch.rand(7, 5, generator=generator).topk(2).indices
    gates = torch.rand(7, 2, generator=generator)
    if absent:
        index[2], gates[2] = 5, 0
        index[4, 1], gates[4, 1] = 5, 0
    gates.requires_grad_()
    results = []
    for implementation in ("eager", "modmoe"):
        experts.config._experts_implementation = implementation
        out = experts(x, index, gates)
        leaves = {"x": x, "gates": gates, **dict(experts.named_parameters())}
        gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        results.append({"out": out, **dict(zip(leaves, gradients, strict=True))})
    assert_same(results[1], results[0])
    if absent:
        assert not results[1]["out"][2].any()


def test_experts_of_this_package_know_the_id_for_none():
    from modmoe.layers.experts import GatedExperts, PlainExperts

    fields = {"hidden_act": "gelu_new", "hidden_size": 16, "ffn_bias": False}
    config = transformers.PreTrainedConfig(experts_implementation="eager", **fields)
    index, gates = torch.tensor([[0, 2], [3, 3], [1, 3]]), torch.tensor([[0.4, 0.1], [0.0, 0.0], [0.7, 0.0]])
    for cls in (GatedExperts, PlainExperts):
        experts = cls(config, 3, 12)
        randomize(experts)
        results = []
        for implementation in ("eager", "modmoe"):
            config._experts_implementation = implementation
            x = torch.ones(3, 16, requires_grad=True)
            out = experts(x, index, gates)
            leaves = [x, *experts.parameters()]
            results.append(
                dict(zip(["out", "x", "up", "down"], [out, *torch.autograd.grad(out.sum(), leaves)], strict=True))
            )
        assert_same(results[1], results[0])
        assert not results[1]["out"][1].any()


def test_compiles_as_one_graph():
    experts = experts_of("muse_spark")
    experts.config._experts_implementation = "modmoe"
    x, index, gates = torch.randn(4, 16), torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2]]), torch.rand(4, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, index, gates), experts(x, index, gates))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_result_has_the_dtype_of_the_hidden_states(dtype):
    experts = experts_of("aria").to(dtype)
    experts.config._experts_implementation = "modmoe"
    out = experts(torch.randn(3, 16, dtype=dtype), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
    assert out.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        out = experts.float()(torch.randn(3, 16), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
    assert out.dtype == torch.float32
