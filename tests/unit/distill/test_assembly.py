import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from modmoe import ModMoEForCausalLM
from modmoe.distill.assembly import assemble
from modmoe.distill.meta import build_meta
from modmoe.distill.objective import Objective
from modmoe.distill.pair import StagePair
from modmoe.distill.ranges import stage_specs
from modmoe.distill.stages import CutModel, cut
from modmoe.distill.stitch import principal_projection
from modmoe.distill.student import build_student_stage
from tests.unit.distill.conftest import build, student_config, text


@pytest.fixture(scope="module")
def teacher() -> CutModel:
    return cut(build("llama"), [(0, 1), (1, 4), (4, 5)])


def pairs(teacher: CutModel, stitch: str = "projection", projection=None, **changes) -> list[StagePair]:
    config, meta = student_config(**changes), build_meta(teacher)
    specs = stage_specs([(0, 1), (1, 3), (3, 4)], config.hidden_size)
    stages = [build_student_stage(config, spec, seed=0) for spec in specs]
    return [StagePair(meta, stage, Objective(), stitch=stitch, projection=projection).eval() for stage in stages]


def save(jobs: list[StagePair], path) -> list:
    directories = [path / f"stage_{job.spec.index}" for job in jobs]
    for job, directory in zip(jobs, directories, strict=True):
        job.save(directory)
    return directories


def chained(jobs: list[StagePair]) -> torch.Tensor:
    """Logits of the stages one after another, through their stitches."""
    hidden = None
    for job in jobs:
        output = job.student(text(), job.stitch_in(hidden) if hidden is not None else None)
        hidden = job.stitch_out(output.hidden_states)
    return output.logits


@pytest.mark.parametrize("width", [16, 12])
@torch.no_grad()
def test_the_assembled_model_is_its_stages_in_a_row(teacher, tmp_path, width):
    projection = None if width == 16 else principal_projection([torch.randn(50, 16)], width)
    jobs = pairs(teacher, projection=projection, hidden_size=width, head_dim=width // 2, num_experts=[3, 4, 5, 6])
    assert assemble(save(jobs, tmp_path)[::-1], tmp_path / "whole") is True
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert type(model) is ModMoEForCausalLM
    tolerance = 1e-5 if width == 16 else 1e-4
    torch.testing.assert_close(model(**text()).logits, chained(jobs), atol=tolerance, rtol=tolerance)
    state = model.state_dict()
    for job in jobs:
        for index, layer in enumerate(job.student.model.layers, job.student.spec.start):
            for name, tensor in layer.state_dict().items():
                assert torch.equal(state[f"model.layers.{index}.{name}"], tensor)


@torch.no_grad()
def test_learned_stitches_are_dropped_and_said_to_be(teacher, tmp_path):
    jobs = pairs(teacher, "linear")
    assert assemble(save(jobs, tmp_path), tmp_path / "whole") is False
    model = ModMoEForCausalLM.from_pretrained(tmp_path / "whole")
    assert not torch.allclose(model(**text()).logits, chained(jobs), atol=0.1)


@pytest.mark.parametrize("gone", [[0], [1], [2], [0, 2]])
def test_missing_stages_are_named(teacher, tmp_path, gone):
    directories = save(pairs(teacher), tmp_path)
    kept = [path for index, path in enumerate(directories) if index not in gone]
    with pytest.raises(ValueError, match=f"stages {', '.join(map(str, gone))} of 3 are missing"):
        assemble(kept, tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="nowhere holds no stage"):
        assemble([*kept, tmp_path / "nowhere"], tmp_path / "whole")
    with pytest.raises(ValueError, match="there are no stages"):
        assemble([], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_stages_of_different_students_are_refused(teacher, tmp_path):
    mine = save(pairs(teacher), tmp_path / "mine")
    other = save(pairs(teacher, intermediate_size=6), tmp_path / "other")
    with pytest.raises(ValueError, match="intermediate_size=8 and .* has 6: stages of one student have one config"):
        assemble([mine[0], other[1], mine[2]], tmp_path / "whole")
    with pytest.raises(ValueError, match=r"stages \[0, 1, 1, 2\] must be 0 to 2"):
        assemble([*mine, other[1]], tmp_path / "whole")


def test_stages_that_stop_before_the_last_block_are_refused(teacher, tmp_path):
    directories = save(pairs(teacher), tmp_path)
    for path in directories:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(ValueError, match=r"hold blocks 0 to 4 .*num_hidden_layers=7"):
        assemble(directories, tmp_path / "whole")


def test_different_projections_are_refused(teacher, tmp_path):
    one, other = (principal_projection([torch.randn(50, 16)], 12) for _ in range(2))
    changes = {"hidden_size": 12, "head_dim": 6}
    mine = save(pairs(teacher, projection=one, **changes), tmp_path / "mine")
    theirs = save(pairs(teacher, projection=other, **changes), tmp_path / "theirs")
    with pytest.raises(ValueError, match="differs from that of an earlier stage.*one projection"):
        assemble([mine[0], theirs[1], mine[2]], tmp_path / "whole")
