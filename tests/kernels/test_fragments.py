"""The emulator's ldmatrix and mma, against what CUTLASS says of these instructions.

`ptx.cuh` and the emulator were written from one reading of the PTX manual. CUTLASS (BSD-3-Clause, github.com/NVIDIA/
cutlass, include/cute/atom/) is another, and runs on GPUs. It says where lanes have which elements by layouts
(shapes : strides) of lanes and of each lane's values; the place is the sum of index times stride, and the first index
runs fastest.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .emulated import HERE, Emulator

Mode = tuple[tuple[int, ...], tuple[int, ...]]
Layout = tuple[Mode, Mode]

# copy_traits_sm75.hpp: DstLayout of SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T, in bits; lane l gives row l (SrcLayout).
LOADED: dict[str, Layout] = {
    "load_plain": (((32,), (32,)), ((32, 4), (1, 1024))),
    "load_transposed": (((4, 8), (256, 16)), ((16, 2, 4), (1, 128, 1024))),
}
# mma_traits_sm80.hpp: MMA_Traits<SM80_16x8x16_F16F16F16F16_TN>, from which those with float32 sums inherit.
A: Layout = (((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)))  # row + 16 k
B: Layout = (((4, 8), (16, 1)), ((2, 2), (8, 64)))  # column + 8 k
C: Layout = (((4, 8), (32, 1)), ((2, 2), (16, 8)))  # row + 16 column


def places(layout: Layout) -> Tensor:
    """(32 lanes, values)"""
    lanes, values = (_mode(*mode) for mode in layout)
    return lanes[:, None] + values


def _mode(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    result = torch.zeros(1, dtype=torch.int64)
    for size, step in zip(shape, stride, strict=True):
        result = (torch.arange(size)[:, None] * step + result).flatten()
    return result


@pytest.fixture(scope="module")
def fragments(build_folder: Path) -> Emulator:
    return Emulator([HERE / "fragment_kernels.cpp"], build_folder)


def run(fragments: Emulator, kernel: str, *memory: Tensor) -> None:
    with fragments.running():
        getattr(fragments.library, kernel)(*(ctypes.c_void_p(tensor.data_ptr()) for tensor in memory))
    assert fragments.error == ""


@pytest.mark.parametrize("kernel", LOADED)
def test_ldmatrix(kernel: str, fragments: Emulator) -> None:
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16)
    registers = torch.zeros(32, 4, dtype=torch.int32)
    run(fragments, kernel, matrices, registers)
    expected = places(LOADED[kernel])[:, ::16] // 16  # two elements in a register, the first in its lower half
    assert torch.equal(registers.view(torch.int16).long(), expected)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_mma(name: str, fragments: Emulator) -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(-8, 9, size).float() for size in ((16, 16), (16, 8)))  # exact in every type
    dtype = getattr(torch, name)
    left, right = a.T.flatten()[places(A)].to(dtype), b.flatten()[places(B)].to(dtype)
    sums = torch.zeros(32, 4)
    run(fragments, f"multiply_{name}", left, right, sums)
    c = torch.zeros(8 * 16)
    c[places(C)] = sums
    assert torch.equal(c.view(8, 16).T, a @ b)
