"""The choice of a backend: who wins, what is refused, and that it is left as it was found."""

import logging

import pytest
import torch

from modmoe.ops import backend, stickbreaking_attention, use_backend
from modmoe.ops.backend import ENVIRONMENT_VARIABLE, resolve_backend

BOTH = ("torch", "reference")


def test_auto_takes_the_first_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level(logging.INFO, logger=backend.logger.name):
        assert [resolve_backend("some_op", None, BOTH) for _ in range(3)] == ["torch"] * 3
    assert [record.getMessage() for record in caplog.records] == ["some_op runs on backend 'torch' (auto)"]


def test_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert resolve_backend("op", None, BOTH) == "reference"
    with use_backend("torch"):
        assert resolve_backend("op", None, BOTH) == "torch"
        assert resolve_backend("op", "reference", BOTH) == "reference"
        with use_backend("auto"):
            assert resolve_backend("op", None, ("reference", "torch")) == "reference"
        assert resolve_backend("op", None, BOTH) == "torch"
    assert resolve_backend("op", None, BOTH) == "reference"


def test_context_is_left_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend._context == []


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for choose in (lambda: resolve_backend("op", "cuda9", BOTH), lambda: use_backend("cuda9").__enter__()):
        with pytest.raises(ValueError, match="unknown backend 'cuda9', must be one of auto, reference, torch"):
            choose()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda9")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}: unknown backend 'cuda9'"):
        resolve_backend("op", None, BOTH)


def test_a_wish_that_cannot_be_met() -> None:
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="no backend 'torch' for these inputs; it has reference"):
        stickbreaking_attention(x, x, x, return_weights=True, backend="torch")
