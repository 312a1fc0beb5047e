"""Configuration of the native model type `modmoe`."""

import dataclasses
import difflib
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from modmoe.models.extension import Extension

# Keywords that `PreTrainedConfig` understands without declaring them as fields.
_INHERITED_KEYWORDS = {
    "auto_map",
    "quantization_config",
    "tokenizer_class",
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "rope_theta",
    "rope_scaling",
}

_POSITIVE = (1, 2**31)
_FACTOR = (0.0, 1e6)
# Field -> smallest and largest value.
_RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": _POSITIVE,
    "hidden_size": _POSITIVE,
    "num_hidden_layers": _POSITIVE,
    "num_attention_heads": _POSITIVE,
    "intermediate_size": _POSITIVE,
    "router_hidden_size": _POSITIVE,
    "max_position_embeddings": _POSITIVE,
    "num_shared_experts": (0, 2**31),
    "sample_topk": (0, 2**31),
    "attention_dropout": (0.0, 1.0),
    "norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "selection_bias_update_rate": _FACTOR,
    "router_aux_loss_coef": _FACTOR,
    "router_z_loss_weight": _FACTOR,
}


@strict
class ModMoEConfig(PreTrainedConfig):
    r"""
    A modular language model: attention heads and feed-forward networks are pools of experts.

    One expert without a router is a dense layer, on either side, so a dense Llama, a MoLM and a vision encoder
    are all points of this one configuration. Source: ModuleFormer, arXiv:2306.04640, unless stated otherwise.

    Args:
        vocab_size: number of tokens of the vocabulary.
        hidden_size: width of the residual stream (H).
        num_hidden_layers: number of blocks (L).
        num_attention_heads: query heads of *one* attention expert; a token reads `num_attn_experts_per_tok` times
            as many.
        num_key_value_heads: key/value heads shared by all attention experts of a layer; must divide
            `num_attention_heads`; defaults to it.
        head_dim: width of a head (D); defaults to `hidden_size // num_attention_heads`.
        num_attn_experts: attention experts of a layer, or a list with one count per layer. 1 is dense attention.
        num_attn_experts_per_tok: attention experts that a token uses (top-k), or a list per layer.
        intermediate_size: inner width of *one* FFN expert (I).
        num_experts: FFN experts of a layer, or a list with one count per layer. 1 is a dense FFN.
        num_experts_per_tok: FFN experts that a token uses (top-k), or a list per layer.
        num_pruned_attn_experts: attention experts that are gone but whose rows stay in the router, where they count in
            the softmax and are never chosen; or a list per layer.
        num_pruned_experts: the same for FFN experts.
        num_shared_experts: FFN experts every token passes through, without a router.
        extensions: experts added to the trained model, in the order in which they are applied; a dictionary with the
            fields of `Extension` for each.
        gated_ffn: `act(gate) * up` (SwiGLU and its kin) if true, else a plain two-layer FFN (MoLM).
        hidden_act: activation of the FFN, a name of `transformers.activations.ACT2FN`.
        attention_type: "stickbreaking" (arXiv:2410.17980; no position embedding) or "softmax" with RoPE.
        attend_current: whether stick-breaking attention includes the query's own position.
        is_causal: causal, or bidirectional (softmax only).
        attention_dropout: dropout on attention weights (softmax only).
        query_bias: whether queries have a bias, shared by the attention experts of a layer.
        key_value_bias: whether the key and value projections have a bias.
        attention_output_bias: whether attention's output has a bias, shared by the experts of a layer, without gate.
        ffn_bias: whether both projections of every FFN expert have a bias.
        qk_norm: whether queries and keys go through an RMSNorm over the width of a head, as in Qwen3.
        position_embedding: "rope", or "learned" vectors added to the embedding, as in GPT-2 (softmax only).
        rope_parameters: RoPE settings of transformers (softmax with "rope" only).
        max_position_embeddings: longest sequence seen in training. A hint for tools; limits nothing here, except with
            learned positions, of which there are as many.
        norm_type: "rmsnorm" or "layernorm".
        norm_eps: epsilon of every norm.
        router_type: "mlp" (ModuleFormer's default), "linear" or "gmm" (cosine times a learned temperature).
        router_hidden_size: inner width of "mlp" and "gmm" routers; unused by "linear".
        norm_topk_prob: whether the gates of the chosen experts are rescaled to sum to one. ModuleFormer does not.
        unit_gates: whether chosen experts count in full: every gate is 1, with the gradient of its log probability. So
            the parts of a dense layer add up to it (arXiv:2310.10908).
        sample_topk: in training, how many of the top-k are drawn at random instead of taken from the best.
        route_padding: whether tokens with `attention_mask == 0` are routed and counted, as in IBM's code.
        use_selection_bias: aux-loss-free balancing (arXiv:2408.15664): a bias per expert on the choice, not the gate.
        selection_bias_update_rate: step of that bias per optimizer step.
        router_aux_loss_type: "mi" (mutual information), "concentration", "switch" or "none".
        router_aux_loss_coef: factor on the auxiliary loss in the training loss.
        router_aux_loss_reduction: "mean" over routers, or "sum" as in IBM's code.
        router_z_loss_weight: factor on the z-loss inside the auxiliary loss.
        aux_scope: tokens over which expert shares are taken: "micro_step" (one forward, all data-parallel ranks) or
            "global_batch" (the whole optimizer step; needs `router_statistics` from a first pass).
        initializer_range: standard deviation of the normal initialisation.
        use_cache: whether to return a key/value cache.
        output_router_logits: whether outputs carry the router logits.
        tie_word_embeddings: whether the output layer shares the embedding's weight.

    Raises:
        ValueError: for unknown fields and for contradictory values; names the field, the value and what is allowed.

    Example:
        >>> from modmoe import ModMoEConfig, ModMoEForCausalLM
        >>> model = ModMoEForCausalLM(ModMoEConfig(hidden_size=256, num_hidden_layers=4))
    """

    model_type = "modmoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "aux_loss",
        "aux_losses",
        "cross_entropy",
        "tokens_per_expert",
        "attn_tokens_per_expert",
        "extension_tokens_per_expert",
        "extension_users",
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "num_experts",
        "rms_norm_eps": "norm_eps",
        "layer_norm_eps": "norm_eps",
    }
    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_attn_experts: int | list[int] = 16
    num_attn_experts_per_tok: int | list[int] = 2
    intermediate_size: int = 2048
    num_experts: int | list[int] = 32
    num_experts_per_tok: int | list[int] = 2
    num_pruned_attn_experts: int | list[int] = 0
    num_pruned_experts: int | list[int] = 0
    num_shared_experts: int = 0
    extensions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    gated_ffn: bool = True
    hidden_act: str = "silu"
    attention_type: Literal["stickbreaking", "softmax"] = "stickbreaking"
    attend_current: bool = True
    is_causal: bool = True
    attention_dropout: float | int = 0.0
    query_bias: bool = False
    key_value_bias: bool = False
    attention_output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    position_embedding: Literal["rope", "learned"] = "rope"
    rope_parameters: RopeParameters | dict | None = None
    max_position_embeddings: int = 4096
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float | int = 1e-5
    router_type: Literal["mlp", "linear", "gmm"] = "mlp"
    router_hidden_size: int = 256
    norm_topk_prob: bool = False
    unit_gates: bool = False
    sample_topk: int = 0
    route_padding: bool = False
    use_selection_bias: bool = False
    selection_bias_update_rate: float | int = 1e-3
    router_aux_loss_type: Literal["mi", "concentration", "switch", "none"] = "mi"
    router_aux_loss_coef: float | int = 0.01
    router_aux_loss_reduction: Literal["mean", "sum"] = "mean"
    router_z_loss_weight: float | int = 0.0
    aux_scope: Literal["micro_step", "global_batch"] = "micro_step"
    initializer_range: float | int = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._reject_unknown(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}: change one of them or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @classmethod
    def _reject_unknown(cls, kwargs: dict[str, Any]) -> None:
        fields = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
        allowed = fields | _INHERITED_KEYWORDS
        declared = kwargs.get("model_type", cls.model_type)
        if declared != cls.model_type:
            raise ValueError(
                f"model_type={declared!r} is not {cls.model_type!r}: this is another kind of model's config"
            )
        for name, value in kwargs.items():
            if name in allowed or name.startswith("_"):
                continue
            near = difflib.get_close_matches(name, sorted(fields), n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known fields: {', '.join(sorted(fields))}"
            raise ValueError(f"unknown field {name}={value!r} in {cls.__name__}; {hint}")

    @property
    def output_attentions(self) -> bool | None:
        """Whether models return attention weights."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool | None) -> None:
        # The base class wants attn_implementation="eager" for it; stick-breaking attention returns weights as it is.
        if self.attention_type == "stickbreaking":
            self._output_attentions = value
        else:
            PreTrainedConfig.output_attentions.fset(self, value)

    def validate_output_attentions(self) -> None:
        """Part of `@strict`; see `output_attentions`."""
        if self.attention_type != "stickbreaking":
            super().validate_output_attentions()

    def validate_architecture(self) -> None:
        """Checks of one field against another; run by `@strict` after construction."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} must be between {low} and {high}")
        for name in ("norm_eps", "initializer_range", "head_dim", "num_key_value_heads"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is outside the vocabulary 0..{self.vocab_size - 1}")
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not an activation of transformers: {', '.join(sorted(ACT2FN))}"
            )
        for side in ("attn_experts", "experts"):
            self._validate_experts(f"num_{side}", f"num_{side}_per_tok", f"num_pruned_{side}")
        self._validate_extensions()
        if self.attention_type == "stickbreaking" and not self.is_causal:
            raise ValueError(
                "is_causal=False contradicts attention_type='stickbreaking', which is causal by definition: "
                "use attention_type='softmax' for a bidirectional model"
            )
        if self.attention_type == "stickbreaking" and self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} needs attention_type='softmax'; "
                "stick-breaking attention has no dropout"
            )
        if self.unit_gates and self.norm_topk_prob:
            raise ValueError("unit_gates=True contradicts norm_topk_prob=True: gates are all 1, or sum to 1")
        if self.position_embedding == "learned" and self.attention_type != "softmax":
            raise ValueError(
                "position_embedding='learned' needs attention_type='softmax'; stick-breaking attention knows positions"
            )
        if self.attention_type == "softmax" and self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for attention_type='softmax' (RoPE)")

    def _validate_experts(self, count_name: str, top_k_name: str, pruned_name: str) -> None:
        for name in (count_name, top_k_name, pruned_name):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                raise ValueError(
                    f"{name}={value} has {len(value)} entries; a list needs one per layer, "
                    f"num_hidden_layers={self.num_hidden_layers}"
                )
        for layer in range(self.num_hidden_layers):
            count, top_k = self._at(count_name, layer), self._at(top_k_name, layer)
            if count < 1:
                raise ValueError(f"{count_name}={count} in layer {layer} must be at least 1 (1 is a dense layer)")
            if self._at(pruned_name, layer) < 0:
                raise ValueError(f"{pruned_name}={self._at(pruned_name, layer)} in layer {layer} must be at least 0")
            if count > 1 and not 1 <= top_k <= count:
                raise ValueError(f"{top_k_name}={top_k} in layer {layer} must be between 1 and {count_name}={count}")
            routed = count + self._at(pruned_name, layer) > 1
            if routed and not 0 <= self.sample_topk <= min(top_k, count):
                raise ValueError(
                    f"sample_topk={self.sample_topk} must be between 0 and {top_k_name}={top_k}, with {count_name}="
                    f"{count} (layer {layer})"
                )

    def _validate_extensions(self) -> None:
        extensions = self.extension_list()
        names = [extension.name for extension in extensions]
        taken = next((name for name in names if names.count(name) > 1), None)
        if taken is not None:
            raise ValueError(f"two extensions have the name {taken!r}: give each a name of its own")
        layers = range(self.num_hidden_layers)
        if extensions and not any(self.router_rows_at(i) or self.attn_router_rows_at(i) for i in layers):
            raise ValueError(
                f"extension {names[0]!r} needs a model with experts, and num_experts=1, num_attn_experts=1 is a dense "
                "one: upcycle it first"
            )
        for extension in extensions:
            if extension.mode == "common":
                self._validate_common(extension)

    def _validate_common(self, extension: Extension) -> None:
        """Common rows need a router in every layer, and one without a selection bias."""
        where = f"extension {extension.name!r} with mode='common'"
        if self.use_selection_bias:
            raise ValueError(f"{where} cannot join routers with use_selection_bias=True: use mode='group'")
        sides = ((extension.num_experts, self.router_rows_at), (extension.num_attn_experts, self.attn_router_rows_at))
        for added, rows_at in sides:
            dense = [layer for layer in range(self.num_hidden_layers) if not rows_at(layer)]
            if added and dense:
                raise ValueError(f"{where} needs a router to join, and layer {dense[0]} is dense: use mode='group'")

    def extension_list(self) -> list[Extension]:
        """The extensions with their fields checked, in the order in which they are applied."""
        return [Extension.of(fields) for fields in self.extensions]

    def _at(self, name: str, layer: int) -> int:
        value = getattr(self, name)
        return value[layer] if isinstance(value, list) else value

    def attn_experts_at(self, layer: int) -> tuple[int, int]:
        """Attention experts of a layer and its top-k; (1, 1) for a single one."""
        count = self._at("num_attn_experts", layer)
        return count, 1 if count == 1 else self._at("num_attn_experts_per_tok", layer)

    def experts_at(self, layer: int) -> tuple[int, int]:
        """FFN experts of a layer and its top-k; (1, 1) for a single one."""
        count = self._at("num_experts", layer)
        return count, 1 if count == 1 else self._at("num_experts_per_tok", layer)

    def attn_router_rows_at(self, layer: int) -> int:
        """Rows of a layer's attention router: its experts and the pruned ones; 0 for a dense layer, which has none."""
        rows = self._at("num_attn_experts", layer) + self._at("num_pruned_attn_experts", layer)
        return 0 if rows == 1 else rows

    def router_rows_at(self, layer: int) -> int:
        """Rows of a layer's FFN router, as `attn_router_rows_at`."""
        rows = self._at("num_experts", layer) + self._at("num_pruned_experts", layer)
        return 0 if rows == 1 else rows


__all__ = ["ModMoEConfig"]
