"""A distillation from the teacher to the fine-tuned student: phases, each skipped if it is done."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers import PreTrainedTokenizerFast
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modmoe.distill.meta import PRETRAIN, HybridReport, Incubation, MetaFit, build_meta
from modmoe.distill.pair import StagePair
from modmoe.distill.seeds import stage_random_state
from modmoe.distill.stages import CutModel, Stage, load_frame
from modmoe.surgery.fingerprint import checkpoint_fingerprint
from modmoe.training.checkpoints.output_dir import FINAL, claim_output_dir, is_finished, locked, save_run_file
from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.costs import measured
from modmoe.training.distillation.hybrids import (
    check_hybrids,
    has_projection,
    hybrid_table,
    measure_hybrids,
    projection_basis,
    read_hybrids,
    write_projection,
)
from modmoe.training.distillation.job import Job
from modmoe.training.distillation.jobs import Jobs, ProgressView
from modmoe.training.distillation.phase_runs import EndToEndRun, ModuleRun, PhaseRuns
from modmoe.training.distillation.places import Places
from modmoe.training.distillation.results import results_table, write_results
from modmoe.training.distillation.signals import CachedSignals
from modmoe.training.distillation.student import (
    assemble_student,
    load_projection,
    started_stage,
    untrained_student,
    wants_projection,
)
from modmoe.training.distillation.teacher import (
    CutTeacher,
    cut_teacher,
    open_teacher,
    part_fingerprints,
    parts_identity,
)
from modmoe.training.distillation.trainer import JobTrainer
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.run import finetune
from modmoe.training.pretraining import Build, carry_out, prepare_run_data
from modmoe.training.ranks.bootstrap import is_main_process, world_size
from modmoe.training.ranks.team import join
from modmoe.training.ranks.watchdog import Watchdog
from modmoe.training.run_config import RunConfig

logger = logging.getLogger(__name__)

_STEP_SECONDS = 4 * 3600  # that other processes wait while the first one measures


def distill(run: DistillRun, script: Path) -> int:
    """
    Carry a distillation out, or one of its pairs.

    Args:
        run: the configuration.
        script: the entry point, for processes that train one pair each.

    Returns:
        the exit code: 0, or 128 + the number of the signal that interrupted training.

    Raises:
        ConfigError: for mistakes in the configuration, the teacher or the data.
        RunError: if hybrids are worse than the meta model, something cannot be written, or training diverges.
    """
    return Distillation(run, script).run()


class Distillation:
    """
    The phases of a run.

    Args:
        run: the configuration.
        script: the entry point.
    """

    def __init__(self, run: DistillRun, script: Path) -> None:
        self._run = run
        self._script = script
        self._places = Places(run.output_dir)
        self._stages = range(run.distillation.stages.number)
        self._cut: CutTeacher
        self._runs: PhaseRuns

    def run(self) -> int:
        """See `distill`."""
        run = self._run
        if run.stage is not None:
            return self._one_pair(run.stage)
        if run.jobs > 1 and world_size() > 1:
            raise ConfigError(
                f"jobs={run.jobs} starts processes of its own: start it as one process, not {world_size()}, or leave "
                "jobs at 1"
            )
        if world_size() > 1:
            return self._phases()
        with locked(run.output_dir):
            return self._phases()

    def _phases(self) -> int:
        self._first_process("cut", self._begin)
        self._open_teacher()
        phases: dict[str, RunConfig] = {"end to end": self._runs.end_to_end()}
        if self._run.distillation.method == "modules":
            code = self._modules()
            phases = {**self._module_runs(), **phases}
        else:
            code = self._baseline()
        code = code or self._end_to_end()
        if code == 0:
            self._first_process("results", lambda: self._report(phases))
        return code

    def _begin(self) -> None:
        claim_output_dir(self._run)  # which may be that of another kind of run
        cut_teacher(self._run, self._places)
        save_run_file(self._run, self._run.output_dir, {"processes": world_size()})

    def _open_teacher(self) -> None:
        self._cut = open_teacher(self._run, self._places)
        self._runs = PhaseRuns(self._run, self._places, self._cut.identity)

    # ---- Module by module ----

    def _module_runs(self) -> dict[str, RunConfig]:
        runs: dict[str, RunConfig] = {"meta model": self._runs.meta()} if self._has_meta else {}
        if self._incubates:
            runs |= {f"teacher stage {i}": self._runs.incubation(i) for i in self._stages}
        return runs | {f"stage {i}": self._runs.pair(i) for i in self._stages}

    @property
    def _has_meta(self) -> bool:
        return self._run.distillation.meta.method != "teacher"

    @property
    def _surroundings(self) -> Path:
        """The model that pairs are trained in."""
        return self._places.meta if self._has_meta else self._places.teacher

    @property
    def _incubates(self) -> bool:
        return self._run.distillation.meta.method == "incubate"

    def _modules(self) -> int:
        self._first_process("projection", self._project)
        return (self._meta_model() if self._has_meta else 0) or self._pairs()

    def _meta_model(self) -> int:
        code = self._train(self._runs.meta(), self._build_meta, "meta model", forget_hybrids=True)
        for index in self._stages if self._incubates else ():
            code = code or self._train(
                self._runs.incubation(index), self._build_incubation(index), f"teacher stage {index}", True
            )
        if code == 0:
            self._first_process("hybrids", self._measure)
        return code

    def _project(self) -> None:
        if not wants_projection(self._run, self._cut):
            return
        if not self._has_projection():
            width = self._cut.student.hidden_size
            basis = projection_basis(self._run, width)
            data = prepare_run_data(self._runs.pair(0))
            write_projection(self._places, data, width, self._run.optimization.micro_batch_size, basis)

    def _has_projection(self) -> bool:
        return has_projection(self._places, projection_basis(self._run, self._cut.student.hidden_size))

    def _measure(self) -> None:
        report = read_hybrids(self._run, self._places)
        if report is None:
            data = prepare_run_data(self._runs.meta())
            with measured(self._places.meta_run):
                report = measure_hybrids(self._run, self._places, data, self._teacher_stages())
        print(hybrid_table(report), flush=True)
        check_hybrids(report, self._run.distillation.hybrids.force)

    def _teacher_stages(self) -> Iterator[Stage]:
        return (Stage.load(self._teacher_stage(index)) for index in self._stages)

    def _teacher_stage(self, index: int) -> Path:
        """The stage that teaches."""
        if self._incubates:
            return self._places.incubation_run(index) / FINAL
        return self._places.teacher_stage(index)

    def _pairs(self) -> int:
        if self._run.jobs == 1:
            for index in self._stages:
                code = self._pair(index)
                if code:
                    return code
            return 0
        missing = [index for index in self._stages if not is_finished(self._runs.pair(index))]
        config = self._run.output_dir / "run.yaml"
        jobs = Jobs(
            lambda index: [sys.executable, str(self._script), "--config", str(config), "--stage", str(index)],
            self._places.pair_run,
            self._run.jobs,
            ProgressView(missing, sys.stdout),
        )
        return jobs.run(missing)

    def _one_pair(self, index: int) -> int:
        if self._run.distillation.method != "modules":
            raise ConfigError(
                f"stage={index}: method {self._run.distillation.method!r} trains no stages by themselves"
            )
        self._open_teacher()
        if self._has_meta:
            self._check_meta_model(index)
        if wants_projection(self._run, self._cut) and not self._has_projection():
            raise ConfigError(
                f"{self._places.projection} is missing, or of other data, another seed or width: run the same command "
                "without --stage first, or copy the file from where it ran"
            )
        return self._pair(index)

    def _check_meta_model(self, index: int) -> None:
        """
        Raises:
            ConfigError: if what a pair needs of it is not there.
            RunError: if hybrids are worse than it.
        """
        before = [self._runs.meta(), *([self._runs.incubation(index)] if self._incubates else [])]
        for phase in before:
            if not is_finished(phase):
                raise ConfigError(
                    f"{phase.output_dir} does not hold what this configuration makes there: run the same command "
                    "without --stage first, or copy it from where that ran"
                )
        report = read_hybrids(self._run, self._places)
        if report is None:
            raise ConfigError(
                f"{self._places.hybrids} is missing or of other distillation.hybrids.blocks_per_domain: run the same "
                f"command without --stage first, or copy {self._places.meta_run} from where it ran"
            )
        check_hybrids(report, self._run.distillation.hybrids.force)

    def _pair(self, index: int) -> int:
        return self._train(self._runs.pair(index), self._build_pair(index), f"stage {index}")

    # ---- What is trained ----

    def _build_meta(self, run: ModuleRun, tokenizer: PreTrainedTokenizerFast) -> Job:
        section = self._run.distillation.meta
        teacher = CutModel.load(self._places.teacher)
        try:
            meta = build_meta(teacher, section.layers_per_stage, section.initialize, run.seed)
        except ValueError as error:
            raise ConfigError(f"distillation.meta: {error}") from None
        if self._incubates:
            return Job(MetaFit(meta, PRETRAIN), "meta model, from labels")
        fit = MetaFit(meta, section.objective.objective(), teacher, section.replace)
        return Job(fit, "meta model, fitted to the teacher")

    def _build_incubation(self, index: int) -> Build:
        def build(run: ModuleRun, tokenizer: PreTrainedTokenizerFast) -> Job:
            stage = Stage.load(self._places.teacher_stage(index))
            return Job(Incubation(CutModel.load(self._places.meta), stage), f"teacher stage {index} in the meta model")

        return build

    def _build_pair(self, index: int) -> Build:
        def build(run: ModuleRun, tokenizer: PreTrainedTokenizerFast) -> Job:
            try:
                meta = CutModel.load(self._surroundings)
                teacher = Stage.load(self._teacher_stage(index)) if self._has_meta else meta.stages[index]
            except (FileNotFoundError, ValueError) as error:
                raise ConfigError(f"stage {index}: {error}") from None
            return self._pair_job(index, meta, teacher, run)

        return build

    def _pair_job(self, index: int, meta: CutModel, teacher: Stage, run: ModuleRun) -> Job:
        frame = load_frame(self._places.frame)
        student, taken = started_stage(self._run, self._cut, self._places, index, frame, teacher)
        logger.info(
            "stage %d starts with %s", index, f"the teacher's {', '.join(taken)}" if taken else "fresh weights"
        )
        section = self._run.distillation.pairs
        projection = load_projection(self._run, self._cut, self._places)
        with stage_random_state(run.seed, "stitches", index):
            pair = StagePair(
                meta, student, section.objective.objective(), teacher, section.stitch, projection, local=section.local
            )
        signals = None
        if section.signals.cache:
            identity = {
                "teacher": checkpoint_fingerprint(self._teacher_stage(index)),
                "meta": parts_identity(part_fingerprints(self._surroundings)),
                "stage": index,
            }
            directory = run.output_dir / "signals"
            signals = CachedSignals(directory, pair, identity, section.signals.top_k, section.signals.max_bytes)
        return Job(pair, f"stage {index} of {len(self._stages)}", signals)

    # ---- End to end ----

    def _baseline(self) -> int:
        def start() -> None:
            if self._run.distillation.method == "upcycle":
                self._project()
            if self._starts_anew(self._runs.end_to_end()):
                untrained_student(self._run, self._cut, self._places)

        self._first_process("student", start)
        return 0

    def _end_to_end(self) -> int:
        if self._run.distillation.method == "modules":
            self._first_process("assembly", self._assemble)
        run = self._runs.end_to_end()
        if is_finished(run):
            logger.info("end to end: done already, %s", run.output_dir / FINAL)
            return 0
        logger.info("--- end to end ---")
        with measured(run.output_dir):
            return _isolated(lambda: finetune(run))

    def _assemble(self) -> None:
        if not self._starts_anew(self._runs.end_to_end()):
            return
        exact = assemble_student([self._places.pair_run(index) / FINAL for index in self._stages], self._places)
        logger.info("assembled %s%s", self._places.student, "" if exact else "; its stitches are dropped")

    def _starts_anew(self, run: EndToEndRun) -> bool:
        """Whether the last phase neither is finished nor goes on from a checkpoint."""
        return not self._places.student.is_dir() or (not is_finished(run) and claim_output_dir(run) is None)

    def _report(self, phases: dict[str, RunConfig]) -> None:
        report: HybridReport | None = read_hybrids(self._run, self._places) if "meta model" in phases else None
        content = write_results(self._run, self._places, phases, report, world_size())
        print(results_table(content))
        print(f"student: {self._places.finetuning_run / FINAL}; figures: {self._places.results}")

    # ---- Phases in one process, or in several ----

    def _train(self, run: ModuleRun, build: Build, name: str, forget_hybrids: bool = False) -> int:
        if is_finished(run):
            logger.info("%s: done already, %s", name, run.output_dir / FINAL)
            return 0
        logger.info("--- %s ---", name)
        if forget_hybrids and is_main_process():
            self._places.hybrids.unlink(missing_ok=True)
        with measured(run.output_dir):
            return _isolated(lambda: carry_out(run, build, JobTrainer))

    def _first_process(self, name: str, action: Callable[[], None]) -> None:
        """The others wait, and end if it fails."""
        health = self._run.health
        team = join(60 * health.join_minutes, 60 * health.stuck_minutes)
        with Watchdog(team, 60 * health.stuck_minutes):
            if team.rank == 0:
                action()
            team.gather(name, True, _STEP_SECONDS)


def _isolated(train: Callable[[], int]) -> int:
    """Training that leaves no engine behind: accelerate and transformers keep theirs for the whole process."""
    try:
        return train()
    finally:
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
