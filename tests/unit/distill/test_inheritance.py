"""Blocks of the student that start with the teacher's weights: as they are, in clusters, through a projection."""

import pytest
import torch
from transformers import GPTNeoXConfig

from modmoe.distill.inheritance import Inheritance, inherit
from modmoe.distill.ranges import stage_specs
from modmoe.distill.stages import CutModel, cut
from modmoe.distill.student import StudentStage, build_student_stage
from modmoe.models import ModMoEConfig
from modmoe.models.dense import config_from_dense
from tests.unit.distill.conftest import build, text

SEED = 3


@pytest.fixture
def teacher() -> CutModel:
    return cut(build("llama"), [(0, 1), (1, 4), (4, 5)])


def like_the_teacher(teacher: CutModel, **changes) -> ModMoEConfig:
    dense = config_from_dense(teacher.frame.config)
    return ModMoEConfig(**(dense.to_dict() | {"router_type": "linear"} | changes))


def middle(teacher: CutModel, config: ModMoEConfig) -> StudentStage:
    return build_student_stage(config, stage_specs([(0, 1), (1, 4), (4, 5)], config.hidden_size)[1], seed=0).eval()


def through_the_teachers(teacher: CutModel) -> tuple[torch.Tensor, torch.Tensor]:
    boundaries = teacher(**text()).boundaries
    return boundaries[1], boundaries[2]


def test_nothing_is_taken_unless_asked_for(teacher):
    student = middle(teacher, like_the_teacher(teacher))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert inherit(student, teacher.stages[1], Inheritance(), SEED) == []
    assert all(tensor.equal(before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize("gates", [{"norm_topk_prob": True}, {"norm_topk_prob": False}, {"unit_gates": True}])
@pytest.mark.parametrize(
    ("ffn", "sizes"),
    [
        ("copy", {"num_experts": 3, "num_experts_per_tok": 2}),
        ("cluster", {"num_experts": 3, "num_experts_per_tok": 3, "intermediate_size": 8}),
    ],
)
def test_a_stage_that_takes_everything_computes_what_the_teachers_does(teacher, ffn, sizes, gates):
    """While its routers prefer nothing; and it has several attention experts, each with all of the teacher's heads."""
    config = like_the_teacher(teacher, num_attn_experts=4, num_attn_experts_per_tok=2, **sizes, **gates)
    student = middle(teacher, config)
    written = inherit(student, teacher.stages[1], Inheritance(ffn, "teacher"), SEED)
    assert {"mlp.experts.down_proj", "self_attn.experts.q_proj.weight", "input_layernorm.weight"} <= set(written)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.self_attn.gate.weight.zero_()
    entering, leaving = through_the_teachers(teacher)
    assert student(text(), entering).hidden_states.allclose(leaving, atol=1e-5)


def test_through_a_rotation_the_stage_computes_the_same_in_other_coordinates(teacher):
    with torch.no_grad():
        for stage in teacher.stages:
            for name, parameter in stage.named_parameters():
                if "layernorm" in name:
                    parameter.uniform_(0.5, 1.5)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    student = middle(teacher, like_the_teacher(teacher))
    inherit(student, teacher.stages[1], Inheritance("copy", "teacher"), SEED, rotation)
    entering, leaving = through_the_teachers(teacher)
    assert student(text(), entering @ rotation).hidden_states.allclose(leaving @ rotation, atol=1e-4)


def test_a_narrower_student_takes_the_network_through_the_projection(teacher):
    projection = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))[0]
    config = like_the_teacher(teacher, hidden_size=8, num_experts=3, num_experts_per_tok=3, intermediate_size=8)
    student = middle(teacher, config)
    written = inherit(student, teacher.stages[1], Inheritance("cluster"), SEED, projection)
    assert written == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]


def test_the_projection_is_exact_for_hidden_states_within_it(teacher):
    """Of attention, in one block: what it adds leaves the subspace, so that behind it nothing is exact any more."""
    teacher = cut(build("llama"), [(0, 2), (2, 3), (3, 5)])
    block = teacher.stages[1].blocks[0]
    with torch.no_grad():
        block.mlp.down_proj.weight.zero_()
        block.input_layernorm.weight.uniform_(0.5, 1.5)
    projection = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))[0]
    specs = stage_specs([(0, 2), (2, 3), (3, 5)], 8)
    student = build_student_stage(like_the_teacher(teacher, hidden_size=8, head_dim=8), specs[1], seed=0).eval()
    inherit(student, teacher.stages[1], Inheritance("copy", "teacher"), SEED, projection)
    narrow = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))
    wide = []
    teacher.frame(text(), lambda hidden, calls: wide.append(teacher.stages[1](narrow @ projection.T, calls)) or hidden)
    assert student(text(), narrow).hidden_states.allclose(wide[0] @ projection, atol=1e-4)


def test_attention_of_another_type_or_shape_stays_fresh(teacher):
    for changes in ({"attention_type": "stickbreaking"}, {"num_attention_heads": 1, "num_key_value_heads": 1}):
        student = middle(teacher, like_the_teacher(teacher, **changes))
        written = inherit(student, teacher.stages[1], Inheritance("copy", "teacher"), SEED)
        assert "mlp.experts.down_proj" in written
        assert not any(name.startswith(("self_attn", "input_layernorm")) for name in written)


def test_a_stage_takes_the_same_whatever_was_drawn_before(teacher):
    config = like_the_teacher(teacher, num_experts=2, num_experts_per_tok=1)
    states = []
    for draws in (0, 5):
        torch.rand(draws)
        student = middle(teacher, config)
        inherit(student, teacher.stages[1], Inheritance("copy", reinit=0.5), SEED)
        states.append(student.state_dict())
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


def test_what_does_not_fit_is_refused(teacher):
    student = middle(teacher, like_the_teacher(teacher, intermediate_size=20))
    with pytest.raises(ValueError, match="ffn='copy' makes of the teacher's FFN experts of shapes .* change interm"):
        inherit(student, teacher.stages[1], Inheritance("copy"), SEED)
    student = middle(teacher, like_the_teacher(teacher, norm_type="layernorm"))
    with pytest.raises(ValueError, match="only RMSNorms let a student of another width"):
        inherit(student, teacher.stages[1], Inheritance("copy"), SEED, torch.eye(16))
    assert inherit(student, teacher.stages[1], Inheritance("fresh", "teacher"), SEED, torch.eye(16)) == []
    teacher.stages[1].config = GPTNeoXConfig()
    with pytest.raises(ValueError, match="model_type='gpt_neox' is not a dense model known here"):
        inherit(student, teacher.stages[1], Inheritance("copy"), SEED)
    assert inherit(student, teacher.stages[1], Inheritance("fresh", "teacher"), SEED) == []
