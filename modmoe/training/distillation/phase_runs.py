"""The configuration of each phase, which is a training run of its own."""

from pathlib import Path
from typing import Any, ClassVar, TypeVar

from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.places import Places
from modmoe.training.finetuning.config import FinetuningRun
from modmoe.training.run_config import OptimizationConfig, RunConfig, check_run_config

# The output directory may be moved to another machine between phases.
_PLACES = ("init", "tokenizer.name", "finetuning.teacher.path")


class ModuleRun(RunConfig):
    """Training of a module: the meta model, a stage of the teacher in it, or a pair."""

    follows_from_place: ClassVar[tuple[str, ...]] = _PLACES
    distillation: dict[str, Any]
    """What else the phase depends on: the teacher, and the phases before it."""


class EndToEndRun(FinetuningRun):
    """Training of the assembled student."""

    follows_from_place: ClassVar[tuple[str, ...]] = _PLACES
    distillation: dict[str, Any]
    """What else the phase depends on."""


Phase = TypeVar("Phase", bound=RunConfig)


class PhaseRuns:
    """
    Makes them.

    Args:
        run: the distillation.
        places: of it.
        teacher: identity of the teacher that was cut.
    """

    def __init__(self, run: DistillRun, places: Places, teacher: str) -> None:
        self._run = run
        self._places = places
        whole = run.distillation.model_dump(mode="json")
        whole["pairs"]["signals"]["max_bytes"] = None
        method = run.distillation.meta.method
        meta = whole["meta"] | {"optimization": None, "incubation": None}
        self._cut = {"teacher": teacher, "stages": whole["stages"] | {"student_ranges": None}}
        self._meta = self._cut | {"meta": meta}
        fitting = None if method == "teacher" else run.optimization_of("meta.optimization")
        incubation = run.optimization_of("meta.incubation") if method == "incubate" else None
        self._pairs = self._meta | {
            "meta_optimization": fitting and fitting.model_dump(mode="json"),
            "incubation": incubation and incubation.model_dump(mode="json"),
            "stages": whole["stages"],
            "initialization": whole["initialization"],
            "pairs": whole["pairs"] | {"optimization": None},
        }

    def meta(self) -> ModuleRun:
        """Of the meta model; it starts from the teacher's frame."""
        optimization = self._run.optimization_of("meta.optimization")
        return self._module(self._places.meta_run, optimization, self._meta)

    def incubation(self, stage: int) -> ModuleRun:
        """Of a stage of the teacher in the meta model."""
        before = self._run.optimization_of("meta.optimization").model_dump(mode="json")
        basis = self._meta | {"meta_optimization": before, "stage": stage}
        optimization = self._run.optimization_of("meta.incubation")
        return self._module(self._places.incubation_run(stage), optimization, basis)

    def pair(self, stage: int) -> ModuleRun:
        """Of a pair; independent of all other pairs."""
        optimization = self._run.optimization_of("pairs.optimization")
        basis = self._pairs | {"stage": stage}
        return self._module(self._places.pair_run(stage), optimization, basis, model=self._run.model)

    def end_to_end(self) -> EndToEndRun:
        """Of the assembled student."""
        method = self._run.distillation.method
        basis: dict[str, Any] = self._cut | {"method": method, "student": self._run.model}
        if method == "modules":
            pairs = self._run.optimization_of("pairs.optimization").model_dump(mode="json")
            basis |= self._pairs | {"pair_optimization": pairs}
        elif method == "upcycle":
            # What decides which weights of the teacher each block takes, and through which projection.
            basis |= {name: self._pairs[name] for name in ("initialization", "stages")}
            basis["stitch"] = self._run.distillation.pairs.stitch
        return self._phase(
            EndToEndRun,
            self._places.finetuning_run,
            self._run.optimization,
            basis,
            init=str(self._places.student),
            finetuning=self._run.end_to_end.model_dump(mode="json"),
        )

    def _module(
        self, output_dir: Path, optimization: OptimizationConfig, basis: dict[str, Any], **changes: Any
    ) -> ModuleRun:
        changes = changes or {"init": str(self._places.frame)}
        return self._phase(ModuleRun, output_dir, optimization, basis, **changes)

    def _phase(
        self,
        kind: type[Phase],
        output_dir: Path,
        optimization: OptimizationConfig,
        basis: dict[str, Any],
        **changes: Any,
    ) -> Phase:
        content = self._run.model_dump(mode="json", include=set(RunConfig.model_fields))
        content |= {
            "model": {},
            "tokenizer": {"name": str(self._places.frame)},
            "output_dir": str(output_dir),
            "optimization": optimization.model_dump(mode="json"),
            "distillation": basis,
        }
        return check_run_config(content | changes, kind)
