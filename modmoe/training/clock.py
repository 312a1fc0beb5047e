"""The wall-clock time of a run, and its limit."""

import math
import time


class Clock:
    """
    Training time of a run, evaluations and saves included, over all the launches that it was resumed in.

    `seconds` stands still until it is set: ranks agree on it first, because a learning rate that follows the clock
    must not differ between replicas.

    Args:
        max_minutes: the limit; None: there is none.

    Attributes:
        seconds: used so far.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.seconds = 0.0
        self._limit = math.inf if max_minutes is None else 60 * max_minutes
        self._begun = 0.0

    def start(self) -> None:
        """Go on from `seconds`."""
        self._begun = time.monotonic() - self.seconds

    def now(self) -> float:
        """Seconds used so far, by this rank's own watch."""
        return time.monotonic() - self._begun

    @property
    def share(self) -> float:
        """Share of the limit that is used, from 0 to 1; 0 without a limit."""
        return min(1.0, self.seconds / self._limit)
