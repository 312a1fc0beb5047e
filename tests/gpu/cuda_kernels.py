"""What the tests of csrc/cuda need of a machine."""

import pytest
import torch

from modmoe.ops import build
from modmoe.ops.routing_cuda import device_problem


def require_kernels() -> None:
    """Skip where the kernels cannot be built; fail where they should have been."""
    try:
        build._nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    problem = device_problem(torch.device("cuda"))
    assert problem is None, problem
