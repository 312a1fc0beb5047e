"""Where the parts of a distillation lie below its output directory."""

from pathlib import Path
from typing import NamedTuple

from modmoe.distill.stages import FRAME, stage_directory
from modmoe.training.checkpoints.output_dir import FINAL


class Places(NamedTuple):
    """
    All paths below one output directory. A machine that trains one pair needs `teacher/`; with a meta model that too,
    `meta/` without checkpoints, and of the teacher's stages its own alone; after incubation also `incubated/STAGE`,
    likewise.
    """

    root: Path

    @property
    def teacher(self) -> Path:
        """Frame and stages of the teacher, and how it was cut."""
        return self.root / "teacher"

    @property
    def frame(self) -> Path:
        """What the teacher runs before and after its blocks, and its tokenizer."""
        return self.teacher / FRAME

    def teacher_stage(self, index: int) -> Path:
        """A stage of the teacher, as it was cut."""
        return stage_directory(self.teacher, index)

    @property
    def projection(self) -> Path:
        """From the teacher's width to the student's, where they differ."""
        return self.teacher / "projection.safetensors"

    @property
    def meta_run(self) -> Path:
        """Training of the meta model."""
        return self.root / "meta"

    @property
    def meta(self) -> Path:
        """The meta model."""
        return self.meta_run / FINAL

    def incubation_run(self, index: int) -> Path:
        """Training of a teacher stage inside the meta model."""
        return self.root / "incubated" / str(index)

    @property
    def hybrids(self) -> Path:
        """Cross entropies of the meta model and the hybrids."""
        return self.meta_run / "hybrids.json"

    def pair_run(self, index: int) -> Path:
        """Training of a stage of the student."""
        return self.root / "stages" / str(index)

    @property
    def student(self) -> Path:
        """The assembled student before it is fine-tuned."""
        return self.root / "student"

    @property
    def finetuning_run(self) -> Path:
        """Training end to end."""
        return self.root / "finetuned"

    @property
    def results(self) -> Path:
        """What every phase cost, and what came out."""
        return self.root / "results.json"
