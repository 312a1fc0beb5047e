"""What a phase costs, over all launches that it was resumed in."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from modmoe.training.ranks.bootstrap import is_main_process, world_size

_FILE = "costs.jsonl"


class Cost(NamedTuple):
    """Of all launches of a phase."""

    wall_seconds: float
    cpu_seconds: float
    """Of all threads, and of all processes, which are taken to be as busy as the first."""


@contextlib.contextmanager
def measured(directory: Path) -> Iterator[None]:
    """The context of one launch, whose cost is noted however it ends; a process that is killed notes nothing."""
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        if is_main_process() and directory.is_dir():
            cost = Cost(time.monotonic() - wall, (time.process_time() - cpu) * world_size())
            with (directory / _FILE).open("a") as file:
                file.write(json.dumps(cost._asdict()) + "\n")


def cost_of(directory: Path) -> Cost:
    """Of a phase; nothing if it has none."""
    path = directory / _FILE
    launches = [Cost(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
    return Cost(*(round(sum(values), 2) for values in zip(*launches, strict=True))) if launches else Cost(0.0, 0.0)
