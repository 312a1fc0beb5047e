import pytest
import torch

from modmoe import ModMoEForCausalLM
from modmoe.distill.ranges import StageSpec, stage_specs
from modmoe.distill.seeds import stage_seed
from modmoe.distill.stages import cut
from modmoe.distill.stitch import principal_projection
from modmoe.distill.student import (
    StudentStage,
    build_student_stage,
    check_same_tokenizer,
    initialize_blocks,
    initialize_ends,
    initialize_from,
    stage_config,
)
from tests.unit.distill.conftest import build, student_config, text

RANGES = [(0, 1), (1, 3), (3, 4)]


def stages(seed: int = 0, **changes) -> list[StudentStage]:
    config = student_config(**changes)
    return [build_student_stage(config, spec, seed).eval() for spec in stage_specs(RANGES, config.hidden_size)]


def test_stages_are_the_blocks_of_the_whole_model():
    torch.manual_seed(0)
    whole = ModMoEForCausalLM(student_config(num_experts=[3, 4, 5, 6])).eval()
    batch = text() | {"attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    batch["attention_mask"][0, :3] = 0
    parts = stages(num_experts=[3, 4, 5, 6])
    hidden = None
    with torch.no_grad():
        for stage in parts:
            initialize_from(stage, whole.state_dict())
            output = stage(batch, hidden)
            hidden = output.hidden_states
        assert torch.equal(output.logits, whole(**batch).logits)
    with pytest.raises(ValueError, match="model.embed_tokens.weight is missing"):
        initialize_from(parts[0], {})
    with pytest.raises(ValueError, match=r"layers.3.mlp.* is of shape .*another config"):
        initialize_from(parts[2], whole.state_dict() | {"model.layers.3.mlp.experts.down_proj": torch.ones(2)})
    ends = [{name.split(".")[1] for name in stage.state_dict()} for stage in parts]
    assert ends == [{"embed_tokens", "layers"}, {"layers"}, {"layers", "norm", "weight"}]


def test_weights_follow_the_seed_and_the_stage_alone():
    config, specs = student_config(), stage_specs(RANGES, 16)
    before = torch.get_rng_state()
    forwards = [build_student_stage(config, spec, 3) for spec in specs]
    torch.randn(5)
    backwards = [build_student_stage(config, spec, 3) for spec in reversed(specs)][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())
    assert len({stage_seed(seed, what, stage) for seed in range(3) for what in "ab" for stage in range(3)}) == 18
    mine, other = (build_student_stage(config, specs[0], seed).model.embed_tokens.weight for seed in (3, 4))
    assert not torch.equal(mine, other)
    torch.set_rng_state(before)
    build_student_stage(config, specs[0], 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_saved_stages_load(tmp_path):
    for stage in stages():
        path = tmp_path / str(stage.spec.index)
        stage.save(path)
        loaded = StudentStage.load(path)
        assert loaded.spec == stage.spec
        assert loaded.whole_config.num_hidden_layers == 4
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in stage.state_dict().items())


def test_blocks_take_the_teachers_at_the_same_depth():
    teacher = cut(build("llama"), [(0, 1), (1, 4), (4, 5)])
    pairs = []
    for stage, theirs in zip(stages(), teacher.stages, strict=True):
        initialize_blocks(stage, theirs, lambda source, target: pairs.append((source, target)))
    blocks = [block for stage in teacher.stages for block in stage.blocks]
    assert [blocks.index(source) for source, _ in pairs] == [0, 1, 3, 4]


@pytest.mark.parametrize(("family", "norm"), [("llama", "rmsnorm"), ("gpt2", "layernorm")])
def test_ends_of_equal_width_are_the_teachers(family, norm):
    frame = cut(build(family), 3).frame
    first, middle, last = stages(norm_type=norm)
    with torch.no_grad():
        for parameter in frame.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert initialize_ends(first, frame) == ["model.embed_tokens.weight"]
    assert initialize_ends(middle, frame) == []
    written = initialize_ends(last, frame)
    assert written == ["lm_head.weight", *(["model.norm.bias"] if norm == "layernorm" else []), "model.norm.weight"]
    hidden = torch.randn(2, 3, 16)
    theirs = frame.model.get_output_embeddings()
    norms = [m for m in frame.model.modules() if getattr(getattr(m, "weight", None), "shape", None) == (16,)]
    expected = theirs(norms[-1](hidden))
    torch.testing.assert_close(last.lm_head(last.model.norm(hidden)), expected, atol=1e-3, rtol=1e-3)


def test_a_narrower_student_reads_and_writes_through_the_projection():
    frame = cut(build("llama"), 3).frame
    with torch.no_grad():
        frame.model.model.norm.weight.add_(torch.rand(16))
    projection = principal_projection([torch.randn(50, 16)], 12)
    first, _, last = stages(hidden_size=12, head_dim=6)
    assert initialize_ends(first, frame, projection) == ["model.embed_tokens.weight"]
    torch.testing.assert_close(
        first.model.embed_tokens.weight, frame.model.model.embed_tokens.weight @ projection, check_stride=False
    )
    assert initialize_ends(last, frame, projection) == ["lm_head.weight"]
    hidden = torch.randn(2, 3, 12) * 10
    expected = frame.model.lm_head(frame.model.model.norm(hidden @ projection.T))
    torch.testing.assert_close(last.lm_head(last.model.norm(hidden)), expected, atol=1e-4, rtol=1e-4)


def test_norms_of_another_kind_leave_the_head_fresh():
    last = stages(norm_type="layernorm")[-1]
    assert initialize_ends(last, cut(build("llama"), 3).frame) == []


def test_stages_that_do_not_fit_the_student_are_refused():
    with pytest.raises(ValueError, match=r"stage 1 is the range 3..5 .*num_hidden_layers=4"):
        stage_config(student_config(), StageSpec(1, 2, 3, 5, 16, 16))
    with pytest.raises(ValueError, match="tie_word_embeddings=True.*set it to False"):
        stage_config(student_config(tie_word_embeddings=True), StageSpec(0, 2, 0, 2, 16, 16))


def test_different_tokenizers_are_refused_with_the_reason():
    check_same_tokenizer({"a": 0, "b": 1}, {"b": 1, "a": 0})
    with pytest.raises(ValueError, match="2 tokens differ, such as 'b', 1 for the teacher and None for the student"):
        check_same_tokenizer({"a": 0, "b": 1}, {"a": 0, "c": 1})
