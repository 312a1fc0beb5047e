"""The configuration of a fine-tuning run: that of any training run, and what changes of the model it starts from."""

from typing import Literal, Self

from pydantic import Field, model_validator

from modmoe.losses.router import BalanceLoss
from modmoe.training.run_config import RunConfig, Section, UserPath


class LoraSection(Section):
    """Adapters of low rank (LoRA, arXiv:2106.09685), made by PEFT."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter; a stack of experts has one of this rank for each of them."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapters' inputs; possible for linear layers, not for stacks of experts."""
    targets: list[str] = Field(default_factory=list)
    """Ends of the names of weights that get one, such as k_proj or experts.q_proj; none: all projections of attention
    and of FFN experts."""


class RouterLossSection(Section):
    """The balance loss of the routers; "concentration" makes tokens share few experts, which the others may leave."""

    type: BalanceLoss = "concentration"
    """In place of the model's `router_aux_loss_type`."""
    coefficient: float = Field(default=0.01, ge=0)
    """Its factor in the training loss, in place of the model's `router_aux_loss_coef`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the factor rises linearly from 0."""


class TeacherSection(Section):
    """A model whose predictions are learned beside the data: (1 - weight) CE + weight temperature^2 KL."""

    path: str | None = None
    """Any causal language model of the same vocabulary, a directory or a name on the hub; none: the one of `init`."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher in the loss: 0 is the data alone, 1 the teacher alone."""
    temperature: float = Field(default=1.0, gt=0)
    """By which both models' logits are divided."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Factor on the relative squared error of the hidden states, for a teacher of the same depth and width."""


class DomainLossSection(Section):
    """Teaches the routers of extensions which text their experts are for; on other text they learn to decline."""

    sources: list[str] = Field(min_length=1)
    """Names of the sources that the extensions are for; all others are text to stay out of."""
    coefficient: float = Field(default=0.3, gt=0)
    """Its factor in the training loss."""


class PruningSection(Section):
    """Removes experts a few at a time while the model of `init` teaches (HomoDistil, arXiv:2302.09632)."""

    keep: float = Field(gt=0, lt=1)
    """Share of the experts that stays, rounded up."""
    steps: int = Field(ge=1)
    """Step by which the others are gone; the rest of the run recovers."""
    every: int = Field(default=10, ge=1)
    """Steps between two prunings; the share that stays falls linearly."""
    metric: Literal["frequency", "gate", "reap"] = "frequency"
    """What an expert is worth, as in a usage report."""
    usage: UserPath | None = None
    """Usage report of the model of `init` that decides; none: measured before each pruning on the text to come."""
    blocks: int = Field(default=32, ge=1)
    """Blocks of training text of a measurement."""
    scope: Literal["layer", "global"] = "layer"
    """Whether each layer keeps the share, or all together."""
    denominator: Literal["keep", "drop"] = "drop"
    """Whether experts that are gone keep their share of the routers' softmax."""


class FinetuningSection(Section):
    """What is trained, and towards what."""

    method: Literal["full", "experts", "routers", "lora", "extension"] = "full"
    """What is trained: everything, the experts of all pools, the routers, adapters, or extensions alone."""
    extensions: list[str] = Field(default_factory=list)
    """Names of the extensions that method "extension" trains."""
    domain_loss: DomainLossSection | None = None
    """What the extensions are for, with method "extension" and old text beside the new; none: the data decides."""
    lora: LoraSection | None = None
    """Adapters, with method "lora"."""
    router_loss: RouterLossSection | None = None
    """The routers' loss; none: as the model's config says."""
    teacher: TeacherSection | None = None
    """Distillation; none: the data alone, unless there is pruning."""
    pruning: PruningSection | None = None
    """Removing experts on the way; none: all stay."""

    @property
    def lora_section(self) -> LoraSection:
        """What is given of it, or the defaults."""
        return self.lora or LoraSection()

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        if self.lora is not None and self.method != "lora":
            raise ValueError(
                f"finetuning: lora is given with method {self.method!r}: set method to 'lora', or remove it"
            )
        if bool(self.extensions) != (self.method == "extension"):
            raise ValueError(
                f"finetuning: extensions={self.extensions} with method {self.method!r}: name extensions to train with "
                "method 'extension', and only then"
            )
        if self.domain_loss is not None and self.method != "extension":
            raise ValueError(
                f"finetuning: domain_loss is given with method {self.method!r}: set method to 'extension', or remove "
                "it"
            )
        if self.pruning is not None and self.method in ("lora", "extension"):
            raise ValueError(
                f"finetuning: pruning with method {self.method!r} is not possible: use 'full', 'experts' or 'routers'"
            )
        return self


class FinetuningRun(RunConfig):
    """A run that changes a saved model."""

    init: UserPath
    """Directory with the saved model that is changed; it stays as it is."""
    finetuning: FinetuningSection = FinetuningSection()
    """What is trained, and towards what."""

    @model_validator(mode="after")
    def _check_finetuning(self) -> Self:
        tuning = self.finetuning
        if tuning.domain_loss is not None:
            self._check_domains(tuning.domain_loss.sources)
        if tuning.method == "lora" and self.expert_parallel_size > 1:
            raise ValueError(f"method 'lora' and expert_parallel_size={self.expert_parallel_size} exclude each other")
        if tuning.pruning is None:
            return self
        if self.expert_parallel_size > 1 or self.zero_stage == 3:
            raise ValueError(
                "finetuning.pruning needs whole experts in each process: set expert_parallel_size to 1 and "
                "deepspeed.zero_optimization.stage to 2 or less"
            )
        if self.optimization.steps is not None and tuning.pruning.steps >= self.optimization.steps:
            raise ValueError(
                f"finetuning.pruning.steps={tuning.pruning.steps} leaves none of the run's {self.optimization.steps} "
                "steps to recover: raise optimization.steps"
            )
        return self

    def _check_domains(self, inside: list[str]) -> None:
        trained = {source.name for source in self.data.sources if source.weight > 0}
        unknown = sorted(set(inside) - trained)
        if unknown:
            raise ValueError(
                f"finetuning.domain_loss.sources: {unknown[0]!r} is none of the sources that are trained on: "
                f"{', '.join(sorted(trained))}"
            )
        if trained == set(inside):
            raise ValueError(
                "finetuning.domain_loss.sources names all sources that are trained on, so that there is no text to "
                "stay out of: add some of the old text to data.sources, or remove domain_loss"
            )
