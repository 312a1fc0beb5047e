"""Divergence from a teacher against PyTorch's own, and its gradient."""

import pytest
import torch
import torch.nn.functional as F

from modmoe.losses import distillation
from modmoe.losses.distillation import forward_kl, hidden_error, summed_kl


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(13, 7, generator=generator, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_divergence_of_the_teacher_from_the_student(logits, temperature):
    student, teacher = logits
    expected = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher, temperature), expected)
    assert forward_kl(student, student, temperature).abs().max() < 1e-6


def test_tokens_that_the_teacher_excludes_cost_nothing(logits):
    student, teacher = logits
    teacher = teacher.detach().index_fill(1, torch.tensor([2]), -torch.inf)
    kl = forward_kl(student, teacher)
    assert kl.isfinite().all()
    (gradient,) = torch.autograd.grad(kl.sum(), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("chunk", [4, 1024])
def test_chunks_change_neither_sum_nor_gradient(logits, monkeypatch, chunk):
    monkeypatch.setattr(distillation, "_CHUNK_TOKENS", chunk)
    student, teacher = logits
    valid = torch.arange(13) % 3 != 0
    expected = forward_kl(student, teacher)[valid].sum()
    total = summed_kl(student.bfloat16().float(), teacher, valid)
    torch.testing.assert_close(summed_kl(student, teacher, valid), expected)
    gradients = [torch.autograd.grad(value, student)[0] for value in (summed_kl(student, teacher, valid), expected)]
    torch.testing.assert_close(*gradients)
    assert total.dtype == torch.float32


def test_errors_of_hidden_states_are_relative():
    states = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(hidden_error(2 * states, states), torch.ones(2))
    assert hidden_error(torch.ones(1, 2), torch.zeros(1, 2)).isfinite().all()
