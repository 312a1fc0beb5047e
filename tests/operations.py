"""Which operations PyTorch runs: a CPU does not show what would keep the host of a GPU waiting."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "aten::lift_fresh": "numbers from the host become a tensor",
    "aten::multinomial": "its weights are checked",
}
"""Operations for which a GPU's host waits, and why."""


class Operations(TorchDispatchMode):
    """Notes the names of those that run in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))

    def assert_nothing_waits(self) -> None:
        """For a GPU, where what has been launched would have to be done first."""
        assert self.names
        assert not self.names & WAITING.keys()
