"""The configuration of one training run: one YAML file, any key of which the command line can override."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from modmoe.data.config import SourceConfig, TokenizerConfig
from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.ops import BACKENDS
from modmoe.training.errors import ConfigError
from modmoe.training.yaml_config import apply_override, load_yaml, parse_overrides

UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes, no, on and off as booleans, and pydantic reads booleans as the numbers 1 and 0.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"must not be a boolean, got {value} (quote words such as 'no')")
        return value


class DataConfig(Section):
    """The training text; see `modmoe.data`."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Domains of text; each says where it comes from and its weight."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens per block; documents are packed into blocks."""
    cache_dir: UserPath = Path(".cache/modmoe")
    """Where trained tokenizers and tokenised text are kept, relative to the working directory."""
    workers: int = Field(default=0, ge=0)
    """Processes per rank that read data ahead; 0 reads in the training process."""


class OptimizationConfig(Section):
    """How long and how to optimise."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; give either this or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Training tokens on all processes together; rounded up to whole steps."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Blocks per forward pass and process."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step and process."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Learning rate after the warm-up: falling in a line or a half cosine, constant, or constant and then linear."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to its peak."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Last share of the steps in which "wsd" decays."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, relative to the peak."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices; norms, biases and other vectors have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's two moments, each in [0, 1)."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Norm to which the gradient is clipped; 0 turns clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of matrix products over fp32 weights; "auto" is bf16 where the hardware has it natively."""

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each of the two must be in [0, 1), got {list(betas)}")
        return betas

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"give exactly one of steps and tokens, got steps={self.steps}, tokens={self.tokens}")
        return self


class LoggingConfig(Section):
    """Metrics go to the console, to metrics.jsonl and to TensorBoard."""

    interval: int = Field(default=10, ge=1)
    """Steps between two records."""
    tensorboard: bool = True
    """Whether to write TensorBoard files."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """What a device can do, in TFLOP/s: gives the share of it that training uses (MFU). Common GPUs are known."""


class EvaluationConfig(Section):
    """Validation loss of each domain."""

    interval: int = Field(default=0, ge=0)
    """Steps between two evaluations; 0 evaluates at the end only."""
    at_start: bool = False
    """Whether to evaluate before the first step too."""
    blocks_per_domain: int = Field(default=64, ge=1)
    """Validation blocks per domain during training."""
    final_blocks_per_domain: int = Field(default=512, ge=1)
    """Validation blocks per domain at the end."""


class CheckpointConfig(Section):
    """Checkpoints from which a run resumes."""

    interval: int = Field(default=1000, ge=1)
    """Steps between two checkpoints; there is always one at the end."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep."""


class HealthConfig(Section):
    """When a run reports a problem, and when it gives up."""

    max_skipped_steps: int = Field(default=10, ge=1)
    """Steps in a row without a finite loss and gradient after which the run ends; such steps change no weight."""
    spike_deviations: float = Field(default=6.0, gt=0)
    """Standard deviations above the usual loss from which a step is reported in events.jsonl."""
    join_minutes: float = Field(default=3.0, gt=0)
    """How long processes wait for each other at the start."""
    stuck_minutes: float = Field(default=30.0, gt=0)
    """Time without progress (a step, an evaluated domain, a save) after which all processes leave."""


class RunConfig(Section):
    """Everything that one training run depends on."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Fields of `ModMoEConfig`; `preset: FILE` reads them from a YAML file first. Leave empty with `init` to use the
    saved config."""
    data: DataConfig
    """The text."""
    tokenizer: TokenizerConfig
    """An existing tokenizer or the size of one to train on the text. With `init` the default is the model's own."""
    optimization: OptimizationConfig
    """Length of training, batch, optimizer, precision."""
    deepspeed: dict[str, Any] | None = None
    """A DeepSpeed configuration, or the path of a JSON file with one; none: plain PyTorch."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Neighbouring ranks over which the experts of each layer are distributed; needs `deepspeed`."""
    expert_parallel_chunks: int = Field(default=1, ge=1)
    """Parts of a micro-batch whose transfers overlap with expert computation; 1 does not overlap."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics."""
    health: HealthConfig = HealthConfig()
    """Health checks."""
    output_dir: UserPath
    """Where everything is written, relative to the working directory."""
    init: UserPath | None = None
    """Directory with a saved model whose weights training starts from."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the initial weights, the data order and everything else that is random."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop training after this wall-clock time over all launches, evaluations and saves included, and finish as usual;
    the learning rate falls in time for it."""
    backend: Literal[BACKENDS] | None = None  # type: ignore[valid-type]
    """Implementation of the ops, for all that have one of that name; none: MODMOE_BACKEND, else the best that runs."""
    overwrite_output: bool = False
    """Whether to delete another run that `output_dir` holds; refused otherwise."""

    follows_from_place: ClassVar[tuple[str, ...]] = ()
    """Keys whose values follow from where the run is, and that make no other run of it."""

    @model_validator(mode="before")
    @classmethod
    def _keep_the_tokenizer(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("init") is not None and content.get("tokenizer") is None:
            return content | {"tokenizer": {"name": str(content["init"])}}
        return content

    @field_validator("model")
    @classmethod
    def _check_model(cls, fields: dict[str, Any]) -> dict[str, Any]:
        build_model_config(fields)
        return fields

    @field_validator("deepspeed")
    @classmethod
    def _check_deepspeed(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        for key in _DECIDED_BY_OPTIMIZATION:
            if section and section.get(key, "auto") != "auto":
                raise ValueError(f"remove {key!r}: the section 'optimization' decides it")
        if section is not None:
            _check_zero_stage(section)
        return section

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        if not self.model and self.init is None:
            raise ValueError("give a 'model' section, or 'init' to start from a saved model")
        if self.init is not None:
            init, output = self.init.resolve(), self.output_dir.resolve()
            if output.is_relative_to(init) or init.is_relative_to(output):
                raise ValueError(
                    f"output_dir {self.output_dir} and init {self.init} lie in each other, and the model of init is "
                    "not to change: choose another output_dir"
                )
        if self.expert_parallel_size > 1 and self.deepspeed is None:
            raise ValueError(
                f"expert_parallel_size={self.expert_parallel_size} needs DeepSpeed: add a 'deepspeed' section, such "
                "as configs/deepspeed/zero1.json"
            )
        stored_in_bf16 = (self.deepspeed or {}).get("bf16", {}).get("enabled", False)
        if stored_in_bf16 not in (False, "auto") and self.optimization.precision != "bf16":
            raise ValueError(
                f"deepspeed.bf16.enabled={stored_in_bf16} does not fit optimization.precision="
                f"{self.optimization.precision}: make it bf16, or enabled auto"
            )
        return self

    @property
    def zero_stage(self) -> int | None:
        """How far DeepSpeed shards; None without DeepSpeed."""
        return None if self.deepspeed is None else self.deepspeed["zero_optimization"].get("stage", 0)

    def blocks_per_step(self, world_size: int) -> int:
        """Blocks of one optimizer step on all processes."""
        return self.optimization.micro_batch_size * self.optimization.gradient_accumulation * world_size

    def tokens_per_step(self, world_size: int) -> int:
        """Tokens of one optimizer step on all processes."""
        return self.blocks_per_step(world_size) * self.data.sequence_length

    def steps(self, world_size: int) -> int:
        """
        Optimizer steps of the run.

        Raises:
            ConfigError: if the warm-up takes longer.
        """
        length = self.optimization
        steps = length.steps or math.ceil((length.tokens or 0) / self.tokens_per_step(world_size))
        if length.warmup_steps > steps:
            raise ConfigError(f"optimization: warmup_steps={length.warmup_steps} is more than the run's {steps} steps")
        return steps


_DECIDED_BY_OPTIMIZATION = (
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


def _check_zero_stage(section: dict[str, Any]) -> None:
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(section.get(key, {}), dict):
            raise ValueError(f"{key} must be a section such as {{stage: 1}}, got {section[key]!r}")
    if "zero_optimization" not in section:
        raise ValueError("zero_optimization is required: {stage: 0} shards nothing, up to {stage: 3}")
    stage = section["zero_optimization"].get("stage", 0)
    if stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        raise ValueError(f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    if stage == 0 and section.get("bf16", {}).get("enabled", False) is not False:
        # DeepSpeed then starts Adam with a step of zeros, which shrinks the first updates, and leaves the experts of
        # expert parallelism out of the gradient norm.
        raise ValueError("bf16.enabled is not exact at stage 0: remove it, or set zero_optimization.stage to 1")
    for part, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if section.get(part, {}).get(key, True) is not True:
            raise ValueError(f"remove {part}.{key}: without it a step with NaN would be applied")
    if section.get("fp16", {}).get("enabled", False):
        raise ValueError("remove 'fp16': optimization.precision is fp32 or bf16")


def build_model_config(fields: dict[str, Any]) -> ModMoEConfig:
    """
    Check model fields and make a config of them.

    Raises:
        ValueError: for unknown fields and impossible values.
    """
    try:
        return ModMoEConfig(**fields)
    except ValueError:
        raise
    except Exception as error:  # type errors of the strict config have classes of their own
        cause = error.__cause__ or error
        raise ValueError(" ".join(str(cause).split())) from None


Run = TypeVar("Run", bound=RunConfig)


def load_run_config(path: Path, arguments: Sequence[str] = (), kind: type[Run] = RunConfig) -> Run:  # type: ignore[assignment]
    """
    Read a run's YAML file, apply command-line overrides and check everything.

    Paths inside the file that name other config files (`model.preset`, `deepspeed`) are relative to it; those on
    the command line are relative to the working directory.

    Args:
        path: the YAML file.
        arguments: `--section.key VALUE` pairs.
        kind: of run.

    Raises:
        ConfigError: with one sentence per mistake.
    """
    content = load_yaml(path)
    overrides = parse_overrides(arguments)
    for key, value in overrides:
        if key in _FILE_KEYS:
            apply_override(content, key, str(_beside(value, Path.cwd())) if isinstance(value, str) else value)
    _read_referenced_files(content, path.parent)
    for key, value in overrides:
        if key not in _FILE_KEYS:
            apply_override(content, key, value)
    return check_run_config(content, kind)


def check_run_config(content: dict[str, Any], kind: type[Run] = RunConfig) -> Run:  # type: ignore[assignment]
    """
    Raises:
        ConfigError: with one sentence per mistake.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(detail, kind) for detail in error.errors())) from None


_FILE_KEYS = ("model.preset", "deepspeed")


def _read_referenced_files(content: dict[str, Any], base: Path) -> None:
    """Replace `model.preset` and `deepspeed` paths by what the files say."""
    model = content.get("model")
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if not isinstance(preset, str):
            raise ConfigError(f"model.preset must be the path of a YAML file, got {preset!r}")
        content["model"] = load_yaml(_beside(preset, base)) | model
    if isinstance(content.get("deepspeed"), str):
        content["deepspeed"] = load_yaml(_beside(content["deepspeed"], base))


def _beside(path: str, base: Path) -> Path:
    return base / Path(path).expanduser()


def _describe(detail: Any, kind: type[RunConfig]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key}; {_suggest(detail['loc'], kind)}"
    if detail["type"] == "missing":
        return f"{key} is required"
    if detail["type"] == "path_type":
        return f"{key} must be a path, got {detail['input']!r}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        # Some messages name their section themselves, for use without this module.
        return message if not key or message.startswith(f"{key}:") else f"{key}: {message}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _suggest(location: tuple[str | int, ...], kind: type[RunConfig]) -> str:
    *path, name = location
    allowed = valid_keys([part for part in path if isinstance(part, str)], kind)
    near = difflib.get_close_matches(str(name), allowed, n=2, cutoff=0.65)
    prefix = "".join(f"{part}." for part in path)
    if near:
        return f"did you mean {' or '.join(prefix + match for match in near)}?"
    return f"valid keys here are {', '.join(allowed)}"


def valid_keys(path: Sequence[str], kind: type[RunConfig] = RunConfig) -> list[str]:
    """Names of the keys of the section that a path of section names leads to."""
    section: Any = kind
    for part in path:
        annotation = _annotations(section)[part]
        nested = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "__annotations__")]
        section = nested[-1]
    return list(_annotations(section))


def _annotations(section: Any) -> dict[str, Any]:
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return {name: field.type for name, field in section.__dataclass_fields__.items()}


def describe_keys(kind: type[RunConfig] = RunConfig) -> str:
    """One line per key: name, default and meaning, for --help."""
    return "\n".join(_describe_section(kind, ""))


def _describe_section(section: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        kinds: Any = (field.annotation, *get_args(field.annotation))
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not nested or type(None) in kinds:
            default = "" if field.is_required() or field.default_factory else f" [{field.default}]"
            lines.append(f"  --{prefix}{name}{default}: {' '.join((field.description or '').split())}")
        for section_kind in nested:
            lines += _describe_section(section_kind, f"{prefix}{name}.")
    return lines
