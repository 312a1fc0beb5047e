"""The factor of the routers' loss over the steps of a run."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modmoe.training.finetuning.config import RouterLossSection


class RouterLossSchedule(TrainerCallback):
    """
    Sets `router_aux_loss_coef` of the model's config before each step, from the number of the step alone.

    Attributes:
        coefficient: of the step at work.
    """

    def __init__(self, section: RouterLossSection) -> None:
        self._section = section
        self.coefficient = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.coefficient = coefficient_at(self._section, state.global_step)
        model.config.router_aux_loss_coef = self.coefficient

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        model.config.router_aux_loss_coef = self._section.coefficient


def coefficient_at(section: RouterLossSection, step: int) -> float:
    """
    Args:
        section: of the run.
        step: counted from 0.
    """
    if step >= section.warmup_steps:
        return section.coefficient
    return section.coefficient * (step + 1) / section.warmup_steps
