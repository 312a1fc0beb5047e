import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from modmoe.distill.frame import blocks_name, model_class
from modmoe.distill.stages import CutModel, Stage, cut, join, load_frame, stage_directory, stages_of
from tests.unit.distill.conftest import BLOCKS, FAMILIES, build, text

UNEVEN = [(0, 1), (1, 4), (4, 5)]


def inputs(family: str) -> list[dict]:
    """Plain, padded on either side, and two packed documents in a row."""
    ids = text()["input_ids"]
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :4] = 0
    right[0, 7:] = 0
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]])
    return [
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": left},
        {"input_ids": ids, "attention_mask": right},
        {"input_ids": ids, "position_ids": positions},
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cut_model_computes_what_the_model_computes(family):
    model = build(family)
    model.config.use_cache = False  # with a cache, transformers does not look for packed documents
    whole = cut(model, UNEVEN)
    for batch in inputs(family):
        assert torch.equal(whole(**batch).logits, model(**batch).logits)
    packed = whole(**inputs(family)[-1]).logits
    assert not torch.equal(packed, whole(**inputs(family)[0]).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_stages_and_joined_models_compute_the_same(family, tmp_path):
    model = build(family)
    model.config.use_cache = False  # GPT-Neo's products sum in another order on keys from a cache
    whole = cut(model, UNEVEN)
    whole.save(tmp_path)
    expected = model(**text()).logits
    assert torch.equal(CutModel.load(tmp_path)(**text()).logits, expected)
    joined = join(CutModel.load(tmp_path))
    assert type(joined) is type(model)
    assert torch.equal(joined(**text()).logits, expected)
    state = joined.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_bf16_teacher_stays_bf16(tmp_path):
    build("llama").save_pretrained(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype="bfloat16")
    cut(model, 2).save(tmp_path)
    logits = CutModel.load(tmp_path)(**text()).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, model(**text()).logits)


def test_cutting_copies_no_weights():
    model = build("llama-tied")
    whole = cut(model, 2)
    assert whole.stages[0].blocks[0] is model.model.layers[0]
    assert whole.frame.model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert len(model.model.layers) == BLOCKS


def test_boundaries_are_the_hidden_states_between_stages(teacher):
    batch = text()
    with torch.no_grad():
        output = teacher(**batch)
        assert len(output.boundaries) == 4
        for stage in range(3):
            assert torch.equal(teacher.until(batch, stage), output.boundaries[stage])
            assert torch.equal(teacher.after(batch, stage, output.boundaries[stage + 1]), output.logits)


def test_a_stage_is_read_without_the_others(teacher, tmp_path):
    teacher.save(tmp_path)
    kept = stage_directory(tmp_path, 1)
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file() and path.parent != kept:
            path.unlink()
    stage = Stage.load(kept)
    assert (stage.spec.start, stage.spec.stop) == (1, 4)
    for name, tensor in teacher.stages[1].state_dict().items():
        assert torch.equal(stage.state_dict()[name], tensor)
    with pytest.raises(FileNotFoundError, match="holds no frame"):
        load_frame(tmp_path / "frame")
    with pytest.raises(FileNotFoundError, match="holds no stage"):
        list(stages_of(tmp_path))


def test_a_missing_stage_is_named(teacher, tmp_path):
    teacher.save(tmp_path)
    for path in stage_directory(tmp_path, 1).iterdir():
        path.unlink()
    stage_directory(tmp_path, 1).rmdir()
    with pytest.raises(ValueError, match="stages 1 of 3 are missing"):
        CutModel.load(tmp_path)


def test_stages_of_different_cuts_are_refused(teacher):
    other = cut(build("llama"), 3)
    with pytest.raises(ValueError, match="begins at block 2, and stage 0 of 3 ends at block 1.*different cuts"):
        CutModel(teacher.frame, [teacher.stages[0], other.stages[1], other.stages[2]])
    with pytest.raises(ValueError, match=r"stages \[1, 0, 2\] must be 0 to 2 in order"):
        CutModel(teacher.frame, [teacher.stages[i] for i in (1, 0, 2)])


def test_balance_by_parameters():
    assert [(s.start, s.stop) for s in cut(build("modmoe-per-layer"), 2, "parameters").specs] == [(0, 3), (3, 5)]
    with pytest.raises(ValueError, match="balance='size'"):
        cut(build("llama"), 2, "size")


def test_what_is_not_one_stack_of_blocks_is_refused():
    model = build("llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:3])
    with pytest.raises(ValueError, match="no list of num_hidden_layers=5 blocks"):
        blocks_name(model)
    with pytest.raises(ValueError, match="'Nonesuch', which is no model class"):
        model_class(LlamaConfig(architectures=["Nonesuch"]))


def test_damaged_stage_files_are_named(teacher, tmp_path):
    teacher.stages[0].save(tmp_path)
    (tmp_path / "stage.json").write_text('{"index": 0}')
    with pytest.raises(ValueError, match="stage.json is damaged"):
        Stage.load(tmp_path)
