"""The student: what its stages start with, and how they become one model."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from modmoe.data.tokenizer import existing_tokenizer
from modmoe.distill.assembly import assemble
from modmoe.distill.inheritance import inherit
from modmoe.distill.ranges import stage_specs
from modmoe.distill.stages import Frame, Stage, load_frame
from modmoe.distill.student import StudentStage, build_student_stage, initialize_ends
from modmoe.training.checkpoints.checkpoint import writing
from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.places import Places
from modmoe.training.distillation.teacher import CutTeacher
from modmoe.training.errors import ConfigError

PROJECTION = "projection"


def wants_projection(run: DistillRun, cut: CutTeacher) -> bool:
    """Not between equal widths; stitches of kind "linear" learn their own way."""
    return cut.needs_projection and run.distillation.pairs.stitch == "projection"


def load_projection(run: DistillRun, cut: CutTeacher, places: Places) -> torch.Tensor | None:
    """(teacher width, student width); None where none is wanted."""
    return load_file(places.projection)[PROJECTION] if wants_projection(run, cut) else None


def fresh_stage(run: DistillRun, cut: CutTeacher, index: int) -> StudentStage:
    """A stage of the student with random weights."""
    specs = stage_specs(run.student_ranges(), cut.student.hidden_size)
    return build_student_stage(cut.student, specs[index], run.seed)


def started_stage(
    run: DistillRun, cut: CutTeacher, places: Places, index: int, frame: Frame, teacher: Stage
) -> tuple[StudentStage, list[str]]:
    """
    A stage of the student as its training starts, and the names of what it has from the teacher.

    Raises:
        ConfigError: if it cannot have what the section `initialization` says.
    """
    student, projection = fresh_stage(run, cut, index), load_projection(run, cut, places)
    section = run.distillation.initialization
    if cut.needs_projection and projection is None:  # stitches of kind "linear": there is no way between the widths
        if section.ffn != "fresh":
            raise ConfigError(
                f"distillation.initialization.ffn={section.ffn!r}: the student's width {cut.student.hidden_size} is "
                f"not the teacher's {cut.width}, and only stitches of kind 'projection' lead from one to the other"
            )
        return student, []
    try:
        taken = inherit(student, teacher, section.inheritance, run.seed, projection)
    except ValueError as error:
        raise ConfigError(f"distillation.initialization: {error}") from None
    if section.ends:
        taken += initialize_ends(student, frame, projection)
    return student, taken


def assemble_student(stages: Sequence[Path], places: Places) -> bool:
    """
    Put stages together into one directory with the teacher's tokenizer, which appears once it is complete.

    Returns:
        whether it computes what the stages compute one after another through their stitches.

    Raises:
        ConfigError: if stages are missing or do not fit each other.
    """
    temporary = places.student.with_name(".student.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(places.student, places.root):
        try:
            exact = assemble(stages, temporary)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"cannot assemble the student: {error}") from None
        existing_tokenizer(str(places.frame)).save_pretrained(temporary)
        shutil.rmtree(places.student, ignore_errors=True)
        temporary.rename(places.student)
    return exact


def untrained_student(run: DistillRun, cut: CutTeacher, places: Places) -> None:
    """The student of a baseline: fresh, or with what the stages would start with."""
    parts = places.root / ".untrained"
    shutil.rmtree(parts, ignore_errors=True)
    frame = load_frame(places.frame)
    directories = []
    for index in range(run.distillation.stages.number):
        if run.distillation.method == "upcycle":
            teacher = Stage.load(places.teacher_stage(index))
            stage, _ = started_stage(run, cut, places, index, frame, teacher)
        else:
            stage = fresh_stage(run, cut, index)
        directories.append(parts / str(index))
        with writing(directories[-1], places.root):
            stage.save(directories[-1])
    assemble_student(directories, places)
    shutil.rmtree(parts)
