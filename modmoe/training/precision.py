"""Which device a process computes on, and which arithmetic matrix products run in."""

import contextlib
import platform
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def device_type() -> str:
    """Where this process trains."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(setting: Literal["auto", "fp32", "bf16"], device_type: str) -> Precision:
    """
    Turn "auto" into bf16 where the hardware multiplies bf16 natively, else fp32.

    Args:
        setting: what the run asks for; anything but "auto" is returned as it is.
        device_type: "cpu" or "cuda".
    """
    if setting != "auto":
        return setting
    native = _gpu_has_bf16() if device_type == "cuda" else _cpu_has_bf16()
    return "bf16" if native else "fp32"


def autocast(precision: Precision, device_type: str) -> contextlib.AbstractContextManager:
    """The context in which the model runs: weights stay fp32, matrix products are in bf16 if asked for."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bf16() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        # oneDNN also emulates bf16 here, more slowly than fp32, so ask for the instructions themselves.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
