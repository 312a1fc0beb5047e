"""A process of its own for Triton: whether its kernels are compiled or interpreted is settled when it is imported."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

Worker = Callable[..., Any]


def _start(environment: dict[str, str]) -> None:
    assert "triton" not in sys.modules
    os.environ.update(environment)
    # Fills fresh memory with NaN, so that a kernel that reads what nobody wrote is found out.
    torch.use_deterministic_algorithms(True)


@contextmanager
def triton_worker(**environment: str) -> Iterator[Worker]:
    """Give a function that runs `function(*args)` in a new process with `environment`, and raises what it raises."""
    with ProcessPoolExecutor(1, get_context("spawn"), _start, (environment,)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
