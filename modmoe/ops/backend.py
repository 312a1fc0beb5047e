"""Which implementation of an op runs: an explicit choice, checked, and said once.

The first of these that is set wins: the op's ``backend`` argument, the innermost ``use_backend`` context,
the environment variable ``MODMOE_BACKEND``, and else ``auto``.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch")
ENVIRONMENT_VARIABLE = "MODMOE_BACKEND"

# Schemas are fragments of one namespace, so that a compiled library can add kernels for other devices to them.
library = torch.library.Library("modmoe", "FRAGMENT")

_context: list[str] = []
_announced: set[str] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on backend `name`, for this process and all its threads.

    Args:
        name: one of `BACKENDS`.

    Raises:
        ValueError: `name` is not a known backend.
    """
    _context.append(_check(name, "use_backend"))
    try:
        yield
    finally:
        _context.pop()


def resolve_backend(op: str, explicit: str | None, available: tuple[str, ...]) -> str:
    """Return the backend that `op` shall run on.

    Args:
        op: name of the op, for messages.
        explicit: the caller's own choice, or None.
        available: what the op has for these inputs, best first; ``auto`` takes the first.

    Raises:
        ValueError: a name that is not in `BACKENDS`.
        RuntimeError: a backend was asked for that `op` does not have for these inputs.
    """
    if explicit is not None:
        name = _check(explicit, f"{op}(backend=...)")
    elif _context:
        name = _context[-1]
    else:
        name = _check(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"environment variable {ENVIRONMENT_VARIABLE}")
    if name == "auto":
        _announce(op, available[0])
        return available[0]
    if name not in available:
        raise RuntimeError(f"{op} has no backend {name!r} for these inputs; it has {', '.join(available)}")
    return name


# Asked once: torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "hpu", "mps") if torch.amp.is_autocast_available(d))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an op that takes `x` shall compute: autocast's where it is on, else its own."""
    device = x.device.type
    on = device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Turn autocast off inside `function`: dtypes were settled at the op's door. The first argument is a tensor."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not torch.is_autocast_enabled(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def _check(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}, must be one of {', '.join(BACKENDS)}")
    return name


def _announce(op: str, name: str) -> None:
    if op not in _announced and not torch.compiler.is_compiling():
        _announced.add(op)
        logger.info("%s runs on backend %r (auto)", op, name)
