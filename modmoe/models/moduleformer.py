"""IBM ModuleFormer checkpoints (`model_type: moduleformer`, the MoLM models): they load as native models.

Format and formulas: IBM/ModuleFormer, `moduleformer/`. Expert weights there are (E, in, out); the model saved
after loading is a native directory.
"""

import dataclasses
import re
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter
from transformers.utils import logging

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.modeling_modmoe import (
    ModMoEForCausalLM,
    ModMoEForSequenceClassification,
    ModMoEModel,
    ModMoEPreTrainedModel,
)

logger = logging.get_logger(__name__)


class ModuleFormerConfig(PreTrainedConfig):
    """IBM's configuration, field by field; `to_native()` says what each one means. Unknown fields are ignored."""

    model_type = "moduleformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50295
    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 8
    att_hidden: int = 512
    ffd_hidden: int = 2048
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    moe_pdrop: float = 0.0
    sample_topk: int = 0
    gating_size: int = 256
    n_att_experts: int = 32
    k_att: int = 2
    n_mlp_experts: int = 32
    k_mlp: int = 2
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    aux_loss_type: str = "mi"
    aux_loss_weight: float = 0.0
    gate_type: str = "mlp"
    block_size: int = 512
    history_length: int = 512

    def to_native(self, **overrides: Any) -> ModMoEConfig:
        """The same model as a native configuration; `overrides` are native fields."""
        if self.att_hidden % self.n_head:
            raise ValueError(f"att_hidden={self.att_hidden} is not a multiple of n_head={self.n_head}")
        dropout = [n for n in ("resid_pdrop", "embd_pdrop", "moe_pdrop") if getattr(self, n)]
        if dropout:
            logger.warning(f"dropout of the ModuleFormer config is not supported and ignored: {', '.join(dropout)}")
        mutual_information = self.aux_loss_type == "mi"
        fields = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.n_embd,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "head_dim": self.att_hidden // self.n_head,
            "num_attn_experts": self.n_att_experts,
            "num_attn_experts_per_tok": self.k_att,
            "intermediate_size": self.ffd_hidden,
            "num_experts": self.n_mlp_experts,
            "num_experts_per_tok": self.k_mlp,
            "gated_ffn": False,
            "hidden_act": self.activation_function,
            "key_value_bias": True,
            "norm_type": "layernorm",
            "norm_eps": self.layer_norm_epsilon,
            "router_type": self.gate_type,
            "router_hidden_size": self.gating_size,
            "sample_topk": self.sample_topk,
            "router_aux_loss_type": "mi" if mutual_information else "switch",
            "router_aux_loss_coef": self.aux_loss_weight,
            "router_aux_loss_reduction": "sum",
            "router_z_loss_weight": 0.0 if mutual_information else 0.1,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.block_size + self.history_length,
            "use_cache": self.use_cache,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "dtype": self.dtype,
            "id2label": self.id2label,
            "label2id": self.label2id,
            "problem_type": self.problem_type,
            "output_hidden_states": self.output_hidden_states,
            "output_attentions": self.output_attentions,
            "return_dict": self.return_dict,
            "attn_implementation": self._attn_implementation,
            "experts_implementation": self._experts_implementation,
        }
        return ModMoEConfig(**(fields | overrides))

    def renamings(self) -> dict[str, str]:
        """Regular expression of IBM's keys -> native keys; the transposed expert weights are in `CONVERTERS`."""
        router = {
            "linear": {r"gate\.w_gate\.0\.weight": "gate.weight"},
            "mlp": {
                r"gate\.w_gate\.0\.": "gate.in_proj.",
                r"gate\.w_gate\.3\.weight": "gate.weight",
            },
            "gmm": {
                r"gate\.w_gate\.weight": "gate.in_proj.weight",
                r"gate\.expert_centroids": "gate.weight",
                r"gate\.temperature": "gate.log_temperature",
            },
        }[self.gate_type]
        return {
            r"transformer\.wte\.": "model.embed_tokens.",
            r"transformer\.ln_f\.": "model.norm.",
            r"transformer\.h\.": "model.layers.",
            r"\.ln_1\.": ".input_layernorm.",
            r"\.ln_2\.": ".post_attention_layernorm.",
            r"\.attn\.q_proj\.gate\.": ".self_attn.gate.",
            r"\.attn\.([kv])_proj\.": r".self_attn.\1_proj.",
            r"\.mlpf\.gate\.": ".mlp.gate.",
            **router,
        }


CONVERTERS = [
    WeightConverter(old, new, [Transpose(1, 2)])
    for old, new in (
        ("attn.q_proj.experts.weight", "self_attn.experts.q_proj.weight"),
        ("attn.q_proj.output_experts.weight", "self_attn.experts.o_proj.weight"),
        ("mlpf.experts.weight", "mlp.experts.up_proj"),
        ("mlpf.output_experts.weight", "mlp.experts.down_proj"),
    )
]


class _FromModuleFormer(ModMoEPreTrainedModel):
    """Loads IBM's format, then becomes the native class of the same head."""

    # Buffers that IBM's forward never reads.
    _keys_to_ignore_on_load_unexpected = [r"attn\.(mask|cum_weight)$"]
    _native: ClassVar[type[ModMoEPreTrainedModel]]

    def __init__(self, config: ModMoEConfig | ModuleFormerConfig) -> None:
        if isinstance(config, ModuleFormerConfig):  # from_config, without weights
            config = config.to_native()
            self._weight_conversions: list = []
        super().__init__(config)
        if _identity_projections(config):
            self._keys_to_ignore_on_load_missing = [_PROJECTION]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As `ModMoEPreTrainedModel.from_pretrained`; native config fields may be given as keywords."""
        if not isinstance(config, ModuleFormerConfig):
            config = ModuleFormerConfig.from_pretrained(config or pretrained_model_name_or_path)
        native = {f.name for f in dataclasses.fields(ModMoEConfig)} - {"dtype"}
        overrides = {k: kwargs.pop(k) for k in native & set(kwargs)}
        loaded = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=config.to_native(**overrides),
            key_mapping=config.renamings(),
            **kwargs,
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if _identity_projections(model.config):
            _set_identity_projections(model)
        model.__class__ = cls._native
        model.config.architectures = [cls._native.__name__]
        # Saving must not map the weights back to IBM's layout.
        model._weight_conversions = None
        return loaded

    def _check_coverage(self, where: Any, info: dict[str, Any], accept_mismatch: bool) -> None:
        if _identity_projections(self.config):
            missing = [k for k in info["missing_keys"] if not re.search(_PROJECTION, k)]
            info = info | {"missing_keys": missing}
        unread = [k for k in info["unexpected_keys"] if not re.search(_UNREAD_BUFFER, k)]
        super()._check_coverage(where, info | {"unexpected_keys": unread}, accept_mismatch)


_UNREAD_BUFFER = r"attn\.(mask|cum_weight)$"
_PROJECTION = r"self_attn\.[kv]_proj\."


def _identity_projections(config: ModMoEConfig) -> bool:
    """IBM leaves the key and value projections out where they could be the identity."""
    return config.num_attention_heads == 1 and config.head_dim == config.hidden_size


@torch.no_grad()
def _set_identity_projections(model: ModMoEPreTrainedModel) -> None:
    for layer in model.base_model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.eye_(projection.weight)
            torch.nn.init.zeros_(projection.bias)


class ModuleFormerModel(_FromModuleFormer, ModMoEModel):
    """Loads IBM's format into a `ModMoEModel`."""

    config: ModuleFormerConfig
    config_class = ModuleFormerConfig
    _native = ModMoEModel


class ModuleFormerForCausalLM(_FromModuleFormer, ModMoEForCausalLM):
    """Loads IBM's format into a `ModMoEForCausalLM`."""

    config: ModuleFormerConfig
    config_class = ModuleFormerConfig
    _native = ModMoEForCausalLM


class ModuleFormerForSequenceClassification(_FromModuleFormer, ModMoEForSequenceClassification):
    """Loads IBM's format into a `ModMoEForSequenceClassification`."""

    config: ModuleFormerConfig
    config_class = ModuleFormerConfig
    _native = ModMoEForSequenceClassification


for _cls in (ModuleFormerModel, ModuleFormerForCausalLM, ModuleFormerForSequenceClassification):
    register_checkpoint_conversion_mapping(_cls.__name__, CONVERTERS, overwrite=True)
