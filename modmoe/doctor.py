"""What ModMoE uses on this machine, and why not something else: `python -m modmoe.doctor`.

Every backend of every op is tried on a few numbers, on the CPU and on a CUDA device if there is one. Kernels that are
not in the cache are built on the way.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import modmoe
from modmoe.ops import dispatch_plan, grouped_linear, route, stickbreaking_attention, stickbreaking_paged_attention
from modmoe.ops.backend import BACKENDS, ENVIRONMENT_VARIABLE, requested_backend
from modmoe.ops.build import Kind, library, library_problem
from modmoe.ops.grouped_linear import BACKENDS as GROUPED_LINEAR
from modmoe.ops.paged import BACKENDS as PAGED
from modmoe.ops.routing import PLAN_BACKENDS, ROUTE_BACKENDS
from modmoe.ops.stickbreaking import BACKENDS as STICKBREAKING

_PACKAGES = ("torch", "transformers", "deepspeed", "triton", "nvidia-cutlass", "flash-attn", "megablocks")


def _stickbreaking_attention(device: str, backend: str) -> None:
    x = torch.randn(1, 1, 4, 16, device=device, dtype=_dtype(device))
    stickbreaking_attention(x, x, x, backend=backend)


def _stickbreaking_paged_attention(device: str, backend: str) -> None:
    q, pages = (torch.randn(1, size, 1, 16, device=device, dtype=_dtype(device)) for size in (1, 4))
    table, lengths = torch.zeros(1, 1, device=device, dtype=torch.int32), torch.full((1,), 4, device=device)
    stickbreaking_paged_attention(q, pages, pages, table, lengths, backend=backend)


def _route(device: str, backend: str) -> None:
    route(torch.randn(4, 2, device=device), 1, backend=backend)


def _dispatch_plan(device: str, backend: str) -> None:
    dispatch_plan(torch.tensor([[0], [1]], device=device), 2, backend=backend)


def _grouped_linear(device: str, backend: str) -> None:
    plan = dispatch_plan(torch.tensor([[0], [1]], device=device), 2, backend="torch")
    x, weight = (torch.randn(*shape, device=device, dtype=_dtype(device)) for shape in ((2, 16), (2, 16, 16)))
    grouped_linear(x, weight, plan, top_k=1, target="pair", backend=backend)


class Trial(NamedTuple):
    """An op in miniature."""

    run: Callable[[str, str], None]
    """Given a device and a backend."""
    backends: tuple[str, ...]
    """Best first."""


TRIALS = {
    "stickbreaking_attention": Trial(_stickbreaking_attention, STICKBREAKING),
    "stickbreaking_paged_attention": Trial(_stickbreaking_paged_attention, PAGED),
    "route": Trial(_route, ROUTE_BACKENDS),
    "dispatch_plan": Trial(_dispatch_plan, PLAN_BACKENDS),
    "grouped_linear": Trial(_grouped_linear, GROUPED_LINEAR),
}


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def problem(op: str, device: str, backend: str) -> str | None:
    """Try `op` on `backend` and return what it complained about, or None."""
    try:
        TRIALS[op].run(device, backend)
        if device != "cpu":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever it is, the person wants to read it
        lines = str(error).splitlines() or [type(error).__name__]
        return lines[0].removeprefix(f"{op}: backend {backend!r} cannot be used: ")
    return None


def diagnosis(op: str, device: str) -> list[str]:
    """One line for each backend of `op`: in use, ready, or why not."""
    backends = TRIALS[op].backends
    problems = {backend: problem(op, device, backend) for backend in backends}
    wished = requested_backend(op, None, backends)
    ready = [backend for backend in backends if problems[backend] is None]
    chosen = ready[0] if wished == "auto" and ready else wished
    lines = []
    for backend, trouble in problems.items():
        state = "in use" if backend == chosen else "ready"
        lines.append(f"    {backend:<10} {state if trouble is None else 'no: ' + trouble}")
    return lines


def versions() -> str:
    """Installed versions of what matters here."""
    found = [f"modmoe {modmoe.__version__}", f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def processor() -> str:
    """Name of the CPU, where the system says it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def kernels(kind: Kind) -> str:
    """Where the compiled kernels are, or why there are none."""
    trouble = library_problem(kind)
    return f"not in use: {trouble}" if trouble else str(library(kind))


def main() -> int:
    """Print the diagnosis of all ops on all devices; return 1 if MODMOE_BACKEND is nothing that there is."""
    print(versions())
    print(f"cpu: {processor()}, {torch.get_num_threads()} threads")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        devices.append(f"cuda:{index}")
        major, minor = torch.cuda.get_device_capability(index)
        print(f"{devices[-1]}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    print(f"{ENVIRONMENT_VARIABLE}: {os.environ.get(ENVIRONMENT_VARIABLE) or 'auto (not set)'}")
    try:
        requested_backend("doctor", None, BACKENDS)
    except ValueError as error:
        print(error)
        return 1
    print(f"compiled for the CPU: {kernels('cpu')}")
    print(f"compiled for CUDA: {kernels('cuda')}")
    for device in devices[:2]:
        print(f"ops on {device}")
        for op in TRIALS:
            print("\n".join([f"  {op}", *diagnosis(op, device)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
