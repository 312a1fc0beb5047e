"""Lines from every rank to rank 0, which break when the process at either end dies.

Collectives notice a dead rank late or never: over NCCL the others wait for it until a timeout. The system closes the
sockets of a process whatever kills it, and keepalive finds machines that have lost power or network within 35 s.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from typing import Any, NamedTuple

_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes; Linux
_LONGEST = 1 << 16  # bytes of a message


class Ended(NamedTuple):
    """How a rank ended prematurely."""

    rank: int
    exit_code: int
    reason: str | None
    """The rank's own message; None if it died without one."""


class Hub:
    """
    Rank 0's end of all lines.

    Args:
        world_size: ranks, this one included.

    Attributes:
        address: port and password, for the others.
    """

    def __init__(self, world_size: int) -> None:
        self._listener = socket.create_server(("", 0), family=_family(), backlog=world_size, dualstack_ipv6=_dual())
        self._password = secrets.token_hex(8)
        self.address = f"{self._listener.getsockname()[1]} {self._password}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ranks: dict[socket.socket, int] = {}
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def poll(self, seconds: float) -> Ended | None:
        """Wait so long for news of a rank that has ended; pass them on to the others."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
                continue
            ended = self._read(key.fileobj)  # type: ignore[arg-type]
            if ended is not None:
                self.say(ended)
                return ended
        return None

    def say(self, ended: Ended) -> None:
        """Tell every rank."""
        self._tell({"ended": ended})

    def goodbye(self) -> None:
        """End the lines as agreed."""
        self._tell({"bye": True})
        self.close()

    def close(self) -> None:
        """Close all sockets."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        # Also in data workers, without the lock: a socket that they inherit would outlive this rank.
        for line in [*self._ranks, self._listener]:
            line.close()
        self._ranks = {}

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            for line in self._ranks:
                _send(line, message)

    def _accept(self) -> None:
        line, _ = self._listener.accept()
        _keep_alive(line)
        line.settimeout(1.0)  # the first message follows at once; a stranger's silence must not hold us up
        try:
            hello = _receive(line)
            if not hello or not isinstance(hello[0], dict) or hello[0].get("password") != self._password:
                raise ValueError
        except (OSError, ValueError):
            line.close()
            return
        with self._lock:
            self._ranks[line] = int(hello[0]["rank"])
        self._selector.register(line, selectors.EVENT_READ)

    def _read(self, line: socket.socket) -> Ended | None:
        try:
            messages = _receive(line)
        except (OSError, ValueError):
            messages = None
        if messages and "ended" in messages[0]:
            return Ended(*messages[0]["ended"])
        with self._lock:
            rank = self._ranks.pop(line)
        self._selector.unregister(line)
        line.close()
        return None if messages else Ended(rank, 1, None)  # what else is said is goodbye


class Line:
    """
    The end of another rank's line.

    Args:
        rank: this one.
        host: of rank 0.
        address: of its hub.
    """

    def __init__(self, rank: int, host: str, address: str) -> None:
        port, password = address.split()
        self._line: socket.socket | None = socket.create_connection((host, int(port)), timeout=30)
        _keep_alive(self._line)
        _send(self._line, {"rank": rank, "password": password})
        self._rank = rank
        os.register_at_fork(after_in_child=self.close)

    def poll(self, seconds: float) -> Ended | None:
        """Wait so long for news of a rank that has ended."""
        if self._line is None:
            time.sleep(seconds)
            return None
        self._line.settimeout(seconds)
        try:
            messages = _receive(self._line)
        except TimeoutError:
            return None
        except (OSError, ValueError):
            messages = []
        if messages and "ended" in messages[0]:
            return Ended(*messages[0]["ended"])
        self.close()
        return None if messages else Ended(0, 1, None)

    def say(self, ended: Ended) -> None:
        """Tell rank 0, which tells the others."""
        if self._line is not None:
            _send(self._line, {"ended": ended})

    def goodbye(self) -> None:
        """End the line as agreed."""
        if self._line is not None:
            _send(self._line, {"bye": True})
        self.close()

    def close(self) -> None:
        """Close the socket."""
        line, self._line = self._line, None
        if line is not None:
            line.close()


def _send(line: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the other end is gone, which its reader will notice
        line.sendall(json.dumps(message).encode()[: _LONGEST - 1] + b"\n")


def _receive(line: socket.socket) -> list[dict[str, Any]]:
    """Messages that have come; none if the other end is closed."""
    data = line.recv(_LONGEST)
    while data and not data.endswith(b"\n") and len(data) < 2 * _LONGEST:
        more = line.recv(_LONGEST)
        if not more:
            return []
        data += more
    return [json.loads(text) for text in data.splitlines()]


def _keep_alive(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _dual() -> bool:
    return socket.has_dualstack_ipv6()


def _family() -> socket.AddressFamily:
    return socket.AF_INET6 if _dual() else socket.AF_INET
