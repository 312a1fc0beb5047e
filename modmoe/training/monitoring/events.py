"""events.jsonl: what happened to a run beside its metrics, and when."""

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from modmoe.training.ranks.bootstrap import is_main_process

logger = logging.getLogger(__name__)


class Events:
    """
    One JSON object per event, appended by rank 0 and shown on the console. A resumed run adds to the file, so that a
    repeated step can be there twice.

    Args:
        path: of events.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, kind: str, step: int, message: str, **figures: Any) -> None:
        """Write one event. Called by any rank."""
        if not is_main_process():
            return
        logger.warning("step %d: %s", step, message)
        record = {"step": step, "time": round(time.time(), 3), "event": kind, "message": message, **figures}
        with contextlib.suppress(OSError), self.path.open("a") as file:  # no event is worth the run
            file.write(json.dumps(record) + "\n")
