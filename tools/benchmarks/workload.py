"""What is measured: a workload, the contenders that do it, and the work that none of them can avoid."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

Run: TypeAlias = Callable[[Any], dict[str, Tensor]]
"""Does the work once on the workload's inputs and returns outputs and gradients by name."""

Role: TypeAlias = Literal["ours", "baseline", "peer"]


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: unique in its workload.
        run: may raise; the contender is then listed as absent, with the message as the reason.
        reference: the same numbers from inputs in float64, computed plainly.
        role: "ours" is compared with "baseline" (ours in plain PyTorch) and "peer" (everybody else's), and so is
            "baseline" with "peer".
        whole: False if it does only a part of the work, and so has no place under the roofline.
    """

    name: str
    run: Run
    reference: Run
    role: Role = "peer"
    whole: bool = True


def _no_fractions(seconds: Mapping[str, float]) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Workload:
    """Inputs and who works on them. Cheap to make: whatever takes memory is made by the first `draw`.

    Attributes:
        name: what `--only` is matched with.
        draw: new random inputs, a tensor or a named tuple.
        contenders: see `Contender`.
        tokens: how many one run works on, for tokens per second.
        flops: of the matrix products of one run, early stop not counted: it can exceed the roofline.
        bytes: that one run must read and write at least, each operand once for each product it takes part in.
        whole_model: slow, so measured in fewer rounds.
        fractions: from the median seconds of each contender to further results between 0 and 1, by name.
    """

    name: str
    draw: Callable[[], Any]
    contenders: Sequence[Contender]
    tokens: int
    flops: float
    bytes: float
    whole_model: bool = False
    fractions: Callable[[Mapping[str, float]], dict[str, float]] = _no_fractions
