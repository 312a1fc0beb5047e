"""The ranks of a run before and beside collectives: finding each other, waiting, comparing notes.

All of it goes through a key-value store that rank 0 holds, which needs no process group and names who is missing.
"""

import contextlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from modmoe.training.errors import RunError, SharedError
from modmoe.training.ranks.bootstrap import world_size
from modmoe.training.ranks.lines import Hub, Line

_JOINS = itertools.count()  # keys of an earlier run in these processes must not answer for this one's
_PREPARATION_SECONDS = 4 * 3600  # what rank 0 may take to tokenise while the others wait


class Team:
    """
    The ranks of a run; made by `join`.

    Args:
        rank: of this process.
        size: number of ranks.
        store: that all of them can reach; None for a single process.

    Attributes:
        line: breaks when a rank dies; None for a single process.
    """

    def __init__(self, rank: int, size: int, store: dist.Store | None) -> None:
        self.rank, self.size = rank, size
        self.line: Hub | Line | None = None
        self._store = store
        self._node = f"{socket.gethostname()}"

    def gather(self, name: str, value: Any, seconds: float) -> list[Any]:
        """
        Every rank's value, in the order of ranks, on all ranks.

        Args:
            name: used once; says what is waited for.
            value: anything that JSON holds.
            seconds: to wait for the slowest.

        Raises:
            SharedError: names the ranks that did not come in time.
        """
        if self._store is None:
            return [value]
        self._set(f"{name}/{self.rank}", value)
        if self.rank != 0:
            # Rank 0 knows who is missing, and should be the first to say so.
            result = self._wait(f"{name}/all", seconds + 10)
            if isinstance(result, str):
                raise SharedError(result)
            return result
        missing = self._missing(name, seconds)
        if missing:
            message = (
                f"{_ranks(missing)} of {self.size} did not come to {name!r} within {seconds:.0f} s: look at their "
                "output, and check that the launcher's list of hosts is right and that they can reach rank 0"
            )
            self._set(f"{name}/all", message)
            time.sleep(1.0)  # the store ends with this process
            raise SharedError(message)
        values = [self._get(f"{name}/{rank}") for rank in range(self.size)]
        self._set(f"{name}/all", values)
        return values

    @contextlib.contextmanager
    def first_on_each_node(self, name: str) -> Iterator[None]:
        """The context in which one rank of each machine goes first and the others follow once it is done."""
        if self._store is None:
            yield
            return
        nodes = self.gather(f"{name}: nodes", self._node, _PREPARATION_SECONDS)
        if nodes.index(self._node) == self.rank:
            yield
            self._set(f"{name}/{self._node}", True)
        else:
            self._wait(f"{name}/{self._node}", _PREPARATION_SECONDS)
            yield
        self.gather(f"{name}: done", True, _PREPARATION_SECONDS)

    def _missing(self, name: str, seconds: float) -> list[int]:
        deadline, pause = time.monotonic() + seconds, 0.01
        missing = list(range(self.size))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self._has(f"{name}/{rank}")]
            time.sleep(pause if missing else 0)
            pause = min(1.0, pause * 1.5)
        return missing

    def _wait(self, key: str, seconds: float) -> Any:
        deadline, pause = time.monotonic() + seconds, 0.01
        while not self._has(key):
            if time.monotonic() > deadline:
                raise RunError(f"rank {self.rank} on {self._node} waited {seconds:.0f} s for {key!r}")
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)
        return self._get(key)

    def _has(self, key: str) -> bool:
        return bool(self._reach().check([key]))

    def _get(self, key: str) -> Any:
        return json.loads(self._reach().get(key))

    def _set(self, key: str, value: Any) -> None:
        self._reach().set(key, json.dumps(value))

    def _reach(self) -> dist.Store:
        assert self._store is not None
        return self._store


def join(join_seconds: float, collective_seconds: float) -> Team:
    """
    Meet the other ranks and make the process group, unless the caller has made one.

    Args:
        join_seconds: how long to wait for them.
        collective_seconds: how long a collective may take.

    Raises:
        SharedError: names the ranks that did not come.
        RunError: if rank 0 cannot be reached, or its port is taken.
    """
    size = world_size()
    if size == 1:
        return Team(0, 1, None)
    rank = int(os.environ["RANK"])
    made = dist.is_initialized()
    store = dist.PrefixStore(
        f"modmoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_JOINS)}",
        _get_default_store() if made else _store(rank, join_seconds),
    )
    team = Team(rank, size, store)
    mine = [socket.gethostname(), os.getpid()]
    try:
        everyone = team.gather("start", mine, join_seconds)
    except dist.DistError as error:
        raise RunError(f"rank {rank} on {mine[0]} has lost rank 0 at the start: look at its output") from error
    if everyone[rank] != mine:
        raise RunError(f"another run is using port {os.environ['MASTER_PORT']}: give this one another --master_port")
    hub = Hub(size) if rank == 0 else None
    address = team.gather("lines", hub and hub.address, join_seconds)[0]
    team.line = hub or Line(rank, os.environ["MASTER_ADDR"], address)
    if not made:
        _make_process_group(team, store, collective_seconds)
    return team


def _make_process_group(team: Team, store: dist.Store, collective_seconds: float) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=collective_seconds)
    store = dist.PrefixStore("collectives", store)
    dist.init_process_group(backend, store=store, rank=team.rank, world_size=team.size, timeout=timeout)


def _store(rank: int, seconds: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the store itself
    try:
        return dist.TCPStore(
            host,
            port,
            world_size(),
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            reason = "is taken, perhaps by another run: give this one another --master_port"
        elif rank == 0:
            reason = f"cannot be opened by rank 0: {str(error).splitlines()[0]}"
        else:
            reason = (
                f"was not answered within {seconds:.0f} s of rank {rank} on {socket.gethostname()} asking: check "
                "MASTER_ADDR, that rank 0 has started there, and firewalls between the machines"
            )
        raise RunError(f"port {port} of {host} {reason}") from error


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
