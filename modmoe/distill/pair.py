"""One job of module-to-module distillation: a teacher's stage teaches a student's in the same surroundings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from modmoe.distill.frame import Batch
from modmoe.distill.frozen import Frozen
from modmoe.distill.meta import PRETRAIN, Targets
from modmoe.distill.objective import Objective, next_token_targets, real_tokens
from modmoe.distill.signals import TeacherSignals
from modmoe.distill.stages import CutModel, Stage
from modmoe.distill.stitch import StitchKind, build_stitches
from modmoe.distill.student import StudentOutput, StudentStage, output_layer
from modmoe.losses.router import RouterStatistics

STITCHES = "stitches.safetensors"


class StagePair(nn.Module):
    """
    Teacher and student of one stage, as a module for any trainer.

        teacher net:  meta[<i] -> T_i -> meta[>i]                       no gradient
        student net:  meta[<i] -> stitch -> S_i -> stitch -> meta[>i]   gradient through the frozen tail into S_i

    A local pair ends after T_i and S_i, where it compares only hidden states (arXiv:1412.6550): no tail, no head.

    The first student stage begins with its own embedding, the last ends with its own head. Parameters that need a
    gradient, and everything in `state_dict()`, are those of the student's stage and its stitches.

    Args:
        meta: what stands around both stages, a meta model or the teacher itself; frozen here.
        student: the stage to train.
        objective: weights of the losses.
        teacher: the stage that teaches; None if every batch brings its signals along.
        stitch: kind of the stitches.
        projection: (teacher width, student width) of "projection" stitches between different widths.
        targets_of: what a batch is to predict.
        local: whether stages but the last are local pairs.

    Raises:
        ValueError: if stage, widths or vocabulary do not fit the meta model, or a local pair has nothing to compare.
    """

    def __init__(
        self,
        meta: CutModel,
        student: StudentStage,
        objective: Objective,
        teacher: Stage | None = None,
        stitch: StitchKind = "projection",
        projection: torch.Tensor | None = None,
        targets_of: Targets = next_token_targets,
        local: bool = False,
    ) -> None:
        super().__init__()
        self._check(meta, student, teacher)
        self.spec = meta.specs[student.spec.index]
        self.is_local = local and not self.spec.is_last
        if self.is_local and not objective.hidden_weight:
            # Relations alone leave open in which directions and how large the states are that the next stage reads.
            raise ValueError(
                "a local pair learns from hidden states alone: set hidden_weight above 0, or local to False"
            )
        self.objective = objective
        self.targets_of = targets_of
        self.stitch = stitch
        norm = nn.RMSNorm if student.config.norm_type == "rmsnorm" else nn.LayerNorm
        self.frozen = Frozen(meta=meta, teacher_net=None if teacher is None else meta.with_stage(teacher))
        self.student = student
        self.stitch_in, self.stitch_out = build_stitches(
            self.spec, student.config.hidden_size, stitch, projection, norm
        )

    @staticmethod
    def _check(meta: CutModel, student: StudentStage, teacher: Stage | None) -> None:
        index, count = student.spec.index, student.spec.num_stages
        if count != len(meta.specs):
            raise ValueError(
                f"the student's stage is {index} of {count}, and the meta model has {len(meta.specs)} stages: cut "
                "both into as many"
            )
        if teacher is not None and teacher.spec != meta.specs[index]:
            raise ValueError(
                f"the teacher's stage is {teacher.spec}, and stage {index} of the meta model stands for "
                f"{meta.specs[index]}: take the stage of the same cut"
            )
        weight = getattr(output_layer(meta.frame), "weight", None)
        field = student.kind.num_logits
        size = getattr(student.config, field)
        if weight is not None and len(weight) != size:
            raise ValueError(
                f"the teacher has {len(weight)} logits and the student {field}={size}: set the student's to "
                f"{len(weight)}, and let both mean the same tokens or labels"
            )

    def teacher_signals(self, batch: Batch) -> TeacherSignals:
        """
        Hidden states before and after the teacher's stage, and logits of the teacher net unless the pair is local.

        Raises:
            ValueError: if there is no teacher's stage here.
        """
        teacher_net = cast(CutModel | None, self.frozen.teacher_net)
        if teacher_net is None:
            raise ValueError("this pair has no teacher's stage: give one, or cached signals with every batch")
        index = self.spec.index
        with torch.no_grad():
            if self.is_local:
                return TeacherSignals(None, dict(enumerate(teacher_net.around(batch, index), index)))
            output = teacher_net(**batch)
        return TeacherSignals(output.logits, {i: output.boundaries[i] for i in (index, index + 1)})

    def forget_teacher(self) -> None:
        """Free the teacher's stage; from now on every batch must bring its signals along."""
        self.frozen.add_module("teacher_net", None)

    def student_output(
        self, batch: Batch, before: torch.Tensor | None, tail: bool = True
    ) -> tuple[StudentOutput, torch.Tensor]:
        """
        Run the student net.

        Args:
            batch: inputs of the model.
            before: (B, T, teacher width) that goes into the stage; unused in the first.
            tail: whether to go on through the meta model to logits.

        Returns:
            output of the stage, and the hidden states (B, T, teacher width) after its stitch; those of the stage
            itself in the last one, which has no stitch.
        """
        entering = None if self.spec.is_first else self.stitch_in(before)
        output = self.student(batch, entering)
        leaving = self.stitch_out(output.hidden_states)
        if output.logits is None and tail:
            output = output._replace(logits=cast(CutModel, self.frozen.meta).after(batch, self.spec.index, leaving))
        return output, leaving

    def forward(
        self,
        signals: Mapping[str, torch.Tensor] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_tokens_in_batch: torch.Tensor | int | None = None,
        router_statistics: RouterStatistics | None = None,
        **batch: Any,
    ) -> dict[str, Any]:
        """
        Args:
            signals: `TeacherSignals.tensors()` of this batch, from a cache; None asks the teacher.
            num_items_in_batch, num_tokens_in_batch, router_statistics: as of `ModMoEForCausalLM.forward`.
            batch: inputs of the model, and labels.

        Returns:
            "loss" with gradient, and its parts without: "cross_entropy", "kl" or "hard" unless the pair is local,
            "hidden", "relation" and "router"; and the loads of the stage's routers, see `StudentStage.loads`.
        """
        given = self.teacher_signals(batch) if signals is None else TeacherSignals.of(signals)
        index = self.spec.index
        targets = self.targets_of(batch)
        output, leaving = self.student_output(batch, given.boundaries.get(index), tail=not self.is_local)
        exit_states = given.boundaries.get(index + 1)
        losses = self.objective.losses(
            output.logits,
            targets,
            given.logits,
            hidden=[] if exit_states is None or self.spec.is_last else [(leaving, exit_states)],
            relations=[] if exit_states is None else [(output.hidden_states, exit_states)],
            token_mask=real_tokens(batch),
            num_items=num_items_in_batch,
            num_tokens=num_tokens_in_batch,
        )
        routers = self.student.router_losses(
            output, batch, targets, num_items_in_batch, num_tokens_in_batch, router_statistics
        )
        if routers is not None:
            losses["loss"] = losses["loss"] + self.student.config.router_aux_loss_coef * routers.contribution
            losses["router"] = routers.aux_loss.detach()
        return losses | self.student.loads(output, batch)

    def score(self, batch: Batch) -> dict[str, Any]:
        """As `forward`, of labels alone: no teacher is asked."""
        output = self._output_without_teacher(batch)
        assert output.logits is not None
        return PRETRAIN.losses(output.logits, self.targets_of(batch), None) | self.student.loads(output, batch)

    @torch.no_grad()
    def router_statistics(self, batch: Batch) -> RouterStatistics | None:
        """First pass of `aux_scope="global_batch"`, see `ModMoEForCausalLM.router_statistics`."""
        return self.student.statistics_of(self._output_without_teacher(batch, tail=False), batch)

    def _output_without_teacher(self, batch: Batch, tail: bool = True) -> StudentOutput:
        meta, index = cast(CutModel, self.frozen.meta), self.spec.index
        return self.student_output(batch, None if self.spec.is_first else meta.until(batch, index), tail)[0]

    def save(self, directory: Path) -> None:
        """Write the student's stage and, in a file of their own, its stitches."""
        self.student.save(directory, stitch=self.stitch)
        stitches = {
            f"{name}.{key}": tensor.detach().cpu().contiguous()
            for name in ("stitch_in", "stitch_out")
            for key, tensor in getattr(self, name).state_dict().items()
        }
        save_file(stitches, directory / STITCHES)
