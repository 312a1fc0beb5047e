"""One build of the emulated kernels per test process."""

from pathlib import Path

import pytest
import torch

from modmoe.ops import grouped_linear_cuda, routing_cuda

from .emulated import COMPILER, CUDA, HERE, OPS, Emulator


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler: neither $CXX nor g++")
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture(scope="session")
def built(build_folder: Path) -> Emulator:
    emulator = Emulator([CUDA / "routing.cu", CUDA / "grouped_linear.cu", CUDA / "device.cu"], build_folder)
    torch.ops.load_library(str(emulator.path))
    return emulator


@pytest.fixture
def emulator(built: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The backend "cuda" of the ops, for tensors on the CPU."""
    monkeypatch.setattr(torch.ops, "modmoe_cuda", getattr(torch.ops, OPS))
    for module in (routing_cuda, grouped_linear_cuda):
        monkeypatch.setattr(module, "device_problem", lambda device: None)
    return built


@pytest.fixture(scope="session")
def broken(build_folder: Path) -> Emulator:
    return Emulator([HERE / "broken_kernels.cpp"], build_folder)
