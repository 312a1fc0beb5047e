"""How a tool runs and ends."""

import signal
import sys
from collections.abc import Callable


def run(action: Callable[[], str]) -> int:
    """
    Carry out what a command line asks for and print what came of it; SIGTERM ends it with exit code 143.

    Returns:
        the exit code: 0, or 2 after a mistake, which is told in one line.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that unfinished files are removed
    try:
        print(action())
    except (ValueError, OSError, ImportError) as error:
        # Ours are one sentence; some of transformers' go on about its installation.
        print(f"error: {(str(error).splitlines() or [repr(error)])[0]}", file=sys.stderr)
        return 2
    return 0
