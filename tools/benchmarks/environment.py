"""On what and with what it was measured."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceiling import Ceiling

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "modmoe",
    "torch",
    "transformers",
    "triton",
    "scattermoe",
    "stickbreaking_attention",
    "flash_attn",
    "megablocks",
    "grouped_gemm",
    "kernels",
)


def environment(device: torch.device, dtype: str, ceiling: Ceiling) -> dict[str, Any]:
    """Hardware, versions and the speeds that the roofline column is relative to."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "dtype": dtype,
        "mm_tflops": ceiling.flops_per_second / 1e12,
        "copy_gbytes_per_second": ceiling.bytes_per_second / 1e9,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor() or "?")


def _version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
