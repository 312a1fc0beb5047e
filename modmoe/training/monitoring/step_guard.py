"""What a step's loss and gradient say about the run: skipped steps, spikes, divergence.

A step whose loss or gradient norm is not finite changes nothing: neither weights nor moments, on any rank. That is
decided on the device, where the norm is. The host learns of it one step later, so that it never waits for the device.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from modmoe.training.errors import DivergedError
from modmoe.training.monitoring.events import Events
from modmoe.training.monitoring.loss_spikes import LossSpikes


class Outcome(NamedTuple):
    """How an optimizer step went, the same on all ranks."""

    step: int
    """Counted from 1."""
    loss: float
    """Of the whole step, over all ranks."""
    skipped: bool
    """Whether it was left out."""


class StepGuard:
    """
    Counts skipped steps, reports them and spikes of the loss, and ends a run that does not recover.

    Args:
        limit: skipped steps in a row that end the run.
        deviations: of `LossSpikes`.
        events: gets one per spike and per row of skipped steps.
        locate: where the numbers of the step before stopped being finite, in words; called by all ranks, once per row.
        contents: what the batch of a step held, in words.
        divergence: the message of the error, from a symptom.

    Attributes:
        skipped: steps of this launch.
        loss: of the last step that was not skipped; None before the first.
    """

    def __init__(
        self,
        limit: int,
        deviations: float,
        events: Events,
        locate: Callable[[], str],
        contents: Callable[[int], str],
        divergence: Callable[[str], str],
    ) -> None:
        self.skipped = 0
        self.loss: float | None = None
        self._row = 0
        self._limit = limit
        self._events = events
        self._spikes = LossSpikes(deviations)
        self._locate = locate
        self._contents = contents
        self._divergence = divergence
        self._found = ""

    def judge(self, outcome: Outcome) -> None:
        """
        Take note of one step. Called by all ranks.

        Raises:
            DivergedError: if too many in a row were skipped.
        """
        if not outcome.skipped:
            self._row, self.loss = 0, outcome.loss
            self._report_spike(outcome)
            return
        self.skipped += 1
        self._row += 1
        if self._row == 1:
            self._found = self._locate()
            what = "its loss" if not math.isfinite(outcome.loss) else "its gradient"
            message = f"skipped, {what} is not finite: {self._found}; {self._contents(outcome.step)}"
            self._events.note("skipped_step", outcome.step, message)
        if self._row >= self._limit:
            symptom = f"{self._row} steps in a row had no finite loss and gradient: {self._found}"
            raise DivergedError(self._divergence(symptom))

    def _report_spike(self, outcome: Outcome) -> None:
        usual = self._spikes.usual_if_spike(outcome.loss)
        if usual is not None:
            median, deviation = usual
            message = f"loss {outcome.loss:.4f}, usually {median:.4f} +- {deviation:.4f}"
            message += f"; {self._contents(outcome.step)}"
            figures = {"loss": outcome.loss, "median": median, "deviation": deviation}
            self._events.note("loss_spike", outcome.step, message, **figures)


def poison(loss: torch.Tensor) -> torch.Tensor:
    """
    The same loss; but if it is infinite, so that its gradient might be finite, one whose gradient is NaN.

    One rank's loss then shows in the gradient norm of all.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def skip_if_not_finite(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
    """
    Make the next step of a fused optimizer of PyTorch do nothing if the gradient norm, (), is not finite.

    This is how gradient scaling for fp16 skips steps on the device. ZeRO's optimizers skip by themselves.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), "only fused optimizers skip steps on the device"
    optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
