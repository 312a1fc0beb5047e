"""Whether what started this process is still there."""

import contextlib
import os

# Set by `Jobs` for what it starts.
JOB = "MODMOE_JOB"
# How many processes of what sets a variable are above this one: of `deepspeed` one for all machines and one for each,
# of torchrun one. What is above those, such as a shell, may go while this process stays.
_GENERATIONS = {JOB: 1, "TORCHELASTIC_RUN_ID": 1, "CROSS_RANK": 2}


class Launcher:
    """The launching processes above this one; `deepspeed` dies of SIGTERM without passing it on."""

    def __init__(self) -> None:
        self._generations = next((count for name, count in _GENERATIONS.items() if name in os.environ), 0)
        self._ancestors = self._current()

    def is_gone(self) -> bool:
        return self._current() != self._ancestors

    def _current(self) -> list[int]:
        import psutil

        ancestors = [os.getpid()]
        with contextlib.suppress(psutil.Error):
            for _ in range(self._generations):
                ancestors.append(psutil.Process(ancestors[-1]).ppid())
        return ancestors
