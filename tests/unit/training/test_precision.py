"""Which arithmetic "auto" means, and threads per process."""

import pytest
import torch

from modmoe.training.precision import autocast, resolve_precision
from modmoe.training.ranks import bootstrap


def test_explicit_settings_stand():
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp32", "cuda") == "fp32"


def test_auto_asks_the_processor(monkeypatch):
    monkeypatch.setattr("modmoe.training.precision.platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("auto", "cpu") == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("auto", "cpu") == "bf16"


def test_autocast_keeps_fp32_weights():
    layer = torch.nn.Linear(4, 4)
    with autocast("bf16", "cpu"):
        assert layer(torch.ones(1, 4)).dtype == torch.bfloat16
    with autocast("fp32", "cpu"):
        assert layer(torch.ones(1, 4)).dtype == torch.float32


def threads(monkeypatch, environment):
    chosen = []
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bootstrap, "_available_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    bootstrap.prepare_process(use_deepspeed=False)
    return chosen


def test_processes_share_the_cores(monkeypatch):
    assert threads(monkeypatch, {}) == [8]
    assert threads(monkeypatch, {"LOCAL_SIZE": "3"}) == [2]
    assert threads(monkeypatch, {"LOCAL_WORLD_SIZE": "20"}) == [1]


def test_the_user_decides_on_threads(monkeypatch):
    assert threads(monkeypatch, {"OMP_NUM_THREADS": "5"}) == []


@pytest.mark.parametrize(("devices", "kept"), [(0, [True]), (1, [])])
def test_freed_memory_is_kept_where_activations_are_on_the_host(monkeypatch, devices, kept):
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(bootstrap, "_keep_freed_memory", lambda: calls.append(True))
    threads(monkeypatch, {})
    assert calls == kept
