"""What counts as a dense model, and which ones have no exact counterpart."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config

from modmoe import ModMoEConfig
from modmoe.models.dense import FAMILIES, NativeWeights, check_dense, config_from_dense, from_dense

from .conftest import build

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MixtralConfig(), r"this 'mixtral' model is not dense: it has experts already \(num_local_experts=8\)"),
        (ModMoEConfig(num_attn_experts=1), r"this 'modmoe' model is not dense.*num_experts=32"),
        (ModMoEConfig(num_experts=1), r"this 'modmoe' model is not dense.*num_attn_experts=16"),
        (MistralConfig(), r"sliding_window=4096 is shorter.*set max_position_embeddings to 4096"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), r"sliding_window=4096 is shorter"),
        (
            LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            r"rope_type='dynamic' has no counterpart in a modular block, only default, linear, yarn, llama3",
        ),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), r"scale_attn_by_inverse_layer_idx=True has no counterpart"),
        (GPT2Config(scale_attn_weights=False), r"scale_attn_weights=False has no counterpart"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_what_has_no_exact_counterpart_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config_from_dense(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "t5"}, r"model_type='t5' is not a dense model known here: llama, .*gpt2, modmoe are"),
        ({}, r"model_type=None is not a dense model"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, r"quantization_config"),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 256},
            r"'deepseek_v3' model is not dense.*n_routed_experts",
        ),
    ],
)
def test_other_models_are_refused_by_their_config_alone(fields, message):
    with pytest.raises(ValueError, match=message):
        check_dense(fields)


def test_a_window_that_no_text_fills_changes_nothing():
    assert config_from_dense(MistralConfig(max_position_embeddings=4096)).attention_type == "softmax"
    assert config_from_dense(Qwen2Config()).query_bias


def test_weights_and_config_must_cover_each_other():
    model = build(num_experts=1, num_attn_experts=1)
    weights = model.state_dict()
    last = weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match="the weights lack model.norm.weight"):
        NativeWeights("modmoe", model.config, weights)
    with pytest.raises(ValueError, match="model.layers.0.self_attn.sinks has no place"):
        NativeWeights(
            "modmoe", model.config, weights | {"model.norm.weight": last, "model.layers.0.self_attn.sinks": last}
        )


@pytest.mark.parametrize("alone", [False, True], ids=["causal", "base"])
def test_gpt2_names_of_old_checkpoints_are_known(alone):
    """The hub's GPT-2 was saved from the base model, with constants among the weights."""
    config = config_from_dense(GPT2Config(vocab_size=61, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    prefix = "" if alone else "transformer."
    names = {source for r in FAMILIES["gpt2"].recipes(config, prefix).values() for source in r.sources}
    saved = {name: torch.ones(1) for name in names | {f"{prefix}h.0.attn.bias", f"{prefix}h.0.attn.masked_bias"}}
    assert torch.equal(NativeWeights("gpt2", config, saved)["model.norm.bias"], torch.ones(1))


def test_a_dense_model_of_our_own_stays_what_it_is(ids):
    model = build(num_experts=1, num_attn_experts=1).eval()
    assert torch.equal(from_dense(model)(ids).logits, model(ids).logits)
