"""The choice of a backend: who wins, what is refused, and that it is left as it was found."""

import logging
from collections.abc import Callable

import pytest
import torch

from modmoe.ops import backend, stickbreaking_attention, use_backend
from modmoe.ops.backend import ENVIRONMENT_VARIABLE, choose_backend, requested_backend

KNOWN = ("cpp", "torch", "reference")


def problems(**reasons: str | None) -> dict[str, Callable[[], str | None]]:
    return {name: lambda reason=reason: reason for name, reason in reasons.items()}


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_auto_takes_the_first_that_runs_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_announced", set())
    with caplog.at_level(logging.INFO, logger=backend.logger.name):
        choices = [choose_backend("some_op", "auto", problems(cpp="no luck", torch=None)) for _ in range(3)]
    assert choices == ["torch"] * 3
    said = [record.getMessage() for record in caplog.records]
    assert said == ["some_op runs on backend 'torch' (auto; not 'cpp': no luck)"]


def test_nothing_that_runs() -> None:
    with pytest.raises(RuntimeError, match="op: no backend can be used: not 'cpp': no luck; not 'torch': nor here"):
        choose_backend("op", "auto", problems(cpp="no luck", torch="nor here"))


def test_a_wish_that_cannot_be_met() -> None:
    assert choose_backend("op", "torch", problems(cpp=None, torch=None)) == "torch"
    with pytest.raises(RuntimeError, match="op: backend 'cpp' cannot be used: no luck"):
        choose_backend("op", "cpp", problems(cpp="no luck", torch=None))
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="backend 'torch' has no weights to return, 'reference' has them"):
        stickbreaking_attention(x, x, x, return_weights=True, backend="torch")


def test_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested_backend("op", None, KNOWN) == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert requested_backend("op", None, KNOWN) == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert requested_backend("op", None, KNOWN) == "reference"
    with use_backend("torch"):
        assert requested_backend("op", None, KNOWN) == "torch"
        assert requested_backend("op", "reference", KNOWN) == "reference"
        with use_backend("auto"):
            assert requested_backend("op", None, KNOWN) == "auto"
        assert requested_backend("op", None, KNOWN) == "torch"
    assert requested_backend("op", None, KNOWN) == "reference"


def test_one_name_for_all_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context or variable concerns the ops that have such a backend; an argument must be one of the op's own."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert requested_backend("op", None, KNOWN) == "auto"
    with pytest.raises(ValueError, match="op has no backend 'triton', it has cpp, torch, reference"):
        requested_backend("op", "triton", KNOWN)


def test_context_is_left_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend._context == []


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for choose in (lambda: requested_backend("op", "opencl", KNOWN), lambda: use_backend("opencl").__enter__()):
        with pytest.raises(ValueError, match="unknown backend 'opencl', must be one of auto, reference, torch, cpp"):
            choose()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "opencl")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}: unknown backend 'opencl'"):
        requested_backend("op", None, KNOWN)
