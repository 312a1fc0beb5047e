"""Image models: a patch embedding before the same blocks, and a classifier after them (V-MoE, arXiv:2106.05974).

Letters: B batch, C channels, P patches, T = 1 + P tokens, H hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from modmoe.losses.router import RouterStatistics
from modmoe.models.configuration_vision import ModMoEVisionConfig
from modmoe.models.modeling_modmoe import ModMoEModel, WithRouterLosses
from modmoe.models.outputs import ModMoECausalLMOutputWithPast, ModMoEModelOutputWithPast


class PatchEmbedding(nn.Module):
    """(B, C, height, width) -> (B, T, H): the class token, then patches row by row, without positions."""

    def __init__(self, config: ModMoEVisionConfig) -> None:
        super().__init__()
        self.shape = (config.num_channels, config.image_size, config.image_size)
        size = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: for images of another shape than the config's.
        """
        if pixel_values.shape[1:] != self.shape:
            raise ValueError(
                f"pixel_values of one image have shape {tuple(pixel_values.shape[1:])} and must have {self.shape}: "
                "resize the images, or set image_size and num_channels in the config"
            )
        patches = self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)


class ClassTokenClassifier(nn.Linear):
    """(B, T, H) -> (B, labels), from the class token. V-MoE and ViT read it, rather than a mean over patches."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states[:, 0])


class ModMoEVisionModel(ModMoEModel):
    """The stack of blocks on the patches of an image, without a head."""

    config: ModMoEVisionConfig
    config_class = ModMoEVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def _input_embedding(self, config: ModMoEVisionConfig) -> nn.Module:
        return PatchEmbedding(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbedding):
            init.normal_(module.class_token, std=self.config.initializer_range)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ModMoEModelOutputWithPast:
        """
        Args (the rest as for `ModMoEModel.forward`):
            pixel_values: (B, C, height, width), float.
            inputs_embeds: (B, T, H) in their place, without positions.
        """
        if (pixel_values is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of pixel_values and inputs_embeds")
        if pixel_values is not None:
            inputs_embeds = self.embed_tokens(pixel_values)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


class ModMoEForImageClassification(WithRouterLosses):
    """The image model with a linear classifier on the class token."""

    config: ModMoEVisionConfig
    config_class = ModMoEVisionConfig
    model: ModMoEVisionModel
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The loss is a mean over this batch; the Trainer divides it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: ModMoEVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ModMoEVisionModel(config)
        self.classifier = ClassTokenClassifier(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        num_tokens_in_batch: torch.Tensor | int | None = None,
        router_statistics: RouterStatistics | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModMoECausalLMOutputWithPast:
        """
        Args:
            pixel_values: (B, C, height, width), float.
            labels: (B,) classes, (B,) values, or (B, labels) for several at once.
            output_router_logits: whether to return logits and choices of every router.
            num_tokens_in_batch, router_statistics: as of `ModMoEForCausalLM.forward`; an image has T tokens.

        Returns:
            logits (B, labels), and with labels the losses, as of the other heads.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            pixel_values=pixel_values, output_router_logits=labels is not None or output_router_logits, **kwargs
        )
        logits = self.classifier(outputs.last_hidden_state)
        result = self._result(logits, outputs, output_router_logits)
        if labels is None:
            return result
        loss = self.loss_function(labels, logits, self.config)
        self._add_losses(result, outputs, loss, None, None, None, num_tokens_in_batch, router_statistics)
        return result


__all__ = ["ModMoEForImageClassification", "ModMoEVisionModel"]
