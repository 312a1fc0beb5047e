"""How a native tensor is made of the tensors of another model."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Recipe(NamedTuple):
    """One native tensor: `make(*tensors of these names)`."""

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]


def same(source: str) -> Recipe:
    """The tensor as it is."""
    return Recipe((source,), lambda tensor: tensor)


def stacked(*sources: str) -> Recipe:
    """Tensors below one another, with the leading dimension of size one that a single expert has."""
    return Recipe(sources, lambda *tensors: torch.cat(tensors)[None])
