import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from modmoe.distill.objective import Objective, hidden_loss, next_token_targets, relation_loss, teacher_kl
from modmoe.distill.signals import top_k
from modmoe.losses import distillation as module


def sample(rows: int = 3, length: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, length, vocabulary, generator=generator) * 3
    targets = torch.randint(0, vocabulary, (rows, length), generator=generator)
    targets[0, :2] = targets[2, 3] = -100
    return student, teacher, targets


def by_hand(student, teacher, targets, alpha, tau) -> float:
    total, count = 0.0, 0
    for s, t, target in zip(student.flatten(0, 1), teacher.flatten(0, 1), targets.flatten(), strict=True):
        if target == -100:
            continue
        p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
        kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
        total += (1 - alpha) * -float(s.log_softmax(-1)[target]) + alpha * tau**2 * kl
        count += 1
    return total / count


@pytest.mark.parametrize(("alpha", "tau"), [(0.0, 1.0), (0.5, 1.0), (0.3, 2.5), (1.0, 0.5)])
def test_the_loss_is_the_formula(alpha, tau):
    student, teacher, targets = sample()
    losses = Objective(alpha=alpha, temperature=tau).losses(student, targets, teacher)
    assert float(losses["loss"]) == pytest.approx(by_hand(student, teacher, targets, alpha, tau), rel=1e-5)


def test_gradient_is_that_of_plain_torch(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 4)  # chunks that end in the middle of a row
    student, teacher, targets = sample()
    mine, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    Objective(alpha=0.3, temperature=2.0).losses(mine, targets, teacher)["loss"].backward()
    valid = targets != -100
    log_q, log_p = ((x[valid] / 2).log_softmax(-1) for x in (plain, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (0.7 * F.cross_entropy(plain[valid], targets[valid]) + 0.3 * 4 * kl).backward()
    torch.testing.assert_close(mine.grad, plain.grad)


def test_padding_changes_nothing():
    student, teacher, targets = sample()
    objective = Objective(temperature=2.0)
    expected = objective.losses(student, targets, teacher)
    pads = [F.pad(x, (0, 0, 0, 5), value=1e4) for x in (student, teacher)]
    padded = objective.losses(pads[0], F.pad(targets, (0, 5), value=-100), pads[1])
    assert {n: float(v) for n, v in padded.items()} == pytest.approx({n: float(v) for n, v in expected.items()})


def test_shares_of_batches_add_up_to_the_whole():
    student, teacher, targets = sample()
    objective = Objective()
    whole = objective.losses(student, targets, teacher)["loss"]
    count = int((targets != -100).sum())
    parts = [
        objective.losses(student[rows], targets[rows], teacher[rows], num_items=count)["loss"]
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_shares_of_hidden_states_are_those_of_tokens():
    """A batch of prompts, which predicts nothing, still teaches where stages end."""
    student, teacher, targets = sample()
    targets[0] = -100
    mask = torch.ones(targets.shape, dtype=torch.bool)
    mask[2, 1:] = False
    objective = Objective(hidden_weight=2.0, relation_weight=3.0, relation_heads=1)

    def loss(rows: slice, **of_the_step: int) -> torch.Tensor:
        states = [(student[rows], teacher[rows])]
        given = {"hidden": states, "relations": states, "token_mask": mask[rows]}
        return objective.losses(student[rows], targets[rows], teacher[rows], **given, **of_the_step)["loss"]

    counts = {"num_items": int((targets != -100).sum()), "num_tokens": int(mask.sum())}
    parts = [loss(slice(0, 1), **counts), loss(slice(1, 3), **counts)]
    assert parts[0] > 0
    torch.testing.assert_close(sum(parts), loss(slice(0, 3)))


@pytest.mark.parametrize("nothing", [-1e4, -torch.inf])
def test_words_that_nobody_uses_change_nothing(nothing):
    student, teacher, targets = sample()
    wide = [F.pad(x, (0, 50), value=nothing).requires_grad_() for x in (student, teacher)]
    losses = Objective().losses(wide[0], targets, wide[1].detach())
    torch.testing.assert_close(losses["loss"], Objective().losses(student, targets, teacher)["loss"])
    losses["loss"].backward()
    assert wide[0].grad.isfinite().all()


def test_a_batch_without_targets_has_loss_zero():
    student, teacher, targets = sample()
    losses = Objective().losses(student.requires_grad_(), torch.full_like(targets, -100), teacher)
    losses["loss"].backward()
    assert losses["loss"].item() == 0.0
    assert not student.grad.any()


def test_bf16_logits_are_compared_in_fp32():
    student, teacher, targets = (x.bfloat16() if x.is_floating_point() else x for x in sample())
    losses = Objective(temperature=3.0).losses(student, targets, teacher)
    wide = Objective(temperature=3.0).losses(student.float(), targets, teacher.float())
    assert losses["loss"].dtype == torch.float32
    assert float(losses["loss"]) == float(wide["loss"])


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_gives_the_whole_kl(tau):
    student, teacher, _ = sample()
    student, teacher = student.flatten(0, 1).requires_grad_(), teacher.flatten(0, 1)
    full = teacher_kl(student, teacher, tau)
    mine = teacher_kl(student, top_k(teacher, 11, tau), tau)
    torch.testing.assert_close(mine, full)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (mine, full)]
    torch.testing.assert_close(*gradients)


def test_top_k_bounds_the_kl_from_below_and_grows_with_k():
    student, teacher, _ = sample()
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    values = [teacher_kl(student, top_k(teacher, k, 1.0), 1.0) for k in range(1, 12)]
    for fewer, more in itertools.pairwise(values):
        assert (fewer <= more + 1e-5).all()
    assert (values[0] >= -1e-6).all()


def test_top_k_is_exact_where_the_student_splits_the_rest_as_the_teacher_does():
    _, teacher, _ = sample()
    teacher = teacher.flatten(0, 1)
    student = teacher.scatter(-1, teacher.topk(3).indices, 0.3)
    torch.testing.assert_close(teacher_kl(student, top_k(teacher, 3, 1.0), 1.0), teacher_kl(student, teacher, 1.0))


def test_hard_targets_are_the_teachers_choice():
    student, teacher, targets = sample()
    valid = targets != -100
    expected = F.cross_entropy(student[valid], teacher.argmax(-1)[valid])
    objective = Objective(alpha=1.0, temperature=4.0, teacher_targets="hard")
    for given in (teacher, top_k(teacher, 2, 4.0)):
        torch.testing.assert_close(objective.losses(student, targets, given)["loss"], expected)


def test_hidden_loss_is_relative_and_skips_padding():
    student, teacher = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    wanted = torch.stack(
        [((s - t) @ (s - t)) / (t @ t) for s, t in zip(student[mask], teacher[mask], strict=True)]
    ).mean()
    torch.testing.assert_close(hidden_loss(student, teacher, mask), wanted)
    torch.testing.assert_close(hidden_loss(student * 100, teacher * 100, mask), wanted)
    student[0, 3:] = torch.inf
    torch.testing.assert_close(hidden_loss(student, teacher, mask), wanted)


def test_relations_compare_tokens_at_any_width():
    student = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([student.unflatten(-1, (2, 4))] * 2, -1).flatten(-2) / math.sqrt(2)  # other width
    assert float(relation_loss(student, student * 7, None, 2)) == pytest.approx(0.0, abs=1e-6)
    assert float(relation_loss(student, student.flip(1), None, 2)) > 0.01
    assert torch.isfinite(relation_loss(student, wide, None, 2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    other = student.roll(1, -1)
    expected = relation_loss(student, other, mask, 2)
    student, other = student.clone(), other.clone()
    student[0, 3:], other[0, 3:] = 5.0, -3.0
    torch.testing.assert_close(relation_loss(student, other, mask, 2), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert relation_loss(student, other, mask, 2).equal(expected)
    with pytest.raises(ValueError, match="relation_heads=3 must divide the width 8"):
        relation_loss(student, other, mask, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"alpha": math.nan},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"teacher_targets": "medium"},
        {"hidden_weight": -1.0},
        {"relation_weight": math.nan},
        {"relation_heads": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} must be"):
        Objective(**wrong)


def test_a_teacher_of_another_vocabulary_is_refused():
    student, teacher, targets = sample()
    with pytest.raises(ValueError, match="the teacher has 9 logits and the student 11"):
        Objective().losses(student, targets, teacher[..., :9])
    with pytest.raises(ValueError, match="alpha=0.5 needs the teacher"):
        Objective().losses(student, targets, None)


def test_a_token_counts_if_it_and_the_next_are_real_and_labelled():
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, -100, 12]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[-100, -100, 4, -100], [6, 7, -100, -100], [10, -100, 12, -100]])
    assert torch.equal(next_token_targets({"labels": labels, "attention_mask": mask}), expected)
    with pytest.raises(ValueError, match="no labels"):
        next_token_targets({"input_ids": labels})
