"""Launches, and two nodes on one machine."""

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass

import pytest

from tests.launching import launch, start, workspace

__all__ = ["launch", "start", "workspace"]


@dataclass(frozen=True)
class Node:
    """A network namespace; processes in it have no other network than the cable to the other node."""

    name: str
    address: str
    interface: str = "veth0"

    @property
    def prefix(self) -> list[str]:
        """Before a command, to run it on this node."""
        return ["ip", "netns", "exec", self.name]

    @property
    def host(self) -> str:
        """Both nodes have the name of the machine."""
        return socket.gethostname()

    @property
    def environment(self) -> dict[str, str]:
        """Gloo would otherwise bind to what the machine's host name resolves to."""
        return {"GLOO_SOCKET_IFNAME": self.interface}


@pytest.fixture(scope="module")
def nodes():
    """Two network namespaces joined by a pair of virtual Ethernet devices; the processes of a test must be gone."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes need the command `ip` (iproute2)")
    pair = [Node(f"modmoe{os.getpid()}{side}", f"10.77.0.{1 + i}") for i, side in enumerate("ab")]
    try:
        _connect(*pair)
        yield pair
    finally:
        for node in pair:
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True)


def _connect(first: Node, second: Node) -> None:
    commands = [f"ip netns add {node.name}" for node in (first, second)]
    ends = [f"{node.interface} netns {node.name}" for node in (first, second)]
    commands.append(f"ip link add {ends[0]} type veth peer name {ends[1]}")
    for node in (first, second):
        commands.append(f"ip -n {node.name} addr add {node.address}/24 dev {node.interface}")
        commands += [f"ip -n {node.name} link set {device} up" for device in ("lo", node.interface)]
    for command in commands:
        result = subprocess.run(command.split(), capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"two nodes need network namespaces: `{command}`: {result.stderr.strip()}")


def pytest_terminal_summary(terminalreporter):
    """The rows of the fault table in docs/distributed.md."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [p for report in reports if getattr(report, "when", "") == "call" for p in report.user_properties]
    rows = [value for name, value in properties if name == "fault"]
    if rows:
        terminalreporter.section("faults")
    for row in rows:
        terminalreporter.write_line("| " + " | ".join(map(str, row)) + " |")
