import torch

from modmoe.losses.domain import domain_loss


def test_value_by_the_definition():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    inside = torch.arange(40) % 3 == 0
    null = logits.softmax(-1)[:, 0]
    expected = -torch.where(inside, 1 - null, null).log().sum()
    torch.testing.assert_close(domain_loss(logits, inside), expected)


def test_no_overflow_and_a_gradient_wherever_the_choice_is_wrong():
    logits = torch.tensor([[400.0, 0.0, 0.0], [-400.0, 0.0, 0.0]], requires_grad=True)
    inside = torch.tensor([True, False])
    domain_loss(logits, inside).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -0.5, -0.5], [-1.0, 0.5, 0.5]]))
    assert domain_loss(logits, ~inside).item() == 0.0
