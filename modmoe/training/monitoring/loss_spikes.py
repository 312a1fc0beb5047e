"""Which losses are too high to be noise."""

import statistics
from collections import deque


class LossSpikes:
    """
    Compares each step's loss with those of the steps before.

    The yardsticks are the median and 1.4826 times the median absolute deviation, which is the standard deviation of
    normal noise; unlike mean and standard deviation they are not moved by the spikes themselves.

    Args:
        deviations: how many of them above the median are a spike.
        window: losses to look back at.
        least: losses to have seen before the first judgement.
    """

    def __init__(self, deviations: float, window: int = 128, least: int = 32) -> None:
        self._deviations = deviations
        self._least = least
        self._losses: deque[float] = deque(maxlen=window)

    def usual_if_spike(self, loss: float) -> tuple[float, float] | None:
        """Median and deviation of the losses before, if this finite one is a spike; it is among them from now on."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < self._least:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
        # Losses that hardly differ must not make rounding errors a spike.
        deviation = max(deviation, 1e-3 * abs(median))
        return (median, deviation) if loss > median + self._deviations * deviation else None
