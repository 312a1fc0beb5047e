"""The chunked cross entropy against PyTorch's, and against the loss of transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from modmoe.losses import cross_entropy
from modmoe.losses.cross_entropy import causal_lm_loss, summed_cross_entropy


@pytest.fixture(params=[1, 40, 2**19], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A row at a time, some rows with a rest, all at once."""
    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK", request.param)
    return request.param


def make(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = (torch.randn(2, 9, 13) * 5).to(dtype).requires_grad_()
    labels = torch.randint(13, (2, 9))
    labels[0, 3:5] = -100
    return logits, labels


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_of_transformers(dtype: torch.dtype, shifted: bool, num_items: torch.Tensor | int | None) -> None:
    logits, labels = make(dtype)
    arguments = {"vocab_size": 13, "num_items_in_batch": num_items, "shift_labels": labels if shifted else None}
    ours, theirs = (loss(logits, labels, **arguments) for loss in (causal_lm_loss, ForCausalLMLoss))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss * 3, logits)[0] for loss in (ours, theirs))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    logits, labels = make(torch.float64)
    flat = labels.flatten()
    assert summed_cross_entropy(logits.flatten(0, 1), flat).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: summed_cross_entropy(x.flatten(0, 1), flat), logits)


def test_logits_far_apart() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e38, -3e38, 0.0], [0.0, -torch.inf, 1.0]], requires_grad=True)
    targets = torch.tensor([1, 0, 2])
    ours, theirs = (
        loss(logits, targets) for loss in (summed_cross_entropy, lambda x, t: F.cross_entropy(x, t, reduction="sum"))
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("num_items", [None, 1])
def test_no_labels(num_items: int | None) -> None:
    logits, labels = make()
    nothing = torch.full_like(labels, -100)
    losses = [loss(logits, nothing, 13, num_items) for loss in (causal_lm_loss, ForCausalLMLoss)]
    assert losses[0].isnan() if num_items is None else losses[0] == 0
    for loss in losses:
        assert not torch.autograd.grad(loss, logits)[0].any()
    assert summed_cross_entropy(torch.empty(0, 13), torch.empty(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("label", [13, -1])
def test_a_label_that_is_no_token(label: int) -> None:
    logits, labels = make()
    labels[0, 1] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        causal_lm_loss(logits, labels, 13)


def test_another_number_of_labels() -> None:
    logits, labels = make()
    with pytest.raises(ValueError, match="each of 18 rows of logits, got 9"):
        causal_lm_loss(logits, None, 13, shift_labels=labels[:1])


def test_nothing_but_the_gradient_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None and out.numel() >= logits.numel():
                large.append((func, out.dtype))
            return out

    monkeypatch.setattr(cross_entropy, "_CPU_CHUNK", 40)
    large: list = []
    logits = torch.randn(50, 13).bfloat16().requires_grad_()
    with Large():
        summed_cross_entropy(logits, torch.arange(50) % 13).backward()
    assert [dtype for func, dtype in large if func != torch.ops.aten.detach.default] == [torch.bfloat16]


def test_compiled() -> None:
    logits, labels = make()
    compiled = torch.compile(causal_lm_loss, fullgraph=True, backend="aot_eager")
    losses = compiled(logits, labels, 13), causal_lm_loss(logits, labels, 13)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))
