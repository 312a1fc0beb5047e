"""What a phase trains, in the form that the trainer knows: inputs in, outputs as those of a causal LM."""

import copy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from modmoe.distill.frame import Frame
from modmoe.distill.meta import Incubation, MetaFit
from modmoe.distill.objective import IGNORE_INDEX, real_tokens, share_of
from modmoe.distill.pair import StagePair
from modmoe.distill.stages import CutModel
from modmoe.losses.router import RouterStatistics
from modmoe.models import ModMoEConfig
from modmoe.training.distillation.signals import CachedSignals, split_signals

_MEANS_OF_TOKENS = ("hidden", "relation")  # other losses are means of labels
# Of the losses by name: the one that is trained on, one that has a place of its own, and routers' loads.
_NOT_PARTS = ("loss", "cross_entropy", "router", "tokens_per_expert", "attn_tokens_per_expert")


@dataclass
class JobOutput:
    """
    What the trainer reads of an output.

    Args:
        loss: this micro-batch's share of the step's loss; in a score its mean.
        cross_entropy: the same of the labels' part; None from a local pair in training, which has none.
        parts: name -> (), share of the step's other parts, without their weights.
        aux_losses: as of `ModMoECausalLMOutputWithPast`.
        tokens_per_expert, attn_tokens_per_expert: likewise.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor | None
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    aux_losses: dict[str, torch.Tensor] | None = None
    tokens_per_expert: tuple[torch.Tensor, ...] | None = None
    attn_tokens_per_expert: tuple[torch.Tensor, ...] | None = None


class Job(nn.Module):
    """
    Args:
        task: from `modmoe.distill`, with what it keeps frozen.
        what: the task in words.
        signals: of the teacher, for a task that has none.

    Attributes:
        config: of the model whose routers are trained; of a meta model, which has none that are, the teacher's.
    """

    def __init__(
        self, task: MetaFit | Incubation | StagePair, what: str, signals: CachedSignals | None = None
    ) -> None:
        super().__init__()
        self.task = task
        self.what = what
        self.signals = signals
        self.config: PreTrainedConfig = (
            task.student.config if isinstance(task, StagePair) else _without_router_losses(_frame_config(task))
        )

    @property
    def base_model(self) -> nn.Module:
        """What takes the time of a forward pass."""
        return self.task

    def forward(
        self,
        use_cache: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_tokens_in_batch: torch.Tensor | int | None = None,
        router_statistics: RouterStatistics | None = None,
        **inputs: torch.Tensor,
    ) -> JobOutput:
        """
        Where gradients are off this is a score: the cross entropy alone, for which no teacher is asked.

        Args:
            use_cache: of no meaning here.
            num_items_in_batch, num_tokens_in_batch, router_statistics: as of `ModMoEForCausalLM.forward`.
            inputs: of a language model, labels, and a teacher's signals if they are cached.
        """
        batch, signals = split_signals(inputs)
        if not torch.is_grad_enabled():
            return _output(self.task.score(batch), 1.0, 1.0)
        shares: dict[str, Any] = {"num_items_in_batch": num_items_in_batch}
        if not isinstance(self.task, Incubation):
            shares["num_tokens_in_batch"] = num_tokens_in_batch
        if isinstance(self.task, StagePair):
            shares["router_statistics"] = router_statistics
        if signals:
            shares["signals"] = signals
        losses = self.task(**batch, **shares)
        tokens = real_tokens(batch)
        tokens = torch.ones_like(batch["input_ids"], dtype=torch.bool) if tokens is None else tokens
        of_labels = share_of(self.task.targets_of(batch) != IGNORE_INDEX, num_items_in_batch)
        return _output(
            losses, of_labels, of_labels if num_tokens_in_batch is None else share_of(tokens, num_tokens_in_batch)
        )

    def router_statistics(self, **inputs: torch.Tensor) -> RouterStatistics | None:
        """See `StagePair.router_statistics`."""
        assert isinstance(self.task, StagePair)
        return self.task.router_statistics(split_signals(inputs)[0])

    def update_selection_bias(self, *loads: tuple[torch.Tensor, ...]) -> None:
        """See `ModMoEForCausalLM.update_selection_bias`."""
        assert isinstance(self.task, StagePair)
        self.task.student.update_selection_bias(*loads)


def _output(losses: dict[str, Any], of_labels: torch.Tensor | float, of_tokens: torch.Tensor | float) -> JobOutput:
    """With a micro-batch's shares of the step's labels and tokens."""
    cross_entropy = losses.get("cross_entropy")
    return JobOutput(
        losses["loss"],
        None if cross_entropy is None else cross_entropy * of_labels,
        {
            name: value * (of_tokens if name in _MEANS_OF_TOKENS else of_labels)
            for name, value in losses.items()
            if name not in _NOT_PARTS
        },
        {"router": losses["router"]} if "router" in losses else None,
        losses.get("tokens_per_expert"),
        losses.get("attn_tokens_per_expert"),
    )


def _frame_config(task: MetaFit | Incubation) -> PreTrainedConfig:
    frame = task.frozen.frame if isinstance(task, MetaFit) else cast(CutModel, task.frozen.meta).frame
    return cast(Frame, frame).config


def _without_router_losses(config: PreTrainedConfig) -> PreTrainedConfig:
    """Routers of a modular teacher, if it has some, are taught by the teacher alone."""
    if isinstance(config, ModMoEConfig):
        config = copy.deepcopy(config)
        config.use_selection_bias, config.aux_scope = False, "micro_step"
    return config
