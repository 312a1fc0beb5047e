"""A thread in every rank that ends the process when the run cannot go on.

The main thread may be stuck in a collective with a rank that is gone, where no signal and no exception reaches it.
"""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from modmoe.training.errors import ConfigError, DivergedError, RunError, exit_code
from modmoe.training.ranks.launcher import Launcher
from modmoe.training.ranks.lines import Ended
from modmoe.training.ranks.team import Team
from modmoe.training.status import RunStatus

_INTERVAL = 1.0
_PATIENCE = 2.0  # seconds for the main thread to fail by itself, in its own words


class Watchdog:
    """
    Watches launcher, ranks and progress while its context is open, and tells the others of an exception that ends it.

    Args:
        team: the ranks.
        stuck_seconds: without progress after which the process leaves, once progress has begun.

    Attributes:
        status: to be told of the end; None while there is no output directory.
    """

    def __init__(self, team: Team, stuck_seconds: float) -> None:
        self.status: RunStatus | None = None
        self._team = team
        self._stuck_seconds = stuck_seconds
        self._deadline: float | None = None
        self._preparing = True
        self._launcher = Launcher()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self) -> None:
        """Training goes on: a step, an evaluation or a save has begun or ended."""
        self._preparing = False
        self._deadline = time.monotonic() + self._stuck_seconds

    def rest(self) -> None:
        """Training is over, and no progress is expected."""
        self._deadline = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._close()
            return
        if not isinstance(error, ConfigError | RunError):
            # Perhaps a collective has failed because a rank died: then the thread knows more, and ends the process.
            time.sleep(2 * _INTERVAL + _PATIENCE if self._team.line else 0)
        reason = str(error) or type(error).__name__
        self._note_end("diverged" if isinstance(error, DivergedError) else "failed", exit_code(error), reason)
        if self._team.line is not None:
            self._team.line.say(Ended(self._team.rank, exit_code(error), reason))
        self._close()

    def _close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=2 * _INTERVAL)
        if self._team.line is not None:
            self._team.line.goodbye()

    def _watch(self) -> None:
        while not self._closed.is_set():
            if self._team.line is None:
                self._closed.wait(_INTERVAL)
            else:
                ended = self._team.line.poll(_INTERVAL)
                if ended is not None:
                    self._follow(ended)
            if self.status is not None:
                self.status.beat()
            if self._preparing and self._launcher.is_gone():
                self._leave(143, "the launcher is gone", says_it=os.environ.get("LOCAL_RANK", "0") == "0")
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._leave_stuck()

    def _follow(self, ended: Ended) -> None:
        if self._closed.wait(_PATIENCE):
            return
        what = "died" if ended.reason is None else f"failed: {ended.reason}"
        speaker = 1 if ended.rank == 0 else 0
        self._leave(ended.exit_code, f"rank {ended.rank} {what}", says_it=self._team.rank == speaker)

    def _leave_stuck(self) -> None:
        faulthandler.dump_traceback(all_threads=True)
        reason = f"no progress for {self._stuck_seconds:.0f} s (health.stuck_minutes)"
        if self._team.line is not None:
            self._team.line.say(Ended(self._team.rank, 1, reason))
        self._leave(1, f"rank {self._team.rank} leaves: {reason}; its stack is above", says_it=True)

    def _leave(self, code: int, reason: str, says_it: bool) -> None:
        self._note_end("failed", code, reason)
        if says_it:
            print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(code)

    def _note_end(self, state: str, code: int, reason: str) -> None:
        if self.status is not None:
            self.status.end(state, code, reason)
