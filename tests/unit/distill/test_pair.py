import pytest
import torch
import torch.nn.functional as F

from modmoe import ModMoEConfig
from modmoe.distill.meta import build_meta
from modmoe.distill.objective import Objective
from modmoe.distill.pair import StagePair
from modmoe.distill.ranges import StageSpec, stage_specs
from modmoe.distill.signals import TeacherSignals, top_k
from modmoe.distill.stages import CutModel, cut
from modmoe.distill.stitch import principal_projection
from modmoe.distill.student import StudentStage, build_student_stage, initialize_from
from modmoe.models.dense import from_dense
from tests.unit.distill.conftest import build, gpt2, student_config, text

CUT = [(0, 1), (1, 4), (4, 5)]
STUDENT_CUT = [(0, 1), (1, 3), (3, 4)]
EVERYTHING = Objective(alpha=0.5, temperature=2.0, hidden_weight=1.0, relation_weight=1.0, relation_heads=2)


@pytest.fixture
def teacher() -> CutModel:
    return cut(build("llama"), CUT)


def student(index: int, config: ModMoEConfig | None = None) -> StudentStage:
    config = config or student_config()
    return build_student_stage(config, stage_specs(STUDENT_CUT, config.hidden_size)[index], seed=0)


def pair(teacher: CutModel, index: int, objective: Objective = EVERYTHING, **options) -> StagePair:
    return StagePair(build_meta(teacher), student(index), objective, teacher.stages[index], **options)


def snapshot(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_parameters()}


def padded() -> dict[str, torch.Tensor]:
    batch = text()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, :4] = 0
    return batch


@pytest.mark.parametrize("stitch", ["projection", "linear"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_students_stage_and_stitches_are_trained(teacher, index, stitch):
    job = pair(teacher, index, stitch=stitch).train()
    frozen, trained = snapshot(job.frozen), snapshot(job.student)
    trained |= {f"stitch.{name}": t for name, t in job.named_parameters() if name.startswith("stitch")}
    trained = {name: tensor.clone() for name, tensor in trained.items()}
    optimizer = torch.optim.AdamW(job.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        job(**padded())["loss"].backward()
        optimizer.step()
    assert all(p.grad is None for p in job.frozen.parameters())
    assert all(torch.equal(t, frozen[name]) for name, t in job.frozen.named_parameters())
    assert not any(m.training for m in job.frozen.modules())
    for name, parameter in job.named_parameters():
        if not name.startswith("frozen."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert any(name.startswith("stitch") for name in trained) == (stitch == "linear")
    for name, tensor in job.student.named_parameters():
        assert not torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradient_passes_through_the_frozen_tail(teacher, index):
    """It is that of the same net in which nothing is frozen: there is no other loss than that of the logits."""
    config = student_config(router_aux_loss_coef=0.0)
    job = StagePair(build_meta(teacher), student(index, config), Objective(alpha=0.0), teacher.stages[index])
    job(**text())["loss"].backward()
    free = StagePair(build_meta(teacher), student(index, config), Objective(alpha=0.0), teacher.stages[index])
    free.frozen.requires_grad_(True)
    meta = free.frozen.meta
    logits = meta.after(text(), index, free.student(text(), meta.until(text(), index)).hidden_states)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), text()["input_ids"][:, 1:].flatten()).backward()
    assert any(p.grad is not None for p in meta.parameters())
    for mine, theirs in zip(job.student.parameters(), free.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("index", [0, 1])
def test_a_local_pair_compares_hidden_states_and_runs_no_tail(teacher, index, monkeypatch):
    whole = pair(teacher, index).train()(**padded())
    job = pair(teacher, index, local=True).train()
    with monkeypatch.context() as patch:
        for name in ("after", "forward"):
            patch.delattr(CutModel, name)
        losses = job(**padded())
        signals = job.teacher_signals(padded()).tensors()
    assert not {"cross_entropy", "kl"} & set(losses)
    for name in ("hidden", "relation", "router"):
        torch.testing.assert_close(losses[name], whole[name])
    expected = losses["hidden"] + losses["relation"] + job.student.config.router_aux_loss_coef * losses["router"]
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    assert all(p.grad is not None for p in job.student.parameters())
    assert all(p.grad is None for p in job.frozen.parameters())
    assert set(signals) == {f"boundary_{index}", f"boundary_{index + 1}"}
    torch.testing.assert_close(job(signals, **padded())["loss"], losses["loss"])
    assert job.score(padded())["cross_entropy"] > 0


def test_the_last_pair_is_never_local(teacher):
    last = pair(teacher, 2, local=True)
    torch.testing.assert_close(last(**padded())["loss"], pair(teacher, 2)(**padded())["loss"])
    assert not pair(teacher, 2, Objective(), local=True).is_local
    with pytest.raises(ValueError, match="a local pair learns from hidden states alone: set hidden_weight"):
        pair(teacher, 1, Objective(), local=True)


def test_saved_state_is_that_of_the_trained_parts(teacher):
    job = pair(teacher, 1, stitch="linear")
    state = {name: tensor.clone() for name, tensor in job.state_dict().items()}
    assert {name.split(".")[0] for name in state} == {"student", "stitch_in", "stitch_out"}
    other = pair(teacher, 1, stitch="linear")
    with torch.no_grad():
        for parameter in other.student.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(**text())["loss"], job(**text())["loss"])
    del state["stitch_in.1.weight"]
    with pytest.raises(RuntimeError, match="stitch_in.1.weight"):
        other.load_state_dict(state)
    wrapped = torch.nn.ModuleDict({"module": job})
    assert all(name.startswith(("module.student.", "module.stitch")) for name in wrapped.state_dict())


@pytest.mark.parametrize("whole", [build("llama"), build("qwen3"), gpt2()], ids=["llama", "qwen3", "gpt2"])
def test_a_student_with_the_teachers_weights_is_the_teacher(whole):
    """Dense, as deep and as wide: every hybrid is the teacher's, and nothing is left to learn from it."""
    teacher = cut(whole, CUT)
    native = from_dense(whole)
    weights = native.state_dict()
    if native.config.tie_word_embeddings:
        native.config.tie_word_embeddings = False
        del weights["lm_head.weight"]
    meta = build_meta(teacher)
    for index, spec in enumerate(teacher.specs):
        stage = build_student_stage(native.config, spec, seed=0)
        initialize_from(stage, weights)
        losses = StagePair(meta, stage, EVERYTHING, teacher.stages[index]).eval()(**padded())
        assert losses["kl"].item() == pytest.approx(0.0, abs=1e-5)
        assert losses["relation"].item() == pytest.approx(0.0, abs=1e-5) or spec.is_last
        assert losses.get("hidden", torch.zeros(())).item() == pytest.approx(0.0, abs=1e-5)
        assert "router" not in losses


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_loss_is_the_sum_of_its_parts(teacher, index):
    losses = pair(teacher, index)(**padded())
    expected = 0.5 * losses["cross_entropy"] + 0.5 * 4 * losses["kl"] + losses["relation"] + 0.01 * losses["router"]
    assert ("hidden" in losses) == (index < 2)
    expected = expected + losses.get("hidden", 0.0)
    torch.testing.assert_close(losses["loss"].detach(), expected)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_padding_and_batch_composition_change_nothing(teacher, index):
    job = pair(teacher, index).eval()
    short, long = text(1, 6, seed=2), text(1, 10, seed=3)
    row = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in short.items()}
    both = {name: torch.cat([row[name], long[name]]) for name in row}
    both["attention_mask"] = torch.tensor([[1] * 6 + [0] * 4, [1] * 10])
    parts = [job(**batch)["cross_entropy"] * (n - 1) for batch, n in ((short, 6), (long, 10))]
    kls = [job(**batch)["kl"] * (n - 1) for batch, n in ((short, 6), (long, 10))]
    together = job(**both)
    torch.testing.assert_close(together["cross_entropy"], sum(parts) / 14)
    torch.testing.assert_close(together["kl"], sum(kls) / 14)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_cached_signals_teach_as_the_teacher_does(teacher, index):
    asked = pair(teacher, index)
    given = StagePair(build_meta(teacher), student(index), EVERYTHING)
    signals = asked.teacher_signals(padded())
    expected = asked(**padded())
    found = given(**padded(), signals=signals.tensors())
    assert torch.equal(found["loss"], expected["loss"])
    kept = TeacherSignals(top_k(signals.logits, 61, 2.0), signals.boundaries)
    torch.testing.assert_close(given(**padded(), signals=kept.tensors())["loss"], expected["loss"])
    with pytest.raises(ValueError, match="no teacher's stage: give one, or cached signals"):
        given(**padded())


def test_one_stage_is_logit_distillation_of_the_whole_model():
    whole = build("llama")
    teacher = cut(whole, 1)
    config = student_config(tie_word_embeddings=True)
    stage = build_student_stage(config, StageSpec(0, 1, 0, 4, 16, 16), seed=0)
    job = StagePair(build_meta(teacher), stage, Objective(alpha=1.0), teacher.stages[0])
    assert torch.equal(job.teacher_signals(text()).logits, whole(**text()).logits)
    job(**text())["loss"].backward()
    assert stage.lm_head.weight is stage.model.embed_tokens.weight
    assert all(p.grad is not None for p in stage.parameters())


def test_shares_of_batches_add_up_to_the_whole(teacher):
    job = pair(teacher, 1, Objective()).eval()
    batch = text(3)
    whole = job(**batch)["loss"]
    with torch.no_grad():
        counts = {"num_items_in_batch": 27, "num_tokens_in_batch": 30}
        rows = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(3)]
        parts = [job(**row, **counts) for row in rows]
        # Mutual information is not linear in tokens: cross entropy and KL are.
        routed = sum(part["router"] for part in parts) / 3 - job(**batch)["router"]
        torch.testing.assert_close(sum(part["loss"] for part in parts) - 0.01 * routed, whole.detach())


def test_projection_stitches_of_different_widths(teacher):
    states = [s.flatten(0, 1) for s in teacher(**text()).boundaries]
    projection = principal_projection(states, 12)
    config = student_config(hidden_size=12, head_dim=6)
    job = StagePair(
        build_meta(teacher), student(1, config), Objective(hidden_weight=1.0), teacher.stages[1], projection=projection
    )
    losses = job(**text())
    losses["loss"].backward()
    assert losses["hidden"].item() > 0


def test_what_does_not_belong_together_is_refused(teacher):
    meta = build_meta(teacher)
    stage = build_student_stage(student_config(), StageSpec(1, 2, 2, 4, 16, 16), seed=0)
    with pytest.raises(ValueError, match="stage is 1 of 2, and the meta model has 3 stages"):
        StagePair(meta, stage, Objective())
    with pytest.raises(ValueError, match=r"index=0.*and stage 1 of the meta model stands for"):
        StagePair(meta, student(1), Objective(), teacher.stages[0])
    with pytest.raises(ValueError, match="the teacher has 61 logits and the student vocab_size=60"):
        StagePair(meta, student(1, student_config(vocab_size=60)), Objective())
    with pytest.raises(ValueError, match=r"needs a projection of shape \(16, 12\)"):
        StagePair(meta, student(1, student_config(hidden_size=12, head_dim=6)), Objective())
