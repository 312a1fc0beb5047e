"""Means of what training steps give, from one record to the next."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from modmoe.training.monitoring.router_load import RouterLoads


class MetricWindow:
    """
    Sums losses and expert loads of forward passes without waiting for the device; skipped steps are left out.

    Attributes:
        step_loads: tokens per expert of the step at work, on this rank.
    """

    def __init__(self) -> None:
        self.step_loads = RouterLoads()
        self._loads = RouterLoads()
        self._step_sums: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._counted: torch.Tensor | int = 0
        self._steps = 0

    def begin_step(self) -> None:
        """Forget the step before."""
        self.step_loads.clear()
        self._step_sums = {}

    def add(self, outputs: Any, share: torch.Tensor, parts: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Count one forward pass of the step.

        Args:
            outputs: of a causal LM, or of a task without a cross entropy.
            share: (), of this micro-batch in the tokens of the step.
            parts: name -> (), what else the loss is made of, this micro-batch's share of the step.
        """
        self.step_loads.add(outputs)
        values = {"loss": outputs.loss}
        if outputs.cross_entropy is not None:
            values["cross_entropy"] = outputs.cross_entropy
        values |= {f"aux/{name}": value * share for name, value in (outputs.aux_losses or {}).items()}
        for name, value in (values | dict(parts or {})).items():
            self._step_sums[name] = self._step_sums.get(name, 0) + value.detach()

    @property
    def step_loss(self) -> torch.Tensor:
        """(): this rank's share of the step's loss so far, or of the last step's before the next one begins."""
        return self._step_sums.get("loss", torch.zeros(()))

    def end_step(self, applied: torch.Tensor) -> None:
        """
        Take the step into the means.

        Args:
            applied: (), boolean, the same on all ranks; a step that was not applied counts for nothing.
        """
        for name, value in self._step_sums.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(applied, value, 0)
        self.step_loads.scale(applied)
        self._loads.merge(self.step_loads)
        self._counted = self._counted + applied.double()
        self._steps += 1

    def means(self) -> tuple[dict[str, float], RouterLoads]:
        """
        Figures per step since the last call, over all ranks, the number of skipped steps among them, and the loads.
        """
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).double()
        if dist.is_initialized():
            dist.all_reduce(sums)
        loads, counted, skipped = self._loads, int(self._counted), self._steps - int(self._counted)
        loads.all_reduce()
        self._sums, self._loads, self._counted, self._steps = {}, RouterLoads(), 0, 0
        if counted == 0:
            return {"skipped_steps": skipped}, RouterLoads()
        return dict(zip(names, (sums / counted).tolist(), strict=True)) | {"skipped_steps": skipped}, loads
