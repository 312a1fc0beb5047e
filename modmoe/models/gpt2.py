"""Dense GPT-2 models as points of the modular configuration: learned positions, biases, an FFN without a gate.

One attention expert, one FFN expert, no router. `modmoe.models.dense` is the entry point.
"""

import torch
from transformers import GPT2Config

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.recipes import Recipe, same

# Field -> the only value that has a counterpart.
_REQUIRED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def config_from_gpt2(config: GPT2Config) -> ModMoEConfig:
    """
    The same dense model as a modular configuration. Dropout of embeddings and residuals is left out: there is none.

    Raises:
        ValueError: for what modular blocks do not have.
    """
    for name, value in _REQUIRED.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)} has no counterpart in a modular block, only {value}")
    return ModMoEConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_attn_experts=1,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        num_experts=1,
        gated_ffn=False,
        hidden_act=config.activation_function,
        attention_type="softmax",
        attention_dropout=config.attn_pdrop,
        query_bias=True,
        key_value_bias=True,
        attention_output_bias=True,
        ffn_bias=True,
        position_embedding="learned",
        max_position_embeddings=config.n_positions,
        norm_type="layernorm",
        norm_eps=config.layer_norm_epsilon,
        initializer_range=config.initializer_range,
        use_cache=config.use_cache,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        dtype=config.dtype,
    )


def recipes_for_gpt2(config: ModMoEConfig, prefix: str) -> dict[str, Recipe]:
    """Native name -> how to make it of GPT-2's weights; `prefix` stands before those of the base model."""
    recipes = {
        "model.embed_tokens.weight": same(f"{prefix}wte.weight"),
        "model.embed_positions.weight": same(f"{prefix}wpe.weight"),
    }
    recipes |= {f"model.norm.{kind}": same(f"{prefix}ln_f.{kind}") for kind in ("weight", "bias")}
    if not config.tie_word_embeddings:
        recipes["lm_head.weight"] = same("lm_head.weight")
    for layer in range(config.num_hidden_layers):
        recipes |= {f"model.layers.{layer}.{k}": recipe for k, recipe in _block(f"{prefix}h.{layer}.").items()}
    return recipes


def _block(theirs: str) -> dict[str, Recipe]:
    recipes = {}
    for kind in ("weight", "bias"):
        recipes[f"input_layernorm.{kind}"] = same(f"{theirs}ln_1.{kind}")
        recipes[f"post_attention_layernorm.{kind}"] = same(f"{theirs}ln_2.{kind}")
    attention, ffn = f"{theirs}attn.", f"{theirs}mlp."
    return recipes | {
        "self_attn.experts.q_proj.weight": Recipe((f"{attention}c_attn.weight",), lambda w: _third(w, 0).T[None]),
        "self_attn.k_proj.weight": Recipe((f"{attention}c_attn.weight",), lambda w: _third(w, 1).T),
        "self_attn.v_proj.weight": Recipe((f"{attention}c_attn.weight",), lambda w: _third(w, 2).T),
        "self_attn.q_bias": Recipe((f"{attention}c_attn.bias",), lambda b: _third(b, 0)),
        "self_attn.k_proj.bias": Recipe((f"{attention}c_attn.bias",), lambda b: _third(b, 1)),
        "self_attn.v_proj.bias": Recipe((f"{attention}c_attn.bias",), lambda b: _third(b, 2)),
        "self_attn.experts.o_proj.weight": _transposed(f"{attention}c_proj.weight"),
        "self_attn.o_bias": same(f"{attention}c_proj.bias"),
        "mlp.experts.up_proj": _transposed(f"{ffn}c_fc.weight"),
        "mlp.experts.up_proj_bias": Recipe((f"{ffn}c_fc.bias",), lambda b: b[None]),
        "mlp.experts.down_proj": _transposed(f"{ffn}c_proj.weight"),
        "mlp.experts.down_proj_bias": Recipe((f"{ffn}c_proj.bias",), lambda b: b[None]),
    }


def _third(tensor: torch.Tensor, part: int) -> torch.Tensor:
    """Queries, keys or values out of `c_attn`, (H, 3H) or (3H,)."""
    return tensor.chunk(3, dim=-1)[part]


def _transposed(source: str) -> Recipe:
    """GPT-2 keeps its weights as (in, out)."""
    return Recipe((source,), lambda weight: weight.T[None])
