"""A whole distillation at toy size: results, what stays as it is, resuming, one stage alone, several at a time."""

import copy
import hashlib
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modmoe.distill.cache import SignalCache
from modmoe.distill.meta import HybridReport
from modmoe.distill.stages import CutModel, Stage, cut
from modmoe.training.callbacks import Stop, read_metrics
from modmoe.training.distillation import run as running
from modmoe.training.distillation.places import Places
from modmoe.training.distillation.run import distill
from modmoe.training.distillation.trainer import JobTrainer
from modmoe.training.errors import ConfigError, RunError
from tests.unit.training.distillation.conftest import SCRIPT, VOCABULARY

STAGES = (0, 1)


def weights(output_dir: Path, stage: int) -> dict[str, torch.Tensor]:
    return load_file(Places(output_dir).pair_run(stage) / "final" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def digests(directory: Path) -> dict[str, str]:
    files = sorted(directory.rglob("*.safetensors"))
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- All phases ----


def test_the_student_is_a_directory_that_auto_classes_load(finished, teacher):
    final = Places(finished).finetuning_run / "final"
    student = AutoModelForCausalLM.from_pretrained(final)
    assert student.config.model_type == "modmoe"
    assert student.config.vocab_size == VOCABULARY
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(teacher).get_vocab()


def test_the_assembled_student_has_the_weights_of_its_stages(finished):
    whole = load_file(Places(finished).student / "model.safetensors")
    first, last = (weights(finished, stage) for stage in STAGES)
    assert whole["model.embed_tokens.weight"].equal(first["model.embed_tokens.weight"])
    assert whole["lm_head.weight"].equal(last["lm_head.weight"])
    for stage, own in enumerate((first, last)):
        name = "mlp.experts.down_proj"
        assert whole[f"model.layers.{stage}.{name}"].equal(own[f"model.layers.0.{name}"])


def test_results_say_what_every_phase_cost_and_reached(finished):
    results = json.loads(Places(finished).results.read_text())
    assert list(results["phases"]) == ["meta model", "stage 0", "stage 1", "end to end"]
    step = 4 * 16
    assert [entry["tokens"] for entry in results["phases"].values()] == [3 * step, 4 * step, 4 * step, 4 * step]
    assert results["student_tokens"] == 8 * step
    assert all(entry["wall_seconds"] > 0 and entry["cpu_seconds"] > 0 for entry in results["phases"].values())
    assert all(3 < entry["validation"]["words"] < 8 for entry in results["phases"].values())
    assert [point["tokens"] for point in results["curve"]] == [0, 2 * step, 4 * step]
    assert set(results["hybrids"]["with_teacher_stage"]) == {"0", "1"}


def test_every_phase_leaves_metrics_and_its_losses(finished):
    records = [r for r in read_metrics(Places(finished).pair_run(0) / "metrics.jsonl") if "loss" in r]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["loss"] == pytest.approx(
            10 * record["distillation/hidden"] + 0.01 * record["aux/router"], rel=1e-5
        )
        assert "cross_entropy" not in record
        assert record["router/ffn/max_violation"] >= 0
    records = [r for r in read_metrics(Places(finished).pair_run(1) / "metrics.jsonl") if "loss" in r]
    for record in records:
        parts = 0.5 * record["cross_entropy"] + 0.5 * record["distillation/kl"] + 0.01 * record["aux/router"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    records = [r for r in read_metrics(Places(finished).meta_run / "metrics.jsonl") if "loss" in r]
    for record in records:
        assert record["loss"] == pytest.approx(
            record["distillation/kl"] + 10 * record["distillation/hidden"], rel=1e-5
        )


def test_what_is_done_is_not_done_again(finished, make, caplog):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    with caplog.at_level("INFO"):
        assert distill(make(finished), SCRIPT) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == before
    assert [record.message.partition(":")[0] for record in caplog.records if "done already" in record.message] == [
        "meta model",
        "stage 0",
        "stage 1",
        "end to end",
    ]


# ---- One stage alone ----


@pytest.mark.parametrize("local", [True, False])
def test_a_stage_trains_where_the_rest_of_the_teacher_never_was(unfinished, finished, make, monkeypatch, local):
    """Nor the teacher's own directory; weights are those of the run that had everything."""
    shutil.rmtree(Places(unfinished).teacher_stage(1))
    trained = []
    finish = JobTrainer.save_final
    monkeypatch.setattr(JobTrainer, "save_final", lambda self, path: trained.append(self.model) or finish(self, path))
    before = digests(unfinished)
    changes = {"teacher": "nowhere", "tokenizer": {"name": "nowhere"}, "stage": 0, "distillation.pairs.local": local}
    assert distill(make(unfinished, changes), SCRIPT) == 0
    if local:
        assert_same(weights(unfinished, 0), weights(finished, 0))
    assert before.items() <= digests(unfinished).items()
    # Teacher and meta model are what they were, in memory too, also where a gradient went through the latter's end.
    (job,) = trained
    meta, stage = CutModel.load(Places(unfinished).meta), Stage.load(Places(unfinished).teacher_stage(0))
    assert_same(dict(job.task.frozen.meta.named_parameters()), dict(meta.named_parameters()))
    assert_same(dict(job.task.frozen.teacher_net.stages[0].named_parameters()), dict(stage.named_parameters()))


def test_a_stage_needs_what_the_phases_before_it_leave(unfinished, make, tmp_path):
    with pytest.raises(ConfigError, match="holds no teacher that was cut: run the same command without --stage first"):
        distill(make(tmp_path / "empty", {"stage": 0}), SCRIPT)
    shutil.rmtree(Places(unfinished).teacher_stage(1))
    with pytest.raises(ConfigError, match="stage 1: .*stage_01 holds no stage"):
        distill(make(unfinished, {"stage": 1}), SCRIPT)
    Places(unfinished).hybrids.unlink()
    with pytest.raises(ConfigError, match=r"hybrids\.json is missing or of other .*: run .* without --stage first"):
        distill(make(unfinished, {"stage": 0}), SCRIPT)


def test_parts_of_another_teacher_are_refused(unfinished, make):
    """As after copying them to the machine of one stage from the wrong place."""
    file = Places(unfinished).teacher_stage(1) / "model.safetensors"
    whole = file.read_bytes()
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match=r"stage_01 is not what was cut \(.*other values.*\): copy it again from"):
        distill(make(unfinished, {"stage": 0}), SCRIPT)
    file.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match=r"stage_01 is not what was cut \(.*is damaged or truncated"):
        distill(make(unfinished, {"stage": 0}), SCRIPT)


def interrupted(run, monkeypatch) -> int:
    """The exit code of a run that is sent a signal before its first step."""
    agree = Stop._agree

    def signalled(stop: Stop) -> None:
        stop._requested = 143
        agree(stop)

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "_agree", signalled)
        code = distill(run, SCRIPT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return code


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_goes_on_where_it_stopped(unfinished, finished, make, monkeypatch, stage):
    run = make(unfinished, {"stage": stage})
    assert interrupted(run, monkeypatch) == 143
    assert not (Places(unfinished).pair_run(stage) / "final").exists()
    assert distill(run, SCRIPT) == 0
    assert_same(weights(unfinished, stage), weights(finished, stage))
    steps = [r["step"] for r in read_metrics(Places(unfinished).pair_run(stage) / "metrics.jsonl") if "loss" in r]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("changes", [{"seed": 1}, {"distillation.meta.optimization": {"steps": 5}}])
def test_a_stage_is_not_trained_in_the_meta_model_of_another_configuration(unfinished, make, changes):
    with pytest.raises(ConfigError, match="out/meta holds checkpoints or the final model of another run"):
        distill(make(unfinished, {"stage": 0} | changes), SCRIPT)
    with pytest.raises(ConfigError, match="out/meta does not hold what this configuration makes there: run the same"):
        distill(make(unfinished, {"stage": 0, "overwrite_output": True} | changes), SCRIPT)
    assert not Places(unfinished).pair_run(0).exists()


def test_hybrids_are_measured_again_on_other_blocks(finished, make, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = json.loads(Places(out).hybrids.read_text())
    assert distill(make(out, {"distillation.hybrids.blocks_per_domain": 2}), SCRIPT) == 0
    after = json.loads(Places(out).hybrids.read_text())
    assert after["num_tokens"] < before["num_tokens"]


# ---- Several at a time ----


def test_stages_trained_in_parallel_are_those_trained_one_after_another(finished, make, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # arithmetic depends on their number
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("stages"))
    monkeypatch.setattr(running, "Jobs", _at_once(running.Jobs))
    assert distill(make(out, {"jobs": 2}), SCRIPT) == 0
    for stage in STAGES:
        assert_same(weights(out, stage), weights(finished, stage))
    printed = capsys.readouterr().out
    for stage in STAGES:
        assert f"stage {stage}: starting\n" in printed
        assert f"stage {stage}: finished\n" in printed
        assert "4 steps of 64 tokens" in (Places(out).pair_run(stage) / "log.txt").read_text()


def _at_once(jobs):
    """Makes sure that both were running at some time."""

    class Watched(jobs):
        def run(self, stages):
            seen = []
            start = self._start
            self._start = lambda stage: (start(stage), seen.append(len(self._running)))
            code = super().run(stages)
            assert max(seen) == 2
            return code

    return Watched


# ---- Other ways ----


@pytest.mark.parametrize("stage", [0, 1])
def test_cached_signals_teach_what_the_teacher_teaches(make, tmp_path, stage):
    """With the whole vocabulary, and with blocks that come again in a later epoch."""
    losses = []
    objective = {"hidden_weight": 1.0, "relation_weight": 1.0, "relation_heads": 2}
    changes = {"distillation.pairs.objective": objective, "data.sources.0.max_bytes": 1500}
    changes |= {"distillation.pairs.optimization": {"steps": 16}, "optimization.steps": 3}
    changes |= {"distillation.meta.optimization": {}}
    for out, cache in ((tmp_path / "on line", False), (tmp_path / "cached", True)):
        if cache:
            shutil.copytree(tmp_path / "on line", out, ignore=shutil.ignore_patterns("stages"))
            changes["stage"] = stage
        changes["distillation.pairs.signals"] = {"cache": cache, "top_k": VOCABULARY}
        assert distill(make(out, changes), SCRIPT) == 0
        losses.append([r["loss"] for r in read_metrics(Places(out).pair_run(stage) / "metrics.jsonl") if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    content = json.loads((Places(out).pair_run(stage) / "signals" / "cache.json").read_text())
    assert content["ends"][-1] < 16 * 4


CACHED = {"stage": 1, "distillation.pairs.signals": {"cache": True, "top_k": 16}}


def signals_on_disk(out):
    """Of every example, in order."""
    files = sorted((Places(out).pair_run(1) / "signals").glob("*.safetensors"))
    parts = [load_file(file) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_a_cache_is_written_on_in_batches_of_another_size(unfinished, make, monkeypatch):
    append = SignalCache.append

    def die(cache, signals):
        if len(cache) == 4:
            raise KeyboardInterrupt
        append(cache, signals)

    whole = shutil.copytree(unfinished, unfinished.with_name("whole"))
    assert distill(make(whole, CACHED), SCRIPT) == 0
    monkeypatch.setattr(SignalCache, "append", die)
    with pytest.raises(KeyboardInterrupt):
        distill(make(unfinished, CACHED), SCRIPT)
    monkeypatch.setattr(SignalCache, "append", append)
    ones = {"optimization.micro_batch_size": 1, "optimization.gradient_accumulation": 4}
    assert distill(make(unfinished, CACHED | ones), SCRIPT) == 0
    expected = signals_on_disk(whole)
    for name, tensor in signals_on_disk(unfinished).items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_cache_is_that_of_the_meta_model_as_it_is(unfinished, make):
    """Another one makes it worthless: refused, and written again where the run may overwrite what it finds."""
    assert distill(make(unfinished, CACHED), SCRIPT) == 0
    before = signals_on_disk(unfinished)
    shutil.rmtree(Places(unfinished).pair_run(1) / "final")
    for checkpoint in Places(unfinished).pair_run(1).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    weights_file = Places(unfinished).meta / "stage_00" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights_file).items()}, weights_file)
    with pytest.raises(ConfigError, match="was written for meta=.* --overwrite_output true"):
        distill(make(unfinished, CACHED), SCRIPT)
    assert distill(make(unfinished, CACHED | {"overwrite_output": True}), SCRIPT) == 0
    assert not signals_on_disk(unfinished)["boundary_1"].equal(before["boundary_1"])


def test_a_projection_that_was_left_behind_is_of_no_meaning_to_linear_stitches(unfinished, make):
    linear = {"stage": 0, "distillation.pairs.stitch": "linear", "distillation.initialization.ffn": "fresh"}
    linear |= {"distillation.pairs.optimization": {"steps": 1}}
    fresh = shutil.copytree(unfinished, unfinished.with_name("fresh"))
    Places(fresh).projection.unlink()
    for out in (unfinished, fresh):
        assert distill(make(out, linear), SCRIPT) == 0
    assert_same(weights(unfinished, 0), weights(fresh, 0))


def test_a_projection_is_that_of_the_runs_text_and_seed(unfinished, make):
    path = Places(unfinished).projection
    digests_of = {}
    for seed in (0, 0, 1):
        distillation = running.Distillation(make(unfinished, {"seed": seed}), SCRIPT)
        distillation._open_teacher()
        distillation._project()
        digests_of.setdefault(seed, set()).add(path.read_bytes())
    assert [len(found) for found in digests_of.values()] == [1, 1]
    assert digests_of[0] != digests_of[1]


def test_a_stage_needs_the_projection(unfinished, make):
    with pytest.raises(ConfigError, match=r"projection.safetensors is missing, or of other data, another seed"):
        distill(
            make(unfinished, {"stage": 0, "seed": 7, "distillation.meta.method": "teacher", "distillation.meta": {}}),
            SCRIPT,
        )
    Places(unfinished).projection.unlink()
    with pytest.raises(
        ConfigError, match=r"projection.safetensors is missing.*: run the same command without --stage"
    ):
        distill(make(unfinished, {"stage": 0}), SCRIPT)


def test_stages_are_taught_in_the_teacher_itself(make, tmp_path, finished, monkeypatch):
    changes = {"distillation.meta": {}}
    assert distill(make(tmp_path / "out", changes), SCRIPT) == 0
    places = Places(tmp_path / "out")
    assert list(json.loads(places.results.read_text())["phases"]) == ["stage 0", "stage 1", "end to end"]
    assert not places.meta_run.exists()
    assert not weights(places.root, 1)["model.layers.0.mlp.experts.down_proj"].equal(
        weights(finished, 1)["model.layers.0.mlp.experts.down_proj"]
    )
    # A stage alone needs nothing but the teacher that was cut, which stays as it is, also when it is interrupted.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(places.teacher, Places(elsewhere).teacher)
    for stage in STAGES:
        run = make(elsewhere, changes | {"stage": stage, "teacher": "nowhere"})
        assert interrupted(run, monkeypatch) == 143
        assert distill(run, SCRIPT) == 0
        assert_same(weights(elsewhere, stage), weights(places.root, stage))
    assert digests(Places(elsewhere).teacher) == digests(places.teacher)
    # Copied back, what was trained there is not trained again.
    shutil.rmtree(places.pair_run(1))
    shutil.copytree(Places(elsewhere).pair_run(1), places.pair_run(1))
    shutil.rmtree(places.finetuning_run)
    before = digests(places.pair_run(1))
    assert distill(make(places.root, changes), SCRIPT) == 0
    assert digests(places.pair_run(1)) == before


def test_incubated_stages_teach(make, tmp_path):
    changes = {"distillation.meta.method": "incubate", "distillation.pairs.stitch": "linear", "optimization.steps": 1}
    changes |= {"distillation.initialization.ffn": "fresh", "distillation.meta.optimization": {}}
    assert distill(make(tmp_path / "out", changes), SCRIPT) == 0
    places = Places(tmp_path / "out")
    before = load_file(places.teacher_stage(0) / "model.safetensors")
    after = load_file(places.incubation_run(0) / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(tensor.equal(after[name]) for name, tensor in before.items() if tensor.ndim > 1)
    assert not places.projection.exists()
    assert list(json.loads(places.results.read_text())["phases"])[:3] == [
        "meta model",
        "teacher stage 0",
        "teacher stage 1",
    ]


def test_baselines_start_as_they_say(make, tmp_path):
    """ "upcycle" as the pairs do, the others fresh; all with the same steps on the same text."""
    starts = {}
    for method in ("scratch", "logit_kd", "upcycle"):
        out = tmp_path / method
        assert distill(make(out, {"distillation.method": method, "optimization.steps": 2}), SCRIPT) == 0
        starts[method] = load_file(Places(out).student / "model.safetensors")
        results = json.loads(Places(out).results.read_text())
        assert (list(results["phases"]), results["tokens"]) == (["end to end"], 2 * 4 * 16)
        records = read_metrics(Places(out).finetuning_run / "metrics.jsonl")
        assert any("distillation/kl" in record for record in records) == (method == "logit_kd")
        assert not (out / "meta").exists()
    assert_same(starts["scratch"], starts["logit_kd"])
    name = "model.layers.1.mlp.experts.down_proj"
    assert not starts["scratch"][name].equal(starts["upcycle"][name])
    attention = "model.layers.1.self_attn.experts.q_proj.weight"
    assert starts["scratch"][attention].equal(starts["upcycle"][attention])


def test_tokens_are_counted_to_the_last_step(make, tmp_path):
    """Also where no record of metrics is of that."""
    changes = {"distillation.method": "scratch", "logging.interval": 3, "evaluation.interval": 0}
    assert distill(make(tmp_path / "out", changes), SCRIPT) == 0
    assert json.loads(Places(tmp_path / "out").results.read_text())["tokens"] == 4 * 4 * 16


# ---- Mistakes ----


def test_hybrids_that_are_worse_are_refused_unless_forced(unfinished, make, monkeypatch):
    report = HybridReport(100, 3.0, {0: 2.9, 1: 3.2})
    monkeypatch.setattr(running, "read_hybrids", lambda *_: report)
    for stage in (None, 0):
        with pytest.raises(RunError, match=r"worse inside the meta model .* \(cross entropy 3.0000 .*stage 1: 3.2000"):
            distill(make(unfinished, {"stage": stage, "distillation.hybrids.force": False}), SCRIPT)
    assert not Places(unfinished).pair_run(0).exists()


def test_a_missing_stage_is_named_at_assembly(finished, make, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("student", "finetuned"))
    shutil.rmtree(Places(out).pair_run(1) / "final")
    monkeypatch.setattr(running.Distillation, "_pair", lambda *_: 0)
    with pytest.raises(ConfigError, match="cannot assemble the student: .*stages/1/final holds no stage"):
        distill(make(out), SCRIPT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distillation.pairs.objective.alpha": 0.2},
            r"stages/0 holds checkpoints .*pairs.objective.alpha is 0.5 there",
        ),
        ({"distillation.meta.replace": 0.1}, r"out/meta holds checkpoints .*distillation.meta.replace is 0.5 there"),
        ({"distillation.stages.balance": "parameters"}, "another teacher or cut .*balance is 'blocks' there"),
        ({"optimization.steps": 5}, r"out/meta|stages/0 holds .*optimization.steps is 4 there and 5 here"),
    ],
)
def test_another_distillation_in_the_same_directory_is_refused(finished, make, changes, message):
    with pytest.raises(ConfigError, match=message):
        distill(make(finished, changes), SCRIPT)


def test_overwriting_does_again_what_has_changed_and_what_rests_on_it(finished, make, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = digests(out)
    changes = {"distillation.pairs.objective.alpha": 0.2, "overwrite_output": True, "evaluation.interval": 0}
    assert distill(make(out, changes), SCRIPT) == 0
    after = digests(out)
    changed = {name.split("/")[0] for name in before if after.get(name) != before[name]}
    assert changed == {"stages", "student", "finetuned"}
    assert after["stages/0/final/stitches.safetensors"] == before["stages/0/final/stitches.safetensors"]


def test_another_teacher_in_the_same_directory_is_refused(finished, make, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ConfigError, match=r"another teacher or cut \(the model in .*other has changed\)"):
        distill(make(finished, {"teacher": str(other)}), SCRIPT)


def test_another_teacher_of_the_hub_is_refused(unfinished, make, teacher):
    """Whose weights are not at hand: its name tells."""
    path = Places(unfinished).teacher / "cut.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": "some/model", "source": None}))
    changes = {"teacher": "other/model", "tokenizer": {"name": str(teacher)}}
    with pytest.raises(ConfigError, match="teacher is 'some/model' there and 'other/model' here"):
        distill(make(unfinished, changes), SCRIPT)


def test_a_teacher_that_is_no_match_for_text_or_tokenizer_is_refused(make, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    with pytest.raises(ConfigError, match="data.sequence_length=16 is more than the 8 positions"):
        distill(make(tmp_path / "long", {"teacher": str(other)}), SCRIPT)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match=f"teacher: its tokenizer has {VOCABULARY + 1} tokens and it knows 280"):
        distill(make(tmp_path / "added", {"teacher": str(other)}), SCRIPT)


def test_a_full_disk_is_told(make, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(RunError, match=r"could not write .*out/teacher: .*free"):
            distill(make(tmp_path / "out"), SCRIPT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "no/where/at/all"}, "tokenizer: .*no/where/at/all"),
        ({"distillation.stages.count": 5, "model.num_hidden_layers": 5}, "distillation.stages: num_stages=5 must be "),
        ({"distillation.stages.ranges": [[0, 1], [2, 4]]}, "distillation.stages: stage 1 is the range 2..4"),
        (
            {"model.hidden_size": 32},
            "model.hidden_size=32 is more than the teacher's 16: stitches of kind 'projection'",
        ),
        ({"model.vocab_size": 300}, "model.vocab_size=300, and the teacher predicts 280 tokens"),
        ({"tokenizer": {"vocab_size": 290}}, "reads with the teacher's tokenizer: remove the section 'tokenizer'"),
        ({"distillation.meta.layers_per_stage": 3}, "distillation.meta: layers_per_stage=3 must be between 1 and"),
        (
            {"distillation.initialization.ffn": "copy"},
            "distillation.initialization: ffn='copy' makes of the teacher's",
        ),
        (
            {"finetuning.teacher": {"hidden_weight": 1.0}},
            "hidden_weight=1.0 compares every block, .* 4 of width 16, .* 2 of",
        ),
        (
            {"distillation.pairs.objective": {"relation_weight": 1.0, "relation_heads": 3}},
            "relation_heads=3 must divide the widths of teacher and student, 16 and 8",
        ),
    ],
)
def test_what_does_not_fit_the_teacher_is_refused(make, tmp_path, changes, message):
    changes = {"distillation.meta.optimization": {"steps": 1}, **changes}
    with pytest.raises(ConfigError, match=message):
        distill(make(tmp_path / "out", changes), SCRIPT)


def test_a_model_that_is_more_than_its_blocks_is_refused(make, tmp_path, monkeypatch):
    """As if blocks were given inputs of their own: the parts compute something else."""

    def cut_wrongly(model, *options):
        parts = cut(copy.deepcopy(model), *options)
        with torch.no_grad():
            next(parts.stages[1].parameters()).mul_(2)
        return parts

    monkeypatch.setattr("modmoe.training.distillation.teacher.cut", cut_wrongly)
    with pytest.raises(ConfigError, match="stages of this LlamaForCausalLM do not compute what the model does"):
        distill(make(tmp_path / "wrong"), SCRIPT)
    monkeypatch.setattr("modmoe.training.distillation.teacher.cut", lambda model, *_: model.config.no_such_field)
    with pytest.raises(ConfigError, match="a LlamaForCausalLM cannot be cut into stages .AttributeError"):
        distill(make(tmp_path / "foreign"), SCRIPT)
    assert not (tmp_path / "foreign" / "teacher").exists()


def test_another_tokenizer_is_refused(make, tmp_path, teacher, unfinished):
    other = shutil.copytree(teacher, tmp_path / "tokenizer")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    for out in (tmp_path / "out", unfinished):
        with pytest.raises(ConfigError, match="different tokenizers: 2 tokens differ"):
            distill(make(out, {"tokenizer": {"name": str(other)}}), SCRIPT)


def test_a_cache_that_would_be_too_large_is_refused_before_it_is_written(unfinished, make):
    signals = {"cache": True, "top_k": 16, "max_bytes": 1000}
    with pytest.raises(ConfigError, match="16 blocks of 16 tokens need .* bytes, and max_bytes=1,000: raise it"):
        distill(make(unfinished, {"stage": 1, "distillation.pairs.signals": signals}), SCRIPT)
