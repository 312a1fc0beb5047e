"""Teaches the routers of an extension which of a run's sources it is for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from modmoe.data.config import SourceConfig
from modmoe.losses.domain import domain_loss
from modmoe.models import ModMoEForCausalLM
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import DomainLossSection

INSIDE = "inside"
"""Key of a batch: (B,) bool, the blocks of the extensions' own sources."""


class DomainLoss:
    """
    Adds to a model's loss: coefficient * mean over tokens and routers of `domain_loss`.

    Args:
        section: sources and coefficient.
        model: that has the extensions.
        extensions: names of those that learn.
        sources: of the run.

    Attributes:
        fields: per source, what its blocks have to say.

    Raises:
        ConfigError: if an extension has no router to learn it.
    """

    def __init__(
        self,
        section: DomainLossSection,
        model: ModMoEForCausalLM,
        extensions: Sequence[str],
        sources: Sequence[SourceConfig],
    ) -> None:
        self._coefficient = section.coefficient
        self._extensions = extensions
        for extension in model.config.extension_list():
            if extension.name in extensions and extension.mode == "common":
                raise ConfigError(
                    f"finetuning.domain_loss: extension {extension.name!r} shares the model's routers (mode 'common') "
                    "and has no null choice: remove domain_loss"
                )
        self.fields = {source.name: {INSIDE: np.array(source.name in section.sources)} for source in sources}

    def add(self, outputs: Any, inside: torch.Tensor, num_tokens: torch.Tensor | int) -> dict[str, torch.Tensor]:
        """
        Change `outputs.loss` on a micro-batch, its share of a step's loss.

        Args:
            outputs: with router logits.
            inside: (B,) bool.
            num_tokens: of the step.

        Returns:
            name -> (), this micro-batch's share without the coefficient.
        """
        routers = [logits for name in self._extensions for logits in outputs.extension_router_logits[name]]
        of_tokens = inside.to(routers[0].device).repeat_interleave(len(routers[0]) // len(inside))
        loss = torch.stack([domain_loss(logits, of_tokens) for logits in routers]).mean() / num_tokens
        outputs.loss = outputs.loss + self._coefficient * loss
        return {"aux/domain": loss}
