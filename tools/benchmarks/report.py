"""Rows as text and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_COLUMNS = (
    f"{'contender':28}{'median':>12}{'tokens/s':>13}{'roofline':>10}{'worst error':>13}{'peak MiB':>10}   "
    "times as fast as"
)


@dataclass(frozen=True)
class Row:
    """The results of one workload; dictionaries are by contender.

    Attributes:
        name: of the workload.
        rounds: that the medians are taken over.
        tokens: that one run works on.
        seconds: median of one run.
        quartiles: the first and the third, in seconds.
        ratios: of each of ours, the seconds of each rival over its own.
        bound: "torch.mm" or "copy", the one at whose speed the work takes longer.
        roofline: fraction of the speed of `bound` that was reached, by those that do the whole work.
        peak_growth_mib: growth of peak memory during a run; None where it cannot be known.
        errors: by output and gradient, relative L2 distance from float64.
        fractions: whatever else the workload knows, by name.
        absent: who could not run, and why.
    """

    name: str
    rounds: int
    tokens: int
    seconds: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    ratios: dict[str, dict[str, float]]
    bound: str
    roofline: dict[str, float]
    peak_growth_mib: dict[str, float | None]
    errors: dict[str, dict[str, float]]
    fractions: dict[str, float]
    absent: dict[str, str]

    def text(self) -> str:
        """The row as lines under those of `header`."""
        lines = [f"{self.name}   [{self.rounds} rounds, bound by {self.bound}]"]
        lines += [self._line(name) for name in self.seconds]
        lines += [f"  {name:26}absent: {reason}" for name, reason in self.absent.items()]
        lines += [f"  {name}: {value:.1%}" for name, value in self.fractions.items()]
        return "\n".join(lines)

    def _line(self, name: str) -> str:
        seconds, memory = self.seconds[name], self.peak_growth_mib[name]
        roofline = f"{self.roofline[name]:.1%}" if name in self.roofline else ""
        ratios = ", ".join(f"{ratio:.2f}x {rival}" for rival, ratio in self.ratios.get(name, {}).items())
        return (
            f"  {name:26}{seconds * 1000:>9.3f} ms{self.tokens / seconds:>13,.0f}{roofline:>10}"
            f"{_worst(self.errors[name]):>13.1e}{'?' if memory is None else f'{memory:.1f}':>10}   {ratios}"
        )


def _worst(errors: dict[str, float]) -> float:
    """NaN if any is: `max` would pass over it."""
    return math.nan if any(map(math.isnan, errors.values())) else max(errors.values())


def header(environment: dict[str, Any]) -> str:
    """What stands above the rows: where they were measured, versions of what is there, and columns."""
    facts = {key: f"{x:.3g}" if isinstance(x, float) else x for key, x in environment.items() if key != "versions"}
    versions = {name: version for name, version in environment["versions"].items() if version}
    lines = (", ".join(f"{key} {value}" for key, value in items.items() if value) for items in (facts, versions))
    return "\n".join([*lines, _COLUMNS])


def absentees(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Who could not run, why, and in which rows; one entry for each name and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.absent.items():
            found.setdefault((name, reason), []).append(row.name)
    return [{"contender": name, "reason": reason, "rows": names} for (name, reason), names in found.items()]


def write_json(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    content = {"environment": environment, "absent": absentees(rows), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n")
