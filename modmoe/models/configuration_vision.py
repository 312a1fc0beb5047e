"""Configuration of the image model type `modmoe_vision`."""

import dataclasses
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from modmoe.models.configuration_modmoe import ModMoEConfig

# Fields of language models, which an image model has no use for.
_OF_TEXT = (
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attend_current",
    "use_cache",
)
# Field -> the only value with which a patch sees all others and knows where it is.
_REQUIRED = {"attention_type": "softmax", "is_causal": False, "position_embedding": "learned"}


@strict
class ModMoEVisionConfig(ModMoEConfig):
    r"""
    A modular image model: a Vision Transformer whose feed-forward networks, and attention heads if wanted, are pools
    of experts (V-MoE, arXiv:2106.05974).

    The blocks are those of `ModMoEConfig`, bidirectional, and all its fields for blocks and routers apply. Defaults
    are V-MoE-B/16's: dense attention, plain FFN experts with biases, top-2 of a linear router. The paper has experts
    in every second block only; that is a list, `num_experts=[1, 8] * 6`. Fields of text must keep their defaults.

    Args:
        image_size: height and width of images in pixels.
        patch_size: height and width of a patch; must divide `image_size`.
        num_channels: of images.
        max_position_embeddings: follows from the sizes, one for the class token and one for each patch; leave it out.

    Raises:
        ValueError: as `ModMoEConfig`, and for sizes that do not fit each other.

    Example:
        >>> from modmoe import ModMoEForImageClassification, ModMoEVisionConfig
        >>> model = ModMoEForImageClassification(ModMoEVisionConfig(num_labels=10, num_experts=[1, 8] * 6))
    """

    model_type = "modmoe_vision"
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    max_position_embeddings: int | None = None  # type: ignore[assignment]
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_attn_experts: int | list[int] = 1
    num_attn_experts_per_tok: int | list[int] = 1
    intermediate_size: int = 3072
    num_experts: int | list[int] = 8
    gated_ffn: bool = False
    hidden_act: str = "gelu"
    attention_type: Literal["stickbreaking", "softmax"] = "softmax"
    is_causal: bool = False
    query_bias: bool = True
    key_value_bias: bool = True
    attention_output_bias: bool = True
    ffn_bias: bool = True
    position_embedding: Literal["rope", "learned"] = "learned"
    norm_type: Literal["rmsnorm", "layernorm"] = "layernorm"
    norm_eps: float | int = 1e-6
    router_type: Literal["mlp", "linear", "gmm"] = "linear"
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("image_size", "patch_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: change one of them"
            )
        positions = 1 + (self.image_size // self.patch_size) ** 2
        if self.max_position_embeddings not in (None, positions):
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} must be {positions}, the class token and "
                f"patches of image_size={self.image_size} and patch_size={self.patch_size}: leave it out"
            )
        self.max_position_embeddings = positions
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Checks of one field against another; run by `@strict` after construction."""
        for name, value in _REQUIRED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no place in an image model, whose patches see each other and "
                    f"have learned positions: leave it at {value!r}"
                )
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _OF_TEXT:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} is a field of language models: leave it out")
        super().validate_architecture()


__all__ = ["ModMoEVisionConfig"]
