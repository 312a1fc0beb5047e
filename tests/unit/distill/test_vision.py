"""The same stages, meta models, pairs and assembly teach an image model: a ViT teaches a V-MoE."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

from modmoe import ModMoEForImageClassification
from modmoe.distill.assembly import assemble
from modmoe.distill.meta import FIT, MetaFit, build_meta, evaluate_hybrids
from modmoe.distill.objective import Objective, class_targets
from modmoe.distill.pair import StagePair
from modmoe.distill.ranges import stage_specs
from modmoe.distill.stages import CutModel, cut, join
from modmoe.distill.stitch import principal_projection
from modmoe.distill.student import StudentStage, build_student_stage, initialize_ends, initialize_from
from tests.unit.distill.conftest import pictures, text, vision_config, vit

UNEVEN = [(0, 1), (1, 4), (4, 5)]
STUDENT_CUT = [(0, 1), (1, 3), (3, 4)]


@pytest.fixture
def teacher() -> CutModel:
    return cut(vit(), UNEVEN)


def stages(**changes) -> list[StudentStage]:
    config = vision_config(**changes)
    return [build_student_stage(config, spec, seed=0) for spec in stage_specs(STUDENT_CUT, config.hidden_size)]


def pairs(teacher: CutModel, objective: Objective | None = None, projection=None, **changes) -> list[StagePair]:
    meta, objective = build_meta(teacher), objective or Objective()
    return [
        StagePair(meta, stage, objective, theirs, projection=projection, targets_of=class_targets)
        for stage, theirs in zip(stages(**changes), teacher.stages, strict=True)
    ]


def trained(module, steps: int) -> list[float]:
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = module(**pictures())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("ranges", [UNEVEN, [(0, 3), (3, 5)], 5, 1], ids=str)
@torch.no_grad()
def test_a_cut_vit_and_a_joined_one_compute_what_the_vit_computes(ranges, tmp_path):
    model = vit()
    expected = model(pictures()["pixel_values"]).logits
    whole = cut(model, ranges)
    assert torch.equal(whole(**pictures()).logits, expected)
    whole.save(tmp_path)
    assert torch.equal(CutModel.load(tmp_path)(**pictures()).logits, expected)
    joined = join(whole)
    assert type(joined) is type(model)
    assert torch.equal(joined(pictures()["pixel_values"]).logits, expected)


def test_student_stages_in_a_row_are_the_student():
    torch.manual_seed(0)
    whole = ModMoEForImageClassification(vision_config(num_experts=[3, 4, 5, 6])).eval()
    hidden = None
    with torch.no_grad():
        for stage in stages(num_experts=[3, 4, 5, 6]):
            initialize_from(stage.eval(), whole.state_dict())
            output = stage(pictures(), hidden)
            hidden = output.hidden_states
        assert torch.equal(output.logits, whole(**pictures()).logits)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_the_students_stage_is_trained(teacher, index):
    job = pairs(teacher, Objective(alpha=0.5, hidden_weight=1.0))[index].train()
    before = {name: tensor.clone() for name, tensor in job.named_parameters()}
    losses = trained(job, 3)
    assert losses[-1] < losses[0]
    for name, parameter in job.named_parameters():
        frozen = name.startswith("frozen.")
        assert (parameter.grad is None) == frozen, name
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding
            assert torch.equal(parameter, before[name]) == frozen, name


def test_losses_are_means_over_images(teacher):
    job = pairs(teacher, Objective(alpha=0.5, temperature=2.0))[1].eval()
    batch = pictures()
    found = job(**batch)
    logits = job.student_output(batch, job.teacher_signals(batch).boundaries[1])[0].logits
    wanted = job.teacher_signals(batch).logits
    torch.testing.assert_close(found["cross_entropy"], F.cross_entropy(logits, batch["labels"]).detach())
    kl = F.kl_div((logits / 2).log_softmax(-1), (wanted / 2).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(found["kl"], kl.detach())
    expected = 0.5 * found["cross_entropy"] + 0.5 * 4 * found["kl"] + 0.01 * found["router"]
    torch.testing.assert_close(found["loss"].detach(), expected)
    unlabelled = batch | {"labels": batch["labels"].index_fill(0, torch.tensor([1]), -100)}
    torch.testing.assert_close(
        job(**unlabelled)["cross_entropy"], F.cross_entropy(logits, unlabelled["labels"]).detach()
    )


def test_a_vit_is_taught_from_start_to_end(teacher, tmp_path):
    """Meta model fitted, hybrids scored, stages trained, put together, fine-tuned."""
    meta = build_meta(teacher)
    fit = trained(MetaFit(meta, FIT, teacher, replace=0.0, targets_of=class_targets), 4)
    assert fit[-1] < fit[0]
    report = evaluate_hybrids(meta, teacher.stages, [pictures(3), pictures(2, seed=2)], class_targets)
    assert report.num_tokens == 5
    assert set(report.hybrids) == {0, 1, 2}
    directories = []
    for job in pairs(teacher):
        trained(job.train(), 2)
        directories.append(tmp_path / f"stage_{job.spec.index}")
        job.eval().save(directories[-1])
        loaded = StudentStage.load(directories[-1]).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in job.student.state_dict().items())
    assert assemble(directories, tmp_path / "student") is True
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert type(student) is ModMoEForImageClassification
    tuned = trained(student.train(), 3)
    assert tuned[-1] < tuned[0]


@torch.no_grad()
def test_ends_are_the_teachers(teacher):
    for parameter in teacher.frame.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    first, middle, last = stages()
    names = ["class_token", "projection.bias", "projection.weight"]
    written = ["model.embed_positions.weight", *(f"model.embed_tokens.{name}" for name in names)]
    assert initialize_ends(first, teacher.frame) == written
    embedded = first.model.embed_tokens(pictures()["pixel_values"]) + first.model.embed_positions.weight
    torch.testing.assert_close(embedded, teacher.until(pictures(), 0))
    assert initialize_ends(middle, teacher.frame) == []
    ends = ["classifier.bias", "classifier.weight", "model.norm.bias", "model.norm.weight"]
    last = stages(norm_type="layernorm", norm_eps=1e-12)[2]
    assert initialize_ends(last, teacher.frame) == ends
    hidden = teacher(**pictures()).boundaries[-1]
    torch.testing.assert_close(last.classifier(last.model.norm(hidden)), teacher(**pictures()).logits)


@torch.no_grad()
def test_a_narrower_student_embeds_through_the_projection(teacher):
    projection = principal_projection([torch.randn(50, 16)], 12)
    first, _, last = stages(hidden_size=12, head_dim=6)
    initialize_ends(first, teacher.frame, projection)
    embedded = first.model.embed_tokens(pictures()["pixel_values"]) + first.model.embed_positions.weight
    torch.testing.assert_close(embedded, teacher.until(pictures(), 0) @ projection)
    assert initialize_ends(last, teacher.frame, projection) == []


def test_what_does_not_fit_is_refused(teacher):
    with pytest.raises(ValueError, match="the teacher has 3 logits and the student num_labels=4: set .* to 3"):
        pairs(teacher, num_labels=4)
    forgotten = StagePair(build_meta(teacher), stages()[0], Objective(), teacher.stages[0])
    with pytest.raises(ValueError, match=r"labels of shape \(4,\) are classes.*targets_of=class_targets"):
        forgotten(**pictures())
    with pytest.raises(ValueError, match=r"labels of shape \(batch,\), one class for each row, got shape \(2, 10\)"):
        class_targets(text())
