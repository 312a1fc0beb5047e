"""Modular sparse mixture-of-experts language models.

Importing this package registers its model types with the Auto classes of transformers: `modmoe`, and IBM's
`moduleformer`, which loads as `modmoe`. It also registers our ops as implementations of attention and experts for
other models (docs/interfaces.md).
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from modmoe.models import (
    ModMoEConfig,
    ModMoEForCausalLM,
    ModMoEForSequenceClassification,
    ModMoEModel,
    ModMoEPreTrainedModel,
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

__all__ = [
    "ModMoEConfig",
    "ModMoEForCausalLM",
    "ModMoEForSequenceClassification",
    "ModMoEModel",
    "ModMoEPreTrainedModel",
    "__version__",
]
