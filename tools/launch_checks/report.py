"""What was found, and how it is printed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from .facts import Expectation, Facts


@dataclass(frozen=True)
class Bandwidth:
    """
    Speed of one collective among one group of ranks.

    Attributes:
        collective: "all-to-all" or "all-reduce".
        scope: "all ranks", "within nodes" or "between nodes".
        group: its ranks.
        message: bytes per rank.
        speed: bytes per second that leave each rank.
    """

    collective: str
    scope: str
    group: tuple[int, ...]
    message: int
    speed: float


@dataclass(frozen=True)
class Fault:
    """Something that went wrong for one rank in a directory: "write", "unseen", "torn", "stale" or "lost"."""

    rank: int
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Directory:
    """
    What a directory is good for.

    Attributes:
        path: as rank 0 knows it.
        free: bytes free on its file system.
        write_speed: bytes per second of the slowest rank while all write; 0 if it was not measured.
        faults: what went wrong.
        needed: bytes that the run will write there; 0 if nobody knows.
        pieces: what these consist of.
    """

    path: str
    free: int
    write_speed: float
    faults: tuple[Fault, ...] = ()
    needed: int = 0
    pieces: str = ""


@dataclass(frozen=True)
class Report:
    """
    All findings, on rank 0.

    Attributes:
        facts: of each rank, in the order of ranks.
        expectations: how large the launch was meant to be.
        backend: "nccl" or "gloo"; empty if no collective ran.
        wrong: collectives with wrong results, with the ranks that saw them.
        bandwidths: speeds.
        clocks: seconds by which each rank's clock is ahead of rank 0's.
        directories: tests of the file system.
    """

    facts: tuple[Facts, ...]
    expectations: tuple[Expectation, ...] = ()
    backend: str = ""
    wrong: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bandwidths: tuple[Bandwidth, ...] = ()
    clocks: tuple[float, ...] = ()
    directories: tuple[Directory, ...] = ()

    @property
    def nodes(self) -> dict[int, list[Facts]]:
        """Node -> its ranks."""
        found: dict[int, list[Facts]] = {}
        for fact in self.facts:
            found.setdefault(fact.node_rank, []).append(fact)
        return found


def table(report: Report) -> str:
    """The findings in some lines."""
    first = report.facts[0]
    nodes = ", ".join(f"{ranks[0].host}: {len(ranks)}" for ranks in report.nodes.values())
    rows = {"ranks": f"{len(report.facts)} on {len(report.nodes)} node(s) ({nodes})"}
    rows["expected"] = "; ".join(_expected(e) for e in report.expectations) or "nothing says how many (--expect-world)"
    rows["versions"] = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    rows["code"] = first.code
    rows["device"] = first.gpu or f"cpu, {first.cores} core(s), OMP_NUM_THREADS {first.threads or 'not set'}"
    if report.backend:
        rows["collectives"] = f"over {report.backend}, {'wrong' if report.wrong else 'right'}"
    if report.clocks:
        rows["clocks"] = f"{1e3 * (max(report.clocks) - min(report.clocks)):.1f} ms apart"
    for directory in report.directories:
        needs = f", {size(directory.needed)} needed" if directory.needed else ""
        speed = f"; all ranks write at {size(directory.write_speed)}/s each" if directory.write_speed else ""
        rows[f"directory {directory.path}"] = f"{size(directory.free)} free{needs}{speed}"
    lines = [f"{name:>12}: {text}" for name, text in rows.items()]
    return "\n".join([*lines, *_speeds(report.bandwidths)])


def _expected(expectation: Expectation) -> str:
    parts = [
        f"{n} {what}" for n, what in ((expectation.ranks, "ranks"), (expectation.nodes, "nodes")) if n is not None
    ]
    return f"{' on '.join(parts)} by {expectation.source}" if parts else expectation.source


def _speeds(bandwidths: Sequence[Bandwidth]) -> list[str]:
    """One row per collective and scope, one column per message size; the median over groups."""
    if not bandwidths:
        return []
    messages = sorted({b.message for b in bandwidths})
    lines = ["", f"{'sent per rank and second':>26}" + "".join(f"{size(message):>12}" for message in messages)]
    for collective, scope in dict.fromkeys((b.collective, b.scope) for b in bandwidths):
        ours = [b for b in bandwidths if (b.collective, b.scope) == (collective, scope)]
        cells = [size(median(b.speed for b in ours if b.message == message)) for message in messages]
        lines.append(f"{f'{collective} {scope}':>26}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
