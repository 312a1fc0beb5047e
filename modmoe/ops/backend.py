"""Which implementation of an op runs: an explicit choice, checked, and said once.

The first of these that is set wins: the op's ``backend`` argument, the innermost ``use_backend`` context,
the environment variable ``MODMOE_BACKEND``, and else ``auto``.

The choice takes two steps, because what can run is known only when the op runs, not when it is traced: the entry point
of an op asks `requested_backend` which name was requested, and its implementation asks `choose_backend` which backend
that means for the given tensors.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "cpp", "triton", "cuda", "cuda_sm90")
ENVIRONMENT_VARIABLE = "MODMOE_BACKEND"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # that an op may be given

# Schemas are fragments of one namespace, so that a compiled library can add kernels for other devices to them.
library = torch.library.Library("modmoe", "FRAGMENT")

_context: list[str] = []
_announced: set[tuple[str, str]] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` block on backend `name`, for this process and all its threads.

    An op that has no implementation of that name runs as with ``auto``: one name is set for all of them.

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


def requested_backend(op: str, explicit: str | None, known: tuple[str, ...]) -> str:
    """Return the name under which `op` is to run, one of `known` or ``auto``.

    Args:
        op: name of the op, for messages.
        explicit: the caller's own choice, or None.
        known: the implementations that `op` has.

    Raises:
        ValueError: a name that is not in `BACKENDS`, or an explicit one that is not in `known`.
    """
    if explicit is not None:
        if _check(explicit, f"{op}(backend=...)") not in ("auto", *known):
            raise ValueError(f"{op} has no backend {explicit!r}, it has {', '.join(known)}")
        return explicit
    if _context:
        name = _context[-1]
    else:
        name = _check(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", f"environment variable {ENVIRONMENT_VARIABLE}")
    return name if name in known else "auto"


def choose_backend(op: str, name: str, problems: Mapping[str, Callable[[], str | None]]) -> str:
    """Return the backend that `op` runs on for the tensors at hand.

    Args:
        op: name of the op, for messages.
        name: from `requested_backend`.
        problems: for each implementation, best first, a function that says why it cannot run here, or None.

    Raises:
        RuntimeError: the named backend cannot run here.
    """
    if name != "auto":
        if problem := problems[name]():
            raise RuntimeError(f"{op}: backend {name!r} cannot be used: {problem}")
        return name
    passed: list[str] = []
    for candidate, find_problem in problems.items():
        problem = find_problem()
        if problem is None:
            _announce(op, candidate, passed)
            return candidate
        passed.append(f"not {candidate!r}: {problem}")
    raise RuntimeError(f"{op}: no backend can be used: {'; '.join(passed)}")


def no_second_derivative(op: str) -> None:
    """Make it an error to differentiate the gradient of `op`: torch itself would warn, and take it for a constant."""

    def refuse(*_: object) -> None:
        raise RuntimeError(f"{op} can be differentiated once; for second derivatives take backend 'reference'")

    torch.library.register_autograd(f"modmoe::{op}_backward", refuse, lib=library)


# Asked once: torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "hpu", "mps") if torch.amp.is_autocast_available(d))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an op that takes `x` must compute: autocast's where it is on, else its own."""
    device = x.device.type
    on = device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on and x.dtype != torch.float64 else x.dtype


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Turn autocast off inside `function`: dtypes were settled at the op's entry. The first argument is a tensor."""

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


def _announce(op: str, name: str, passed: list[str]) -> None:
    if (op, name) not in _announced:
        _announced.add((op, name))
        logger.info("%s runs on backend %r (auto%s)", op, name, "".join(f"; {reason}" for reason in passed))
