"""The Hugging Face classes, and the formats that load into them."""

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.configuration_vision import ModMoEVisionConfig
from modmoe.models.modeling_modmoe import (
    ModMoEForCausalLM,
    ModMoEForSequenceClassification,
    ModMoEModel,
    ModMoEPreTrainedModel,
)
from modmoe.models.modeling_vision import ModMoEForImageClassification, ModMoEVisionModel
from modmoe.models.moduleformer import ModuleFormerConfig

__all__ = [
    "ModMoEConfig",
    "ModMoEForCausalLM",
    "ModMoEForImageClassification",
    "ModMoEForSequenceClassification",
    "ModMoEModel",
    "ModMoEPreTrainedModel",
    "ModMoEVisionConfig",
    "ModMoEVisionModel",
    "ModuleFormerConfig",
]
