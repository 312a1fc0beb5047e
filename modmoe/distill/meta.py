"""The meta model: a shallow stand-in for the teacher, in which modules of teacher and student are compared.

It has the teacher's width, embeddings and head, and few blocks of the teacher's own class for each stage. Module i of
teacher or student then runs as meta[<i] -> module -> meta[>i]. For an ordinary teacher that makes sense only if the
meta model speaks the teacher's language at the boundaries: by default it is fitted to the teacher's hidden states
there and to its logits. The alternative is that of Deep Incubation (arXiv:2212.04129): the meta model is pretrained
end to end (`MetaFit` without a teacher and alpha = 0), and every teacher stage is then trained inside it
(`Incubation`).
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from modmoe.distill.frame import Batch, Calls, Frame, new_block
from modmoe.distill.frozen import Frozen
from modmoe.distill.objective import IGNORE_INDEX, Objective, next_token_targets, real_tokens
from modmoe.distill.seeds import stage_random_state
from modmoe.distill.signals import TeacherSignals
from modmoe.distill.stages import CutModel, Stage

Targets = Callable[[Mapping[str, Any]], torch.Tensor]

FIT = Objective(alpha=1.0, hidden_weight=10.0)
"""Logits of the teacher, and its boundaries more than these: what stages of the teacher will meet there counts."""
PRETRAIN = Objective(alpha=0.0)
"""Labels alone."""


def build_meta(
    teacher: CutModel, layers_per_stage: int = 1, initialize: Literal["copy", "fresh"] = "copy", seed: int = 0
) -> CutModel:
    """
    A meta model for a teacher, with frame shared and blocks of its own.

    Args:
        teacher: cut into stages.
        layers_per_stage: blocks that stand for each stage.
        initialize: "copy" takes evenly spaced blocks of the stage (arXiv:1910.01108), "fresh" random weights.
        seed: of random weights; a stage's depend on it and on the stage alone.

    Raises:
        ValueError: if a stage has fewer blocks than `layers_per_stage`, or for an unknown initialisation.
    """
    if initialize not in ("copy", "fresh"):
        raise ValueError(f"initialize={initialize!r} must be 'copy' or 'fresh'")
    smallest = min(spec.num_blocks for spec in teacher.specs)
    if not 1 <= layers_per_stage <= smallest:
        raise ValueError(
            f"layers_per_stage={layers_per_stage} must be between 1 and the blocks of the smallest stage, {smallest}"
        )
    stages = []
    for stage in teacher.stages:
        chosen = [(2 * j + 1) * len(stage.blocks) // (2 * layers_per_stage) for j in range(layers_per_stage)]
        if initialize == "copy":
            blocks = [copy.deepcopy(stage.blocks[j]) for j in chosen]
        else:
            with stage_random_state(seed, "meta", stage.spec.index):
                blocks = [_fresh_block(teacher, stage, j) for j in chosen]
        stages.append(Stage(stage.spec, stage.config, blocks, [stage.layer_indices[j] for j in chosen]))
    return CutModel(teacher.frame, stages)


def _fresh_block(teacher: CutModel, stage: Stage, position: int) -> nn.Module:
    like = stage.blocks[position]
    block = new_block(stage.config, like, stage.layer_indices[position])
    for module in block.modules():
        teacher.frame.model._init_weights(module)
    return block.to(next(like.parameters()))


class MetaFit(nn.Module):
    """
    A meta model in training; its frame is frozen.

    A meta model that is fitted as a whole learns in each stage to undo the errors of the stages before, which a stage
    of the teacher then does not do: hybrids become worse than the meta model alone. So stages of the teacher take part
    while it learns: each stands in for the meta model's at random (arXiv:2002.02925), which learns on beside it.

    Args:
        meta: its stages are trained.
        objective: `FIT` or `PRETRAIN`, or weights of your own.
        teacher: takes part, and is asked for signals that a batch does not bring along; None if no teacher is needed,
            or only signals that batches bring along.
        replace: probability in training that a stage of the teacher stands in.
        targets_of: what a batch is to predict.

    Raises:
        ValueError: for a probability outside 0..1.
    """

    def __init__(
        self,
        meta: CutModel,
        objective: Objective = FIT,
        teacher: CutModel | None = None,
        replace: float = 0.5,
        targets_of: Targets = next_token_targets,
    ) -> None:
        super().__init__()
        if not 0.0 <= replace <= 1.0:
            raise ValueError(f"replace={replace} must be between 0 (the meta model alone) and 1")
        self.objective = objective
        self.replace = replace
        self.targets_of = targets_of
        self.frozen = Frozen(frame=meta.frame, teacher=teacher)
        self.stages = nn.ModuleList(meta.stages).requires_grad_(True)

    @property
    def teacher(self) -> CutModel | None:
        """The model that teaches."""
        return cast(CutModel | None, self.frozen.teacher)

    def teacher_signals(self, batch: Batch) -> TeacherSignals:
        """
        Logits of the teacher and its hidden states at the end of every stage.

        Raises:
            ValueError: if there is no teacher here.
        """
        if self.teacher is None:
            raise ValueError("there is no teacher to ask: give one, or cached signals with every batch")
        with torch.no_grad():
            output = self.teacher(**batch)
        return TeacherSignals(output.logits, dict(enumerate(output.boundaries[1:], 1)))

    def forward(
        self,
        signals: Mapping[str, torch.Tensor] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_tokens_in_batch: torch.Tensor | int | None = None,
        **batch: Any,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            signals: `TeacherSignals.tensors()` of this batch, from a cache; None asks the teacher.
            num_items_in_batch, num_tokens_in_batch: valid and real tokens of the whole optimizer step; None are this
                batch's.
            batch: inputs of the model, and labels.

        Returns:
            see `Objective.losses`.
        """
        given = None if signals is None else TeacherSignals.of(signals)
        if given is None and self.teacher is not None:
            given = self.teacher_signals(batch)
        leaving: list[torch.Tensor] = []
        stand_ins = self._stand_ins()

        def body(hidden_states: torch.Tensor, calls: Calls) -> torch.Tensor:
            for stage, stand_in in zip(self.stages, stand_ins, strict=True):
                leaving.append(stage(hidden_states, calls))
                hidden_states = leaving[-1] if stand_in is None else stand_in(hidden_states, calls)
            return hidden_states

        logits = cast(Frame, self.frozen.frame)(batch, body)
        boundaries = {} if given is None else given.boundaries
        return self.objective.losses(
            logits,
            self.targets_of(batch),
            None if given is None else given.logits,
            hidden=[(leaving[boundary - 1], states) for boundary, states in sorted(boundaries.items())],
            token_mask=real_tokens(batch),
            num_items=num_items_in_batch,
            num_tokens=num_tokens_in_batch,
        )

    def score(self, batch: Batch) -> dict[str, torch.Tensor]:
        """As `forward`, of labels alone and by the meta model alone."""
        return PRETRAIN.losses(self.meta(**batch).logits, self.targets_of(batch), None)

    @property
    def meta(self) -> CutModel:
        """The meta model; it shares its modules with this one."""
        return CutModel(cast(Frame, self.frozen.frame), cast(Sequence[Stage], self.stages))

    def save(self, directory: Path) -> None:
        """Write the meta model, for `CutModel.load`."""
        self.meta.save(directory)

    def _stand_ins(self) -> list[Stage | None]:
        """Which stages of the teacher take part; the meta model always keeps one of its own."""
        if self.teacher is None or not self.training or not self.replace:
            return [None] * len(self.stages)
        drawn = torch.rand(len(self.stages)) < self.replace
        drawn[torch.randint(len(self.stages), ())] = False
        return [stage if chosen else None for stage, chosen in zip(self.teacher.stages, drawn, strict=True)]


class Incubation(nn.Module):
    """
    A copy of a teacher's stage in training inside a frozen meta model, by labels alone (arXiv:2212.04129).

    Args:
        meta: pretrained.
        stage: copied; the original stays as it is.
        targets_of: what a batch is to predict.
    """

    def __init__(self, meta: CutModel, stage: Stage, targets_of: Targets = next_token_targets) -> None:
        super().__init__()
        self.frozen = Frozen(meta=meta)
        self.targets_of = targets_of
        self.stage = copy.deepcopy(stage).requires_grad_(True)

    def forward(self, num_items_in_batch: torch.Tensor | int | None = None, **batch: Any) -> dict[str, torch.Tensor]:
        """See `MetaFit.forward`."""
        logits = cast(CutModel, self.frozen.meta).with_stage(self.stage)(**batch).logits
        return PRETRAIN.losses(logits, self.targets_of(batch), None, num_items=num_items_in_batch)

    def score(self, batch: Batch) -> dict[str, torch.Tensor]:
        """As `forward`."""
        return self(**batch)

    def save(self, directory: Path) -> None:
        """Write the stage, for `Stage.load`."""
        self.stage.save(directory)


@dataclass(frozen=True)
class HybridReport:
    """Cross entropies on the same tokens, in nats per token; or on images."""

    num_tokens: int
    """How many were scored."""
    meta: float
    """Of the meta model alone."""
    hybrids: dict[int, float]
    """Stage -> of the meta model with the teacher's stage in it."""

    @property
    def worse(self) -> list[int]:
        """Stages whose hybrid is worse than the meta model alone, or not a number."""
        return [stage for stage, value in self.hybrids.items() if not value <= self.meta]

    def check(self, force: bool = False) -> None:
        """
        Refuse to distil from hybrids that teach less than the meta model knows.

        Args:
            force: go on all the same.

        Raises:
            ValueError: names the stages and their cross entropies.
        """
        if self.worse and not force:
            found = ", ".join(f"stage {stage}: {self.hybrids[stage]:.4f}" for stage in self.worse)
            raise ValueError(
                "teacher stages are worse inside the meta model than the meta model alone (cross entropy "
                f"{self.meta:.4f} over {self.num_tokens} tokens; {found}): fit the meta model longer, or give it more "
                "layers per stage; incubate the teacher's stages in one that was pretrained end to end; or force it"
            )


@torch.no_grad()
def evaluate_hybrids(
    meta: CutModel, stages: Iterable[Stage], batches: Iterable[Batch], targets_of: Targets = next_token_targets
) -> HybridReport:
    """
    Cross entropy of the meta model, and of it with each teacher stage.

    Args:
        meta: fitted.
        stages: of the teacher; `stages_of` reads them one after another.
        batches: what to score; gone through once for the meta model and once for every stage.
        targets_of: what a batch is to predict.

    Raises:
        ValueError: if there is nothing to predict.
    """
    kept = list(batches)
    alone, num_tokens = _cross_entropy(meta, kept, targets_of)
    hybrids = {stage.spec.index: _cross_entropy(meta.with_stage(stage), kept, targets_of)[0] for stage in stages}
    return HybridReport(num_tokens, alone, hybrids)


def _cross_entropy(model: CutModel, batches: list[Batch], targets_of: Targets) -> tuple[float, int]:
    modes = {module: module.training for module in model.modules()}  # a hybrid shares its modules with others
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        logits, targets = model(**batch).logits, targets_of(batch)
        total += float(
            F.cross_entropy(
                logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        count += int((targets != IGNORE_INDEX).sum())
    for module, mode in modes.items():
        module.training = mode
    if not count:
        raise ValueError("there is no token to predict in these batches: give text, with labels")
    return total / count, count
