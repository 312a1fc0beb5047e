"""Builds kernels for the emulator, and says how it is to run them."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
COMPILER = os.environ.get("CXX") or shutil.which("g++")

OPS = "modmoe_emulated"  # a namespace of its own: the real kernels may be loaded as well

_TORCH = Path(torch.__file__).parent
_FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-U_FORTIFY_SOURCE", "-w")
# Instrumented code calls the emulator, which stands in for the sanitizer's own library.
_INSTRUMENT = ("-fsanitize=thread", "-fno-extern-tls-init", f"-I{HERE / 'emulator' / 'include'}")
_KERNELS = (f"-I{CUDA}", f"-isystem{_TORCH / 'include'}", f"-Dmodmoe_cuda={OPS}")
_STABLE_ABI = ("-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DTORCH_STABLE_ONLY")


class Emulator:
    """A library of kernels, run on the CPU by the emulator.

    Args:
        sources: CUDA C++ files.
        folder: where to put what is compiled.
    """

    def __init__(self, sources: list[Path], folder: Path) -> None:
        objects = [_compile(HERE / "emulator" / "emulator.cpp", folder)]
        objects += [_compile(source, folder, *_INSTRUMENT, *_KERNELS, *_STABLE_ABI, "-x", "c++") for source in sources]
        self.path = folder / f"{sources[0].stem}.so"
        libraries = (f"-L{_TORCH / 'lib'}", "-ltorch", "-ltorch_cpu")
        _run("-shared", "-Wl,--no-undefined", "-o", str(self.path), *objects, *libraries)
        self.library = ctypes.CDLL(str(self.path))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_barriers.restype = ctypes.c_char_p

    @contextmanager
    def running(self, schedule: int = 0, deleted_barrier: str = "", races_allowed: bool = False) -> Iterator[None]:
        """Run kernels in a certain way.

        Args:
            schedule: 0 or 1: threads run in order or in reverse; else the seed of a random order.
            deleted_barrier: "file:line" of a barrier that is to do nothing.
            races_allowed: look for everything but races.
        """
        self.library.emulator_reset(ctypes.c_uint(schedule), deleted_barrier.encode(), races_allowed)
        try:
            yield
        finally:
            self.barriers = self.library.emulator_barriers().decode().split()  # "file:line" of those met
            self.error = self.library.emulator_error().decode()
            self.library.emulator_reset(0, b"", False)


def _compile(source: Path, folder: Path, *flags: str) -> str:
    result = folder / f"{source.stem}.o"
    if not result.exists():
        _run(*_FLAGS, *flags, "-c", str(source), "-o", str(result))
    return str(result)


def _run(*arguments: str) -> None:
    result = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, f"{COMPILER} {' '.join(arguments)}\n{result.stderr[-4000:]}"
