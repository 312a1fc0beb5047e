"""Modules that take part in training without being trained."""

from typing import Any, Self

from torch import nn


class Frozen(nn.Module):
    """
    Holds modules that get no gradient, stay in evaluation mode, and are not part of any saved state.

    Loading a state into what contains it is strict for everything else.

    Args:
        modules: by name; read them as attributes.
    """

    def __init__(self, **modules: nn.Module | None) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.requires_grad_(False)
        self.train(False)
        self.register_load_state_dict_post_hook(self._forgive)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Empty."""
        return {} if destination is None else destination

    def _forgive(self, _: nn.Module, keys: Any) -> None:
        own = set(nn.Module.state_dict(self))
        keys.missing_keys[:] = [key for key in keys.missing_keys if not any(key.endswith(f".{name}") for name in own)]
