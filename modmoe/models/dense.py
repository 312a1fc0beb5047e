"""Dense language models of transformers in the modular skeleton, with the same logits.

A dense layer is one expert without a router (softmax attention and RoPE or learned positions), so nothing is lost.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.gpt2 import config_from_gpt2, recipes_for_gpt2
from modmoe.models.llama import config_from_llama, recipes_for_llama
from modmoe.models.modeling_modmoe import ModMoEForCausalLM
from modmoe.models.recipes import Recipe, same


class Family(NamedTuple):
    """How one kind of dense model becomes native."""

    config: Callable[[Any], ModMoEConfig]
    recipes: Callable[[ModMoEConfig, str], dict[str, Recipe]]
    prefix: str
    """Before the names of the base model's weights, unless the base model was saved alone."""


def _native(config: ModMoEConfig) -> ModMoEConfig:
    return config


def _native_recipes(config: ModMoEConfig, prefix: str) -> dict[str, Recipe]:
    tied = set(ModMoEForCausalLM._tied_weights_keys) if config.tie_word_embeddings else set()
    with torch.device("meta"):
        return {name: same(name) for name in ModMoEForCausalLM(config).state_dict() if name not in tied}


_LLAMA = Family(config_from_llama, recipes_for_llama, "model.")
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Family(config_from_gpt2, recipes_for_gpt2, "transformer."),
    "modmoe": Family(_native, _native_recipes, "model."),
}
# Constants that older versions of transformers saved with the weights.
_CONSTANTS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")
# Fields by which mixtures of experts give their number.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_attn_experts")


def check_dense(fields: Mapping[str, Any]) -> None:
    """
    Args:
        fields: of config.json.

    Raises:
        ValueError: for another kind of model, or a quantised one.
    """
    model_type = fields.get("model_type")
    for name in _EXPERT_COUNTS:
        count = fields.get(name)
        if count is not None and max(count if isinstance(count, list) else [count]) > 1:
            raise ValueError(f"this {model_type!r} model is not dense: it has experts already ({name}={count})")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not a dense model known here: {', '.join(FAMILIES)} are")
    if fields.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights cannot be taken apart; save the model without")


def config_from_dense(config: PreTrainedConfig) -> ModMoEConfig:
    """
    The same dense model as a modular configuration.

    Raises:
        ValueError: as `check_dense`, or for what modular blocks do not have; says what to do.
    """
    check_dense(config.to_dict())
    return FAMILIES[config.model_type].config(copy.deepcopy(config))


class NativeWeights(Mapping[str, torch.Tensor]):
    """
    The weights of a dense model under native names, each made when it is asked for, and not kept.

    Args:
        model_type: one of `FAMILIES`.
        config: native, from `config_from_dense`.
        weights: of the dense model, under its own names.

    Raises:
        ValueError: if the weights and the config do not cover each other; names a tensor.
    """

    def __init__(self, model_type: str, config: ModMoEConfig, weights: Mapping[str, torch.Tensor]) -> None:
        family = FAMILIES[model_type]
        prefix = family.prefix if any(name.startswith(family.prefix) for name in weights) else ""
        self._weights = weights
        self._recipes = family.recipes(config, prefix)
        _check_coverage(self._recipes.values(), weights, config.tie_word_embeddings)

    def __getitem__(self, name: str) -> torch.Tensor:
        recipe = self._recipes[name]
        return recipe.make(*(self._weights[source] for source in recipe.sources))

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def sources(self, name: str) -> tuple[str, ...]:
        """The dense model's own names of what a native tensor is made of."""
        return self._recipes[name].sources


def _check_coverage(recipes: Iterable[Recipe], names: Iterable[str], tied: bool) -> None:
    wanted = {source for recipe in recipes for source in recipe.sources}
    found = {name for name in names if not _CONSTANTS.search(name)}
    if tied:
        found.discard("lm_head.weight")
    if wanted - found:
        raise ValueError(f"the weights lack {min(wanted - found)}, which the config asks for: are files missing?")
    if found - wanted:
        raise ValueError(f"{min(found - wanted)} has no place in the model that the config describes")


def from_dense(model: PreTrainedModel) -> ModMoEForCausalLM:
    """
    A modular model with the weights and logits of a dense causal language model.

    Raises:
        ValueError: as `config_from_dense`.
    """
    config = config_from_dense(model.config)
    converted = ModMoEForCausalLM(config).to(model.dtype)
    weights = dict(NativeWeights(model.config.model_type, config, model.state_dict()))
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    converted.load_state_dict(weights)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.eval()
