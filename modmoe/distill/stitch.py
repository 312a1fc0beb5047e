"""What joins a student's stage to the teacher's width: a stitch before it and one after it.

Two kinds. "linear" is m2mKD's (arXiv:2402.16918): a norm and a linear map, trained with the stage; every pair learns
its own, and in the assembled student they are dropped. They cannot be folded into the neighbours: a pre-norm block
adds to its input, so that a matrix M between two blocks would have to pass through the sum x + f(norm(x)), and through
the norm of every block after it. That is exact for orthogonal M and plain RMSNorm only (arXiv:2401.15024), and the
product of two learned maps is not orthogonal.

"projection" makes dropping exact instead. One matrix P (teacher width x student width) with orthonormal columns
serves every boundary: h P on the way in, x P^T on the way out. Between two stages of the student that is
x P^T P = x, nothing. P spans the principal directions of the teacher's hidden states and is not trained. Between equal
widths it is the identity and there is no stitch, so that a student with the teacher's weights starts as the teacher.
A student wider than the teacher has no such P.
"""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import nn

from modmoe.distill.ranges import StageSpec

StitchKind = Literal["projection", "linear"]


class Projection(nn.Module):
    """
    (..., Ht) -> (..., Hs), or back.

    Args:
        weight: (Ht, Hs) with orthonormal columns.
        back: whether from the student's width to the teacher's.
    """

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, back: bool) -> None:
        super().__init__()
        self.back = back
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return hidden_states @ (weight.T if self.back else weight)


def build_stitches(
    spec: StageSpec,
    width: int,
    kind: StitchKind,
    projection: torch.Tensor | None = None,
    norm: type[nn.Module] = nn.RMSNorm,
) -> tuple[nn.Module, nn.Module]:
    """
    The stitches before and after a student's stage; identities before the first stage and after the last.

    Args:
        spec: of the teacher's stage.
        width: of the student.
        kind: see above.
        projection: (teacher width, student width) for "projection" between different widths, from
            `principal_projection`; the same for all stages.
        norm: class of the norm of "linear".

    Raises:
        ValueError: for an unknown kind, or a projection that is missing, not needed or of another shape.
    """
    if kind not in get_args(StitchKind):
        raise ValueError(f"stitch={kind!r} must be one of {', '.join(get_args(StitchKind))}")
    ends = ((spec.is_first, spec.input_width, width), (spec.is_last, width, spec.output_width))
    before, after = (
        nn.Identity() if no_stitch else _stitch(source, target, kind, projection, norm, back)
        for back, (no_stitch, source, target) in enumerate(ends)
    )
    return before, after


def _stitch(
    source: int, target: int, kind: StitchKind, projection: torch.Tensor | None, norm: type[nn.Module], back: int
) -> nn.Module:
    if kind == "linear":
        linear = nn.Linear(source, target, bias=False)
        nn.init.eye_(linear.weight) if source == target else nn.init.orthogonal_(linear.weight)
        return nn.Sequential(norm(source), linear)
    if source == target:
        return nn.Identity()
    shape = (target, source) if back else (source, target)
    _check_projection(projection, *shape)
    assert projection is not None
    return Projection(projection, bool(back))


def _check_projection(projection: torch.Tensor | None, teacher_width: int, student_width: int) -> None:
    if student_width > teacher_width:
        raise ValueError(
            f"the student's width {student_width} is larger than the teacher's {teacher_width}: stitch='projection' "
            "has no orthonormal columns for it; use stitch='linear' or a narrower student"
        )
    if projection is None or projection.shape != (teacher_width, student_width):
        found = "none" if projection is None else f"one of shape {tuple(projection.shape)}"
        raise ValueError(
            f"stitch='projection' between widths {teacher_width} and {student_width} needs a projection of shape "
            f"{(teacher_width, student_width)}, got {found}: make it with principal_projection"
        )


def principal_projection(states: Iterable[torch.Tensor], width: int) -> torch.Tensor:
    """
    The orthonormal directions that hold most of hidden states, each of length one.

    Lengths are taken away because a few tokens and the deep boundaries would otherwise decide alone.

    Args:
        states: (N, H) each: real tokens, of all boundaries.
        width: how many directions, at most H.

    Returns:
        (H, width) fp32, the most important direction first.

    Raises:
        ValueError: for no states, or a width above H.
    """
    moment: torch.Tensor | None = None
    for batch in states:
        rows = nn.functional.normalize(batch.detach().double(), dim=-1)
        moment = rows.T @ rows if moment is None else moment + rows.T @ rows
    if moment is None:
        raise ValueError("there are no hidden states to take principal directions of: give at least one batch")
    if not 1 <= width <= len(moment):
        raise ValueError(f"width={width} must be between 1 and the width of the hidden states, {len(moment)}")
    directions = torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :width]
    return directions.float().contiguous()
