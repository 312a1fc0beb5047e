"""Pruning on the way: experts go out of use a few at a time, and are removed from what the run exports.

While the run lasts they stay where they are and cannot be chosen (`modmoe.surgery.retire`), so that no tensor changes
its shape under an optimizer.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modmoe.layers.router import Router
from modmoe.models import ModMoEForCausalLM
from modmoe.models.extension import Extension
from modmoe.surgery.expert_tensors import ExpertCheckpoint
from modmoe.surgery.prune import Pruning
from modmoe.surgery.prune_plan import Place, plan_pruning
from modmoe.surgery.retire import retire
from modmoe.surgery.routed_modules import RoutedModule, find_routed_modules
from modmoe.surgery.usage import UsageReport
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import PruningSection
from modmoe.training.monitoring.events import Events

logger = logging.getLogger(__name__)


class Recovery(TrainerCallback):
    """
    Retires experts before some of the steps, by what they are worth then.

    Args:
        section: how many, when and by what.
        model: whose experts go.
        report: of the model that the run started from, which decides; None: `measure` does.
        measure: the use of the model's experts on the text from a step on; called by all ranks.
        events: gets one for each pruning.

    Attributes:
        retired: per pool the experts that are out of use.

    Raises:
        ConfigError: if the model has no experts, or the report is none of it.
    """

    def __init__(
        self,
        section: PruningSection,
        model: ModMoEForCausalLM,
        report: UsageReport | None,
        measure: Callable[[int], UsageReport],
        events: Events,
    ) -> None:
        self._section = section
        self._report = report
        self._measure = measure
        self._events = events
        extensions = model.config.extension_list()
        shared = [extension.name for extension in extensions if extension.mode == "common"]
        if shared:
            raise ConfigError(
                f"finetuning.pruning: extension {shared[0]!r} shares the routers of the experts that would go (mode "
                "'common'): prune the model before it is extended"
            )
        try:
            modules = find_routed_modules(model)
            self._pools: dict[Place, RoutedModule] = {(m.layer, m.side): m for m in modules}
            ones = {place: torch.ones(module.num_experts) for place, module in self._pools.items()}
            # How many stay in the end; with scope "global" the sum alone is right.
            self._goal = plan_pruning(ones, keep=section.keep, scope=section.scope)
            self._check_end(extensions)
            if report is not None:
                self._scores(report)
        except ValueError as error:
            raise ConfigError(f"finetuning.pruning: {error}") from None
        self.retired: dict[Place, list[int]] = {place: [] for place in self._pools}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if is_due(self._section, state.global_step):
            self._prune(state.global_step)

    @property
    def kept(self) -> dict[Place, list[int]]:
        """Per pool the experts that are in use."""
        return {
            place: [expert for expert in range(module.num_experts) if expert not in self.retired[place]]
            for place, module in self._pools.items()
        }

    @property
    def share(self) -> float:
        """Of the experts that are in use."""
        return self._number(self.kept) / sum(module.num_experts for module in self._pools.values())

    def values(self) -> dict[str, list[int]]:
        """For a checkpoint: what `load` takes."""
        return {f"{layer}.{side}": experts for (layer, side), experts in self.retired.items()}

    def load(self, values: dict[str, list[int]]) -> None:
        """Go on from a checkpoint."""
        self._retire({place: values[f"{place[0]}.{place[1]}"] for place in self._pools})

    def write_pruned(self, unpruned: Path, directory: Path) -> None:
        """
        Write a model without the experts that are out of use.

        Args:
            unpruned: the model with all of them.
            directory: an existing one, which is given the files.
        """
        if self._number(self.kept) > self._number(self._goal):
            logger.warning("the run has ended before its last pruning: %.0f %% of the experts stay", 100 * self.share)
        pruning = Pruning(ExpertCheckpoint(unpruned), self.kept, self._section.denominator)
        for warning in pruning.warnings:
            logger.warning("%s", warning)
        scratch = directory / ".pruned"
        pruning.write(scratch)
        for file in scratch.iterdir():
            os.replace(file, directory / file.name)
        shutil.rmtree(scratch)

    def _check_end(self, extensions: list[Extension]) -> None:
        """
        Raises:
            ValueError: if what would be left is no model.
        """
        section = self._section
        for (layer, side), module in self._pools.items():
            router = cast(Router, module.router)
            left = 1 if section.scope == "global" else len(self._goal[layer, side])
            if router.sample_top_k and left < router.top_k:
                raise ValueError(
                    f"sample_topk={router.sample_top_k} of the model draws from {router.top_k} {side} experts, and "
                    f"keep={section.keep} may leave {left} in layer {layer}: set it to 0 in the config.json"
                )
        if extensions and section.denominator == "drop" and self._number(self._goal) == len(self._pools):
            raise ValueError(
                f"extension {extensions[0].name!r} needs a model with experts, and keep={section.keep} makes every "
                "layer dense: keep more of them, or use denominator 'keep'"
            )

    @staticmethod
    def _number(experts: dict[Place, list[int]]) -> int:
        return sum(map(len, experts.values()))

    def _prune(self, step: int) -> None:
        scores = self._scores(self._report or self._measure(step))
        for place, of_pool in scores.items():
            # Retired experts have no worth, and all others some: so those that are out of use stay so.
            of_pool.clamp_(min=torch.finfo(of_pool.dtype).tiny)
            of_pool[self.retired[place]] = 0.0
        kept = plan_pruning(scores, keep=share_at(self._section, step), scope=self._section.scope)
        plan = [{place: sorted(set(range(len(scores[place]))) - set(kept[place])) for place in scores}]
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Replicas may differ in a last bit, and with it in the order of two scores.
            dist.broadcast_object_list(plan, src=0)
        before = self.share
        self._retire(plan[0])
        message = f"{100 * self.share:.0f} % of the experts are left, {100 * before:.0f} % before"
        self._events.note("pruned", step, message, share=self.share)

    def _scores(self, report: UsageReport) -> dict[Place, torch.Tensor]:
        scores = {
            (layer, side): report.scores(self._section.metric, layer=layer, side=side).clone()
            for layer, side in self._pools
        }
        for place, of_pool in scores.items():
            if len(of_pool) != self._pools[place].num_experts:
                raise ValueError(f"the usage report has {len(of_pool)} experts in layer {place[0]}, the model others")
        return scores

    def _retire(self, experts: dict[Place, list[int]]) -> None:
        self.retired = experts
        for place, module in self._pools.items():
            if experts[place]:
                retire(cast(Router, module.router), experts[place], self._section.denominator)


def is_due(section: PruningSection, step: int) -> bool:
    """Whether experts go before a step, counted from 0: every so many steps, until the target is reached."""
    return 0 < step < section.steps + section.every and step % section.every == 0


def share_at(section: PruningSection, step: int) -> float:
    """Share of the experts that stays at a step: from 1 down to `keep` in a line."""
    return 1 - (1 - section.keep) * min(1.0, step / section.steps)
