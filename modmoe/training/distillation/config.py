"""The configuration of a distillation: that of any training run, the teacher, and how its modules are taught."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from modmoe.distill.inheritance import Inheritance
from modmoe.distill.objective import Objective
from modmoe.distill.ranges import Range, checked_ranges, even_ranges
from modmoe.training.finetuning.config import FinetuningSection, TeacherSection
from modmoe.training.run_config import OptimizationConfig, RunConfig, Section

Method = Literal["modules", "scratch", "logit_kd", "upcycle"]


class StagesSection(Section):
    """How teacher and student are cut into the same number of stages."""

    count: int = Field(default=4, ge=1)
    """Number of stages, unless `ranges` gives it."""
    balance: Literal["blocks", "parameters"] = "blocks"
    """What the teacher's stages have about as much of, without `ranges`."""
    ranges: list[Range] | None = None
    """Blocks of each of the teacher's stages, such as [[0, 4], [4, 12]]: from 0, end excluded."""
    student_ranges: list[Range] | None = None
    """The same of the student; none: evenly many blocks."""

    @property
    def number(self) -> int:
        """How many stages there are."""
        return self.count if self.ranges is None else len(self.ranges)

    def of_student(self, num_blocks: int) -> list[Range]:
        """
        The student's stages.

        Raises:
            ValueError: if they do not fit its blocks or the number of the teacher's stages.
        """
        if self.student_ranges is None:
            return even_ranges(num_blocks, self.number)
        if len(self.student_ranges) != self.number:
            raise ValueError(
                f"student_ranges are {len(self.student_ranges)} stages and the teacher has {self.number}: give as many"
            )
        return checked_ranges(self.student_ranges, num_blocks)


class ObjectiveSection(Section):
    """(1 - alpha) CE + alpha temperature^2 KL(teacher || student), means over valid tokens, and what is added."""

    alpha: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher: 0 is the labels alone, 1 the teacher alone."""
    temperature: float = Field(default=1.0, gt=0)
    """By which the logits of both are divided."""
    teacher_targets: Literal["soft", "hard"] = "soft"
    """The teacher's distribution, or its most probable token (arXiv:2012.12877)."""
    hidden_weight: float = Field(default=10.0, ge=0)
    """Factor on the relative squared error of hidden states where stages end (hints, arXiv:1412.6550)."""
    relation_weight: float = Field(default=0.0, ge=0)
    """Factor on the divergence of relations between tokens where a stage ends (after MiniLMv2, arXiv:2012.15828)."""
    relation_heads: int = Field(default=8, ge=1)
    """Parts of the width with relations of their own; divides both widths."""

    def objective(self) -> Objective:
        """As the library takes it."""
        return Objective(**self.model_dump())


class MetaSection(Section):
    """The meta model, and how it learns the teacher's language."""

    layers_per_stage: int = Field(default=1, ge=1)
    """Blocks, of the teacher's kind, that stand for each stage."""
    initialize: Literal["copy", "fresh"] = "copy"
    """Whether they start as evenly spaced blocks of the teacher or at random."""
    method: Literal["teacher", "fit", "incubate"] = "teacher"
    """Do without one: the teacher's own stages stand around each pair. Or fit it to the teacher; or pretrain it and
    train a copy of every teacher stage inside it (arXiv:2212.04129)."""
    replace: float = Field(default=0.5, ge=0, le=1)
    """Probability that a stage of the teacher stands in while the meta model is fitted (arXiv:2002.02925)."""
    objective: ObjectiveSection = ObjectiveSection(alpha=1.0)
    """What it is fitted with; method "incubate" takes the labels alone."""
    optimization: dict[str, Any] = Field(default_factory=dict)
    """Keys of `optimization` that are others for the meta model, such as {tokens: 2000000}."""
    incubation: dict[str, Any] = Field(default_factory=dict)
    """The same for incubating each of the teacher's stages."""


class HybridsSection(Section):
    """The meta model with one stage of the teacher's in it, which must not be worse than the meta model alone."""

    blocks_per_domain: int = Field(default=32, ge=1)
    """Validation blocks used for the check."""
    force: bool = False
    """Whether to go on with hybrids that are worse."""


class SignalsSection(Section):
    """Where a pair has the teacher's signals from."""

    cache: bool = False
    """Whether to write them to disk first, each block of text once; else the teacher is asked at every step."""
    top_k: int = Field(default=64, ge=1)
    """Tokens whose logits a cache keeps."""
    max_bytes: int = Field(default=10_000_000_000, ge=1)
    """Size to which the cache of one pair may grow."""


class InitializationSection(Section):
    """What the student's stages take from the teacher's before they are trained."""

    ffn: Literal["fresh", "copy", "cluster"] = "fresh"
    """FFN experts: fresh; each a copy of the teacher's FFN; or its neurons distributed among them."""
    reinit: float = Field(default=0.0, ge=0, le=1)
    """Share of neurons drawn anew in copies, so that they differ."""
    attention: Literal["fresh", "teacher"] = "fresh"
    """Projections of attention, where types and shapes are the same; else fresh all the same."""
    ends: bool = True
    """Whether embedding, final norm and head are the teacher's, where shapes allow."""

    @property
    def inheritance(self) -> Inheritance:
        """As the library takes it."""
        return Inheritance(self.ffn, self.attention, self.reinit)


class PairsSection(Section):
    """How each of the student's stages is taught by the teacher's."""

    objective: ObjectiveSection = ObjectiveSection()
    """The losses."""
    local: bool = True
    """Teach all stages but the last only by hidden states, where they end: what comes after them, and the head, is not
    run."""
    stitch: Literal["projection", "linear"] = "projection"
    """What joins teacher's and student's width: one fixed projection for all, or a norm and a linear map of its own
    for each, which are dropped afterwards (m2mKD)."""
    signals: SignalsSection = SignalsSection()
    """Where the teacher's signals come from."""
    optimization: dict[str, Any] = Field(default_factory=dict)
    """Keys of `optimization` that are others for the pairs."""


class DistillationSection(Section):
    """From teacher to student."""

    method: Method = "modules"
    """Module by module; or a baseline, which is the last phase alone: "scratch" from fresh weights, "logit_kd" with
    the whole teacher's logits, "upcycle" from the weights that the modules would start with."""
    stages: StagesSection = StagesSection()
    """The cut."""
    meta: MetaSection = MetaSection()
    """The meta model."""
    hybrids: HybridsSection = HybridsSection()
    """The check before the pairs."""
    initialization: InitializationSection = InitializationSection()
    """The student's start."""
    pairs: PairsSection = PairsSection()
    """The student's stages."""


class DistillRun(RunConfig):
    """A distillation, or a baseline of one. `optimization` is that of the end-to-end phase, which all have."""

    teacher: str
    """The dense teacher: directory or hub name of any causal language model. Stages that are cut already need it no
    more."""
    distillation: DistillationSection = DistillationSection()
    """The phases before the last."""
    finetuning: FinetuningSection = FinetuningSection()
    """The last phase: the assembled student, end to end. Its `teacher` without a path is the whole teacher."""
    stage: int | None = Field(default=None, ge=0)
    """Train this pair alone, from what OUTPUT_DIR/teacher holds, and OUTPUT_DIR/meta if there is a meta model."""
    jobs: int = Field(default=1, ge=1)
    """Pairs that are trained at a time, in processes of their own."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_teachers_tokenizer(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("tokenizer") is None and isinstance(content.get("teacher"), str):
            return content | {"tokenizer": {"name": content["teacher"]}}
        return content

    @model_validator(mode="after")
    def _check_distillation(self) -> Self:
        if self.init is not None:
            raise ValueError(f"remove init={str(self.init)!r}: the student comes from 'model' and 'teacher'")
        if self.finetuning.method in ("lora", "extension") or self.finetuning.pruning is not None:
            raise ValueError(
                "finetuning here is of the whole student: leave method 'full', and fine-tune the result with "
                "train/finetune.py"
            )
        stored_in_bf16 = (self.deepspeed or {}).get("bf16", {}).get("enabled", False)
        if self.expert_parallel_size > 1 or self.zero_stage == 3 or stored_in_bf16:
            raise ValueError(
                "pairs are trained beside frozen modules, whole in each process and in fp32: set "
                "expert_parallel_size to 1 and deepspeed.zero_optimization.stage to 2 or less, and remove "
                "deepspeed.bf16 (optimization.precision is bf16 all the same)"
            )
        self._check_stages()
        self._check_pairs()
        return self

    def _check_pairs(self) -> None:
        section = self.distillation
        if section.method != "modules":
            return  # a baseline has no pairs, whatever is said of them
        if section.pairs.local and section.stages.number > 1 and not section.pairs.objective.hidden_weight:
            raise ValueError(
                "distillation.pairs.objective.hidden_weight=0.0, and local pairs learn from hidden states alone: set "
                "it above 0, or distillation.pairs.local to false"
            )
        said = {name for name, value in section.meta if value != getattr(MetaSection(), name)} - {"method"}
        if section.meta.method == "teacher" and said:
            raise ValueError(
                f"distillation.meta.{min(said)} is given, and method 'teacher' has no meta model: set "
                "distillation.meta.method to 'fit' or 'incubate', or remove it"
            )

    def _check_stages(self) -> None:
        stages = self.distillation.stages
        if self.stage is not None and self.stage >= stages.number:
            raise ValueError(
                f"stage={self.stage} must be between 0 and {stages.number - 1}: there are {stages.number}"
            )
        if self.model.get("tie_word_embeddings") and stages.number > 1:
            raise ValueError(
                "model.tie_word_embeddings: the first and the last stage are trained apart and cannot share a "
                "weight; set it to false"
            )
        for key in ("meta.optimization", "meta.incubation", "pairs.optimization"):
            self.optimization_of(key)
        try:
            self.student_ranges()
        except ValueError as error:
            raise ValueError(f"distillation.stages: {error}") from None

    def student_ranges(self) -> list[Range]:
        """Blocks of each of the student's stages."""
        num_blocks = self.model.get("num_hidden_layers")
        if num_blocks is None:
            raise ValueError("model.num_hidden_layers is required, to be cut into stages")
        return self.distillation.stages.of_student(num_blocks)

    def optimization_of(self, key: str) -> OptimizationConfig:
        """
        The section `optimization`, as changed for a phase.

        Args:
            key: of the changes, within `distillation`.

        Raises:
            ValueError: if they do not fit.
        """
        section, name = key.split(".")
        changes = getattr(getattr(self.distillation, section), name)
        content = self.optimization.model_dump()
        if changes.keys() & {"steps", "tokens"}:
            content |= {"steps": None, "tokens": None}
        try:
            return OptimizationConfig.model_validate(content | changes)
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join(["distillation", key, *map(str, detail["loc"])])
            message = detail["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}") from None

    @property
    def end_to_end(self) -> FinetuningSection:
        """The section `finetuning` as the method needs it."""
        teacher = self.finetuning.teacher
        if self.distillation.method in ("scratch", "upcycle"):
            teacher = None
        elif self.distillation.method == "logit_kd" and teacher is None:
            teacher = TeacherSection()
        if teacher is not None and teacher.path is None:
            teacher = teacher.model_copy(update={"path": self.teacher})
        return self.finetuning.model_copy(update={"teacher": teacher})
