"""Whether what started this process is still there."""

import os

# Set by DeepSpeed's launcher and by torchrun; a process that was started by hand may outlive its shell.
_LAUNCHED = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")


class Launcher:
    """The launching processes above this one; `deepspeed` dies of SIGTERM without passing it on."""

    def __init__(self) -> None:
        self._ancestors = self._current() if any(name in os.environ for name in _LAUNCHED) else None

    def is_gone(self) -> bool:
        return self._ancestors is not None and self._current() != self._ancestors

    @staticmethod
    def _current() -> tuple[int, int]:
        import psutil

        parent = os.getppid()
        try:
            return parent, psutil.Process(parent).ppid()
        except psutil.Error:
            return parent, 0
