"""What a phase costs, over all launches that it was resumed in."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from modmoe.training.ranks.bootstrap import is_main_process, world_size

_FILE = "costs.json"
_NOTE_SECONDS = 10.0  # a process that is killed loses no more


class Cost(NamedTuple):
    """Of all launches of a phase."""

    wall_seconds: float
    cpu_seconds: float
    """Of all threads, and of all processes, which are taken to be as busy as the first."""


@contextlib.contextmanager
def measured(directory: Path) -> Iterator[None]:
    """The context of one launch, whose cost is noted while it runs and however it ends."""
    if not is_main_process():
        yield
        return
    launch, wall, cpu = f"{time.time():.3f}", time.monotonic(), time.process_time()
    ended = threading.Event()

    def note() -> None:
        if directory.is_dir():
            cost = Cost(time.monotonic() - wall, (time.process_time() - cpu) * world_size())
            temporary = directory / f".{_FILE}.tmp"
            with contextlib.suppress(OSError):  # a full disk stops the training itself, and says so
                with temporary.open("w") as file:
                    json.dump(_launches(directory) | {launch: cost}, file)
                    file.flush()
                    os.fsync(file.fileno())  # else a power cut could leave an empty file
                os.replace(temporary, directory / _FILE)

    def keep_noting() -> None:
        while not ended.wait(_NOTE_SECONDS):
            note()

    notes = threading.Thread(target=keep_noting, daemon=True)
    notes.start()
    try:
        yield
    finally:
        ended.set()
        notes.join()
        note()


def cost_of(directory: Path) -> Cost:
    """Of a phase; nothing if it has none."""
    launches = _launches(directory)
    return (
        Cost(*(round(sum(values), 2) for values in zip(*launches.values(), strict=True)))
        if launches
        else Cost(0.0, 0.0)
    )


def _launches(directory: Path) -> dict[str, Cost]:
    """By when they began, as far as they are known; of a run that begins anew the file is removed."""
    try:
        content = json.loads((directory / _FILE).read_text())
        return {launch: Cost(*cost) for launch, cost in content.items()}
    except (
        FileNotFoundError,
        ValueError,
        AttributeError,
        TypeError,
    ):  # a damaged file must not hide how training ended
        return {}
