"""Whether collectives give the right numbers, how fast they are, and how far apart the clocks are."""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from .facts import Facts
from .report import Bandwidth

# Bytes per rank: what a small model exchanges in a step, and what a large one does.
MESSAGES = {"cpu": (2**16, 2**20, 2**24), "cuda": (2**20, 2**24, 2**28)}
ROUNDS = 5


def wrong_collectives(device: torch.device) -> list[str]:
    """Names of the collectives with wrong results on this rank; whole numbers, so that right means equal."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = torch.arange(world_size, device=device)
    total = torch.full((1000,), rank + 1, device=device)
    dist.all_reduce(total)
    shared = torch.full((1000,), rank, device=device)
    dist.broadcast(shared, src=world_size - 1)
    gathered = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(gathered, ranks[rank : rank + 1])
    right = {
        "all-reduce": bool((total == world_size * (world_size + 1) // 2).all()),
        "broadcast": bool((shared == world_size - 1).all()),
        "all-gather": torch.cat(gathered).equal(ranks),
        "uneven all-to-all": _uneven_all_to_all(rank, world_size, device),
    }
    return [name for name, is_right in right.items() if not is_right]


def _uneven_all_to_all(rank: int, world_size: int, device: torch.device) -> bool:
    """As experts receive tokens: some many, some none."""

    def rows(source: int, target: int) -> int:
        return 7 * ((source + target) % 3)

    sent = [rows(rank, other) for other in range(world_size)]
    received = [rows(other, rank) for other in range(world_size)]
    values = [torch.full((sent[other],), rank * world_size + other) for other in range(world_size)]
    expected = [torch.full((received[other],), other * world_size + rank) for other in range(world_size)]
    out = torch.empty(sum(received), dtype=torch.int64, device=device)
    dist.all_to_all_single(out, torch.cat(values).to(device), received, sent)
    return out.cpu().equal(torch.cat(expected))


def groups(facts: Sequence[Facts]) -> dict[str, list[tuple[int, ...]]]:
    """Scope -> groups of at least two ranks; nodes are told apart only where there are several."""
    found = {"all ranks": [tuple(range(len(facts)))]}
    nodes = {f.node_rank for f in facts}
    if len(nodes) > 1:
        found["within nodes"] = _grouped(facts, "node_rank")
        found["between nodes"] = _grouped(facts, "local_rank")
    return {scope: [group for group in found[scope] if len(group) > 1] for scope in found}


def _grouped(facts: Sequence[Facts], key: str) -> list[tuple[int, ...]]:
    values = sorted({getattr(f, key) for f in facts})
    return [tuple(f.rank for f in facts if getattr(f, key) == value) for value in values]


def bandwidths(scopes: dict[str, list[tuple[int, ...]]], device: torch.device) -> list[Bandwidth]:
    """Measure all groups of a scope at the same time, as training uses them; each group's first rank tells."""
    found = []
    for scope, members in scopes.items():
        handles = [dist.new_group(list(group)) for group in members]  # by all ranks, in the same order
        for group, handle in zip(members, handles, strict=True):
            if dist.get_rank() in group:
                measured = _measure(scope, group, handle, device)
                found += measured if dist.get_rank() == group[0] else []
        dist.barrier()
    return found


def _measure(scope: str, group: tuple[int, ...], handle: Any, device: torch.device) -> list[Bandwidth]:
    found = []
    for message in MESSAGES[device.type]:
        # Equal parts for all-to-all.
        values = torch.ones(message // 4 // len(group) * len(group), device=device)
        out = torch.empty_like(values)
        others = (len(group) - 1) / len(group)
        exchanged = _seconds(lambda: dist.all_to_all_single(out, values, group=handle), handle, device)  # noqa: B023
        reduced = _seconds(lambda: dist.all_reduce(out, group=handle), handle, device)  # noqa: B023
        found.append(Bandwidth("all-to-all", scope, group, message, message * others / exchanged))
        # A ring sends each part twice: once to add, once to spread.
        found.append(Bandwidth("all-reduce", scope, group, message, 2 * message * others / reduced))
    return found


def _seconds(collective: Any, handle: Any, device: torch.device) -> float:
    """Median over rounds of the time of the slowest rank."""
    times = []
    for _ in range(ROUNDS + 1):
        dist.barrier(group=handle)
        begun = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=handle)
        times.append(float(slowest))
    return median(times[1:])  # connections are made in the first


def clock_offset() -> float:
    """Seconds by which this rank's clock is ahead of rank 0's; leaving a barrier together takes milliseconds."""
    offsets = []
    for _ in range(ROUNDS):
        dist.barrier()
        now = time.time()
        theirs = torch.tensor(now, dtype=torch.float64)
        dist.broadcast(theirs, src=0)
        offsets.append(now - float(theirs))
    return min(offsets, key=abs)
