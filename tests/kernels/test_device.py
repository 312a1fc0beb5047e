"""What is said of a driver on which the CUDA kernels cannot run; the emulator says which driver it is."""

import ctypes

import pytest
import torch

from .emulated import Emulator

OLD = b"CUDA driver version is insufficient for CUDA runtime version"
NO_IMAGE = b"no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("driver", "toolkit", "error", "problem"),
    [
        (13000, 13000, None, ""),
        (13000, 13010, None, ""),  # older, and yet it runs: minor versions of CUDA go together
        (
            12080,
            13010,
            OLD,
            f"{OLD.decode()}: the driver is for CUDA 12.8, the kernels were built with 13.1; "
            "update the driver, or set CUDA_HOME to an older toolkit",
        ),
        (13010, 13000, NO_IMAGE, NO_IMAGE.decode()),
        (0, 13000, OLD, "there is no CUDA driver"),
    ],
)
def test_drivers(driver: int, toolkit: int, error: bytes | None, problem: str, emulator: Emulator) -> None:
    said = ctypes.c_char_p(error)
    emulator.library.emulator_driver(driver, toolkit, said)
    try:
        assert torch.ops.modmoe_cuda.device_problem(0) == problem
    finally:
        emulator.library.emulator_driver(13000, 13000, None)
