"""What the tests of csrc/cuda need of a machine."""

import shutil

import pytest
import torch

from modmoe.ops.routing_cuda import device_problem


def require_kernels() -> None:
    """Skip where the kernels cannot be built; fail where they should have been."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to build csrc/cuda with")
    problem = device_problem(torch.device("cuda"))
    assert problem is None, problem
