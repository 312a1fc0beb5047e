"""Dense Llama, Mistral, Qwen2 and Qwen3 models as points of the modular configuration.

One attention expert, one FFN expert, no router. `modmoe.models.dense` is the entry point.
"""

from typing import Any

from transformers import PreTrainedConfig

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.recipes import Recipe, same, stacked

_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
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
# RoPE whose frequencies do not depend on the length of the text, so that a cache continues them.
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def config_from_llama(config: PreTrainedConfig) -> ModMoEConfig:
    """
    The same dense model as a modular configuration.

    Raises:
        ValueError: for what modular blocks do not have: a sliding window, or another type of RoPE.
    """
    check_window(config)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"rope_type={rope_type!r} has no counterpart in a modular block, only {', '.join(_ROPE_TYPES)}: to "
            "give up longer texts, set rope_type to 'default' in a copy of config.json"
        )
    everywhere = getattr(config, "attention_bias", False)
    return ModMoEConfig(
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        head_dim=getattr(config, "head_dim", None),
        num_attn_experts=1,
        num_experts=1,
        gated_ffn=True,
        attention_type="softmax",
        query_bias=everywhere or config.model_type == "qwen2",
        key_value_bias=everywhere or config.model_type == "qwen2",
        attention_output_bias=everywhere,
        ffn_bias=getattr(config, "mlp_bias", False),
        qk_norm=config.model_type == "qwen3",
        norm_type="rmsnorm",
        norm_eps=config.rms_norm_eps,
    )


def check_window(config: Any) -> None:
    """
    A window that no text of the model's own length fills changes nothing.

    Raises:
        ValueError: for a shorter one.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and "sliding_attention" in kinds and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window={window} is shorter than max_position_embeddings={config.max_position_embeddings}, and "
            f"modular blocks have no window: texts of up to {window} tokens are the same without, so set "
            f"max_position_embeddings to {window} in a copy of config.json"
        )


def recipes_for_llama(config: ModMoEConfig, prefix: str) -> dict[str, Recipe]:
    """Native name -> how to make it of Llama's weights; `prefix` stands before those of the base model."""
    recipes = {f"model.{name}": same(prefix + name) for name in ("embed_tokens.weight", "norm.weight")}
    if not config.tie_word_embeddings:
        recipes["lm_head.weight"] = same("lm_head.weight")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"{prefix}layers.{layer}."
        recipes |= {ours + name: recipe for name, recipe in _block(config, theirs).items()}
    return recipes


def _block(config: ModMoEConfig, theirs: str) -> dict[str, Recipe]:
    attention, ffn = theirs + "self_attn.", theirs + "mlp."
    recipes = {
        f"{name}.weight": same(f"{theirs}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
    }
    for name in ("k_proj", "v_proj"):
        recipes[f"self_attn.{name}.weight"] = same(f"{attention}{name}.weight")
        if config.key_value_bias:
            recipes[f"self_attn.{name}.bias"] = same(f"{attention}{name}.bias")
    for letter, biased in (("q", config.query_bias), ("o", config.attention_output_bias)):
        recipes[f"self_attn.experts.{letter}_proj.weight"] = stacked(f"{attention}{letter}_proj.weight")
        if biased:
            recipes[f"self_attn.{letter}_bias"] = same(f"{attention}{letter}_proj.bias")
    if config.qk_norm:
        recipes |= {f"self_attn.{name}.weight": same(f"{attention}{name}.weight") for name in ("q_norm", "k_norm")}
    for kind, suffix in (("weight", ""), ("bias", "_bias")) if config.ffn_bias else (("weight", ""),):
        recipes[f"mlp.experts.gate_up_proj{suffix}"] = stacked(f"{ffn}gate_proj.{kind}", f"{ffn}up_proj.{kind}")
        recipes[f"mlp.experts.down_proj{suffix}"] = stacked(f"{ffn}down_proj.{kind}")
    return recipes
