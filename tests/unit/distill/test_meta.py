import pytest
import torch
import torch.nn.functional as F

from modmoe.distill.meta import FIT, PRETRAIN, HybridReport, Incubation, MetaFit, build_meta, evaluate_hybrids
from modmoe.distill.objective import Objective
from modmoe.distill.stages import CutModel, cut, stages_of
from tests.unit.distill.conftest import build, text


def snapshot(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module, before) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.fixture
def teacher() -> CutModel:
    return cut(build("llama"), [(0, 2), (2, 5)])


def steps(module, count: int, **extra) -> list[float]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(count):
        loss = module(**text(), **extra)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "modmoe-per-layer"])
def test_a_meta_model_has_few_blocks_of_the_teachers_kind(family):
    teacher = cut(build(family), [(0, 2), (2, 5)])
    meta = build_meta(teacher)
    assert meta.specs == teacher.specs
    assert [stage.layer_indices for stage in meta.stages] == [(1,), (3,)]
    assert meta.frame is teacher.frame
    with torch.no_grad():
        assert meta(**text()).logits.shape == (2, 10, 61)


def test_copied_blocks_are_copies_and_fresh_ones_follow_the_seed(teacher):
    copied = build_meta(teacher, 2)
    assert [stage.layer_indices for stage in copied.stages] == [(0, 1), (2, 4)]
    assert unchanged(copied.stages[1].blocks[1], snapshot(teacher.stages[1].blocks[2]))
    assert copied.stages[1].blocks[1] is not teacher.stages[1].blocks[2]
    fresh = [build_meta(teacher, initialize="fresh", seed=seed).stages[1] for seed in (0, 0, 1)]
    assert unchanged(fresh[1], snapshot(fresh[0]))
    assert not unchanged(fresh[2], snapshot(fresh[0]))
    weight = fresh[0].blocks[0].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(0.2, rel=0.2)  # the teacher's initializer_range


def test_saved_meta_models_compute_the_same(teacher, tmp_path):
    meta = build_meta(teacher)
    meta.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(CutModel.load(tmp_path)(**text()).logits, meta(**text()).logits)


@pytest.mark.parametrize("count", [0, 3])
def test_a_meta_stage_is_no_deeper_than_the_teachers(teacher, count):
    with pytest.raises(ValueError, match=f"layers_per_stage={count} must be between 1 and .* smallest stage, 2"):
        build_meta(teacher, count)
    with pytest.raises(ValueError, match="initialize='zeros'"):
        build_meta(teacher, initialize="zeros")


def test_fitting_trains_the_blocks_and_nothing_else(teacher):
    fit = MetaFit(build_meta(teacher), FIT, teacher).train()
    frozen, blocks = snapshot(teacher), snapshot(fit.stages)
    losses = steps(fit, 6)
    assert losses[-1] < losses[0]
    assert unchanged(teacher, frozen)
    assert not unchanged(fit.stages, blocks)
    assert {name.split(".")[0] for name in fit.state_dict()} == {"stages"}
    assert all(p.grad is None for p in teacher.parameters())


def test_fitting_compares_every_boundary_and_the_logits(teacher):
    meta = build_meta(teacher)
    found = MetaFit(meta, Objective(alpha=1.0, hidden_weight=3.0), teacher).eval()(**text())
    theirs, mine = teacher(**text()), meta(**text())
    errors = [
        ((m - t).square().sum(-1) / t.square().sum(-1)).mean()
        for m, t in zip(mine.boundaries[1:], theirs.boundaries[1:], strict=True)
    ]
    torch.testing.assert_close(found["hidden"], torch.stack(errors).mean().detach())
    torch.testing.assert_close(found["loss"].detach(), found["kl"] + 3 * found["hidden"])


def test_signals_may_come_from_elsewhere(teacher):
    asked = MetaFit(build_meta(teacher), FIT, teacher, replace=0.0)
    given = MetaFit(build_meta(teacher), FIT)
    signals = asked.teacher_signals(text()).tensors()
    assert torch.equal(asked(**text())["loss"], given(**text(), signals=signals)["loss"])


def test_pretraining_needs_no_teacher_and_stages_incubate_on_a_copy(teacher):
    meta = build_meta(teacher, initialize="fresh")
    losses = steps(MetaFit(meta, PRETRAIN), 5)
    assert losses[-1] < losses[0]
    original, still = snapshot(teacher.stages[1]), snapshot(meta)
    incubation = Incubation(meta, teacher.stages[1])
    losses = steps(incubation, 5)
    assert losses[-1] < losses[0]
    assert unchanged(teacher.stages[1], original)
    assert unchanged(meta, still)
    assert not unchanged(incubation.stage, original)
    assert {name.split(".")[0] for name in incubation.state_dict()} == {"stage"}


def test_hybrids_are_scored_one_stage_at_a_time(teacher, tmp_path):
    meta = build_meta(teacher)
    teacher.save(tmp_path)
    batches = [text(seed=3), text(rows=1, length=5, seed=4)]
    meta.eval()
    report = evaluate_hybrids(meta, stages_of(tmp_path), iter(batches))
    assert report.num_tokens == 2 * 9 + 4
    assert not any(module.training for module in meta.modules())
    with torch.no_grad():
        for index, stage in enumerate(teacher.stages):
            hybrid = CutModel(meta.frame, [stage if i == index else meta.stages[i] for i in range(2)])
            logits = [hybrid(**batch).logits[:, :-1].flatten(0, 1) for batch in batches]
            targets = [batch["labels"][:, 1:].flatten() for batch in batches]
            expected = F.cross_entropy(torch.cat(logits), torch.cat(targets)).item()
            assert report.hybrids[index] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate_hybrids(meta, [], [text(length=1)])


def test_hybrids_that_are_worse_than_the_meta_model_are_refused():
    HybridReport(100, 2.0, {0: 1.9, 1: 2.0}).check()
    report = HybridReport(100, 2.0, {0: 1.9, 1: 2.5, 2: float("nan")})
    with pytest.raises(ValueError, match=r"2\.0000 over 100 tokens; stage 1: 2\.5000, stage 2: nan\).*force it"):
        report.check()
    report.check(force=True)


def test_stages_of_the_teacher_stand_in_and_every_meta_stage_learns_all_the_same(teacher):
    fit = MetaFit(build_meta(teacher), FIT, teacher, replace=1.0).train()
    calls = []
    for stage in teacher.stages:
        stage.register_forward_hook(lambda module, *_: calls.append(module.spec.index))
    torch.manual_seed(0)
    for _ in range(4):
        fit.zero_grad()
        fit(**text())["loss"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fit.stages.parameters())
    # Asked for its signals each stage runs once a step; of two, one stands in.
    assert len(calls) == 4 * 3
    calls.clear()
    fit.eval()(**text())
    assert calls == [0, 1]
    with pytest.raises(ValueError, match="replace=1.5 must be between 0"):
        MetaFit(fit.frozen.teacher, FIT, replace=1.5)
    with pytest.raises(ValueError, match="no teacher to ask"):
        MetaFit(build_meta(teacher), FIT).teacher_signals(text())
