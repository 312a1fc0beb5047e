"""How the ranks find each other within a bounded time, before anything that could hang."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import TCPStore

from .facts import Facts, Place


class Failure(RuntimeError):
    """Ends the check; the message is for its user, and empty where another rank has it."""


def meet(place: Place, environment: Mapping[str, str], seconds: float) -> TCPStore:
    """
    Join the store that rank 0, or torchrun, serves at MASTER_ADDR and MASTER_PORT.

    Raises:
        Failure: if it is not there in time, or something else is.
    """
    serves = place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:  # the base of torch's network and store errors
        if serves:
            raise Failure(
                f"{place.name} cannot listen on port {place.port}: another program has it, perhaps an earlier run; "
                f"end that, or choose another --master_port ({_first_line(error)})"
            ) from None
        raise Failure(
            f"{place.name} did not reach rank 0 at {place.address}:{place.port} within {seconds:.0f} s: check that "
            "its node was started, --master_addr and --master_port, and that no firewall is in between"
        ) from None


def exchange(store: TCPStore, place: Place, facts: Facts, seconds: float) -> list[Facts]:
    """
    Hand in this rank's facts and wait until all have come.

    Returns:
        of all ranks on rank 0, an empty list elsewhere.

    Raises:
        Failure: if ranks are missing.
    """
    store.set(f"facts/{place.rank}", json.dumps(asdict(facts)))
    if place.rank != 0:
        # As long as rank 0 waits for those that come later, and a little more.
        _wait_for(store, "complete", 2 * seconds, place)
        return []
    deadline = time.monotonic() + seconds
    missing = list(range(place.world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"facts/{rank}"])]
        time.sleep(0.05 if missing else 0)
    found = {r: Facts(**json.loads(store.get(f"facts/{r}"))) for r in range(place.world_size) if r not in missing}
    store.set("complete", "no" if missing else "yes")
    if missing:
        hosts = ", ".join(sorted({facts.host for facts in found.values()}))
        ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise Failure(
            f"rank(s) {ranks} of {place.world_size} did not arrive within {seconds:g} s (the others are on {hosts}): "
            "see what their nodes printed, and that the launcher was started on each with its own --node_rank"
        )
    return [found[rank] for rank in range(place.world_size)]


def _wait_for(store: TCPStore, key: str, seconds: float, place: Place) -> None:
    try:
        store.wait([key], timedelta(seconds=seconds))
        complete = store.get(key) == b"yes"
    except RuntimeError:
        raise Failure(f"{place.name} lost rank 0, see what that printed") from None
    if not complete:
        raise Failure("")


@contextlib.contextmanager
def bounded(what: str, remedy: str, place: Place, seconds: float) -> Iterator[None]:
    """Leave the process with a message if the block takes longer; what hangs in a network cannot be interrupted."""

    def leave() -> None:
        message = f"problem: {place.name}: {what} did not end within {seconds:.0f} s: {remedy}"
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
