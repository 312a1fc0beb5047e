"""What a distillation's YAML file may say."""

import pytest

from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.phase_runs import PhaseRuns
from modmoe.training.distillation.places import Places
from modmoe.training.errors import ConfigError
from modmoe.training.run_config import load_run_config
from tests.launching import ROOT


@pytest.mark.parametrize("name", ["quickstart", "tiny_test"])
def test_the_configs_that_come_along_are_sound(name):
    run = load_run_config(ROOT / "configs" / "distill" / f"{name}.yaml", [], DistillRun)
    assert run.tokenizer.name == run.teacher
    assert len(run.student_ranges()) == run.distillation.stages.number


def test_the_teacher_of_the_quickstart_is_the_one_that_its_config_makes():
    quickstart = load_run_config(ROOT / "configs" / "distill" / "quickstart.yaml", [], DistillRun)
    teacher = load_run_config(ROOT / "configs" / "distill" / "teacher.yaml")
    assert quickstart.teacher == f"{teacher.output_dir}/final"
    assert teacher.model["num_experts"] == teacher.model["num_attn_experts"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distillation.pairs.objective.alpha": 1.5},
            r"pairs.objective.alpha: .* or equal to 1, got 1.5",
        ),
        ({"distillation.pairs.objective.temperature": 0}, r"objective.temperature: .* greater than 0, got 0"),
        ({"distillation.pairs.objective.tau": 2}, r"unknown key distillation.pairs.objective.tau"),
        ({"stage": 2}, "stage=2 must be between 0 and 1: there are 2"),
        ({"stage": -1}, "stage: input should be greater than or equal to 0, got -1"),
        ({"jobs": 0}, "jobs: input should be greater than or equal to 1, got 0"),
        ({"init": "runs/x"}, "remove init='runs/x'"),
        ({"model.tie_word_embeddings": True}, "model.tie_word_embeddings: the first and the last stage are trained"),
        ({"distillation.stages.count": 3}, "distillation.stages: num_stages=3 must be between 1 and the number of bl"),
        ({"distillation.stages.student_ranges": [[0, 2]]}, "student_ranges are 1 stages and the teacher has 2"),
        ({"distillation.stages.student_ranges": [[0, 1], [0, 2]]}, "stage 1 is the range 0..2"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "set expert_parallel_size to 1 and deepspeed.zero"),
        ({"finetuning.method": "lora"}, "finetuning here is of the whole student"),
        (
            {"distillation.meta.optimization": {"rate": 1}},
            r"distillation.meta.optimization.rate: extra inputs",
        ),
        ({"distillation.pairs.optimization": {"learning_rate": -1}}, "pairs.optimization.learning_rate: input should"),
        (
            {"distillation.pairs.objective.hidden_weight": 0},
            "objective.hidden_weight=0.0, and local pairs learn from hidden states alone: set it above 0, or dist",
        ),
        (
            {"distillation.meta": {"layers_per_stage": 2}},
            "distillation.meta.layers_per_stage is given, and method 'teacher' has no meta model: set distillation.me",
        ),
        (
            {"distillation.method": "m2m"},
            "distillation.method: input should be 'modules', 'scratch', 'logit_kd' or ",
        ),
    ],
)
def test_mistakes_are_named(make, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, changes)


def test_phases_take_the_last_ones_optimization_unless_told_otherwise(make, tmp_path):
    changes = {"optimization.weight_decay": 0.3, "distillation.meta.optimization": {"tokens": 640}}
    runs = PhaseRuns(make(tmp_path, changes), Places(tmp_path), "teacher")
    assert (runs.pair(0).optimization.steps, runs.pair(0).optimization.weight_decay) == (4, 0.3)
    assert (runs.meta().optimization.steps, runs.meta().optimization.tokens) == (None, 640)
    assert runs.meta().optimization.weight_decay == 0.3


def test_only_what_a_phase_depends_on_makes_it_another(make, tmp_path):
    def runs(changes):
        return PhaseRuns(make(tmp_path, changes), Places(tmp_path), "teacher")

    plain = runs({})
    other = runs(
        {"distillation.pairs.objective.alpha": 0.1, "optimization.steps": 9, "distillation.meta.optimization": {}}
    )
    assert plain.meta().distillation == other.meta().distillation
    assert plain.pair(0).distillation != other.pair(0).distillation
    assert plain.pair(0).distillation != plain.pair(1).distillation
    assert plain.end_to_end().distillation != other.end_to_end().distillation
    forced = runs({"distillation.hybrids.force": False, "distillation.pairs.signals.max_bytes": 5, "jobs": 3})
    assert plain.pair(0) == forced.pair(0)


@pytest.mark.parametrize(
    ("method", "weight"),
    [("modules", 0.5), ("logit_kd", 0.5), ("scratch", None), ("upcycle", None)],
)
def test_the_whole_teacher_teaches_where_the_method_says_so(make, tmp_path, method, weight):
    run = make(tmp_path, {"distillation.method": method})
    teacher = run.end_to_end.teacher
    assert (teacher and (teacher.path, teacher.weight)) == (weight and (run.teacher, weight))
    alone = make(tmp_path, {"distillation.method": method, "finetuning.teacher": None}).end_to_end.teacher
    assert (alone is not None) == (method == "logit_kd")
