"""Dense Llama models as points of the modular configuration: one attention expert, one FFN expert, no router."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.modeling_modmoe import ModMoEForCausalLM

_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "attention_dropout",
    "rope_parameters",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)


def config_from_llama(config: LlamaConfig) -> ModMoEConfig:
    """
    The same dense model as a modular configuration.

    Raises:
        ValueError: if the Llama has projection biases, which modular blocks do not have.
    """
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name):
            raise ValueError(f"{name}=True has no counterpart in a modular block: only bias-free Llamas convert")
    return ModMoEConfig(
        **{name: copy.deepcopy(getattr(config, name)) for name in _SAME_FIELDS},
        num_attn_experts=1,
        num_experts=1,
        gated_ffn=True,
        attention_type="softmax",
        norm_type="rmsnorm",
        norm_eps=config.rms_norm_eps,
    )


def state_dict_from_llama(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's weights under native names; the expert dimension of size one is added, gate and up are stacked."""
    native = {}
    for key, value in state.items():
        prefix, _, name = key.rpartition("self_attn.")
        if name in ("q_proj.weight", "o_proj.weight"):
            native[f"{prefix}self_attn.experts.{name}"] = value[None]
        elif key.endswith("mlp.gate_proj.weight"):
            up = state[key.replace("gate_proj", "up_proj")]
            native[key.replace("gate_proj.weight", "experts.gate_up_proj")] = torch.cat([value, up])[None]
        elif key.endswith("mlp.down_proj.weight"):
            native[key.replace("down_proj.weight", "experts.down_proj")] = value[None]
        elif not key.endswith("mlp.up_proj.weight"):
            native[key] = value
    return native


def from_llama(model: LlamaForCausalLM) -> ModMoEForCausalLM:
    """A modular model with the weights and logits of a dense Llama."""
    converted = ModMoEForCausalLM(config_from_llama(model.config)).to(model.dtype)
    converted.load_state_dict(state_dict_from_llama(model.state_dict()))
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.eval()
