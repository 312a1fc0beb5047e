"""Modular sparse mixture-of-experts language models.

Importing this package registers its model types with the Auto classes of transformers: `modmoe`, `modmoe_vision` for
images, and IBM's `moduleformer`, which loads as `modmoe`. It also registers our ops as implementations of attention
and experts for other models (docs/interfaces.md).
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from modmoe.models import (
    ModMoEConfig,
    ModMoEForCausalLM,
    ModMoEForImageClassification,
    ModMoEForSequenceClassification,
    ModMoEModel,
    ModMoEPreTrainedModel,
    ModMoEVisionConfig,
    ModMoEVisionModel,
    ModuleFormerConfig,
)
from modmoe.models.moduleformer import (
    ModuleFormerForCausalLM,
    ModuleFormerForSequenceClassification,
    ModuleFormerModel,
)

__version__ = "0.1.0"

for _config, _model, _causal_lm, _classifier in (
    (ModMoEConfig, ModMoEModel, ModMoEForCausalLM, ModMoEForSequenceClassification),
    (ModuleFormerConfig, ModuleFormerModel, ModuleFormerForCausalLM, ModuleFormerForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForCausalLM.register(_config, _causal_lm, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)

AutoConfig.register(ModMoEVisionConfig.model_type, ModMoEVisionConfig, exist_ok=True)
AutoModel.register(ModMoEVisionConfig, ModMoEVisionModel, exist_ok=True)
AutoModelForImageClassification.register(ModMoEVisionConfig, ModMoEForImageClassification, exist_ok=True)

__all__ = [
    "ModMoEConfig",
    "ModMoEForCausalLM",
    "ModMoEForImageClassification",
    "ModMoEForSequenceClassification",
    "ModMoEModel",
    "ModMoEPreTrainedModel",
    "ModMoEVisionConfig",
    "ModMoEVisionModel",
    "__version__",
]
