#!/usr/bin/env python
"""Check a cluster before a long run. Launch it exactly as you would launch the training.

    deepspeed [-H HOSTS ...] tools/launch_check.py --expect-world 16 --config configs/train/my.yaml
    torchrun --nproc-per-node 8 tools/launch_check.py --dir /shared/runs

It checks that all ranks arrive, that their number is the intended one, that they have the same software, code,
configuration and GPUs, that collectives give the right numbers (and how fast), that clocks agree, and that the
directories of the run are shared, atomic and large enough. It prints one sentence for each problem, with the remedy.
Exit codes: 0 no problems, 1 problems, 2 a mistake in the arguments or the configuration.

With --config, keys can be changed as for train/pretrain.py: --output_dir /shared/runs/mine.
"""

import argparse
import json
import os
import sys
import uuid
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import launch_checks.quiet  # noqa: F401  (before torch)
import torch
import torch.distributed as dist
from launch_checks.arrival import Failure, bounded, exchange, meet
from launch_checks.collectives import bandwidths, clock_offset, groups, wrong_collectives
from launch_checks.directory import check_directory, gathered
from launch_checks.facts import Facts, Place, expectations, gather_facts, launchers_above
from launch_checks.problems import problems
from launch_checks.report import Report, table
from torch.distributed import PrefixStore, TCPStore


def main(argv: list[str] | None = None) -> int:
    """Check the launch that this process belongs to; returns the exit code, the same on all ranks."""
    arguments, overrides = _parse(argv)
    needs = None if arguments.config is None else _load(arguments.config, overrides)
    place = Place.of(os.environ)
    try:
        mine = gather_facts(place, needs.digest if needs else "")
        store = meet(place, os.environ, arguments.timeout)
        report = Report(tuple(exchange(store, place, mine, arguments.timeout)))
        told = []
        if place.rank == 0:
            found = expectations(arguments.expect_world, os.environ, launchers_above())
            report = replace(report, expectations=tuple(found))
            told = problems(report)
            _print_problems(told)  # before anything that may hang because of them
        report = _test_together(place, mine, store, report, _directories(arguments, needs), arguments.timeout)
    except Failure as failure:
        _print_problems([str(failure)] if str(failure) else [])
        return 1
    code = _conclude(report, needs, told, arguments.json) if place.rank == 0 else 0
    verdict = torch.tensor(code)
    dist.broadcast(verdict, src=0)
    dist.destroy_process_group()
    return int(verdict)


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--expect-world", type=int, metavar="N", help="how many ranks there should be")
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="check what this run needs")
    parser.add_argument("--dir", type=Path, help="directory to test [output_dir and data.cache_dir of --config]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings there")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="for each step [%(default)s]")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the DeepSpeed launcher
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.config is None:
        parser.error(f"unknown arguments {' '.join(overrides)}; keys of a run need --config")
    return arguments, overrides


def _load(path: Path, overrides: list[str]) -> Any:
    # They take seconds to import and need the packages of `pip install -e '.[train]'`.
    from launch_checks.needs import Needs

    from modmoe.training.errors import ConfigError

    try:
        return Needs(path, overrides)
    except ConfigError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


def _directories(arguments: argparse.Namespace, needs: Any) -> list[Path]:
    if arguments.dir is not None:
        return [arguments.dir]
    return needs.directories if needs else []


def _test_together(
    place: Place, mine: Facts, store: TCPStore, report: Report, directories: list[Path], seconds: float
) -> Report:
    """Everything that ranks do together; the report is complete on rank 0."""
    with bounded("connecting the ranks over gloo", _network_remedy(mine), place, 2 * seconds):
        _connect(place, mine, store, seconds)
    facts = gathered(mine)
    device = _device(facts, place)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with bounded(f"testing collectives over {backend}", "see what NCCL_DEBUG=INFO prints", place, 2 * seconds):
        wrong = gathered(wrong_collectives(device))
        speeds = gathered(bandwidths(groups(facts), device))
        clocks = gathered(clock_offset())
    tested = []
    for directory in directories:
        with bounded(f"writing and reading in {directory}", "test this disk on that node alone", place, 2 * seconds):
            (token,) = {token for token in gathered(uuid.uuid4().hex if place.rank == 0 else None) if token}
            tested.append(check_directory(directory, token))
    if place.rank != 0:
        return report
    names = dict.fromkeys(name for each in wrong for name in each)
    return replace(
        report,
        backend=backend,
        wrong={name: tuple(rank for rank, each in enumerate(wrong) if name in each) for name in names},
        bandwidths=tuple(speed for each in speeds for speed in each),
        clocks=tuple(clocks),
        directories=tuple(tested),
    )


def _connect(place: Place, mine: Facts, store: TCPStore, seconds: float) -> None:
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(
            backends,
            store=PrefixStore("check", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=seconds),
        )
        gathered(None)  # over gloo, whatever else there is
    except RuntimeError as error:
        raise Failure(
            f"{place.name} cannot connect to the other ranks over gloo ({str(error).splitlines()[0]}): "
            f"{_network_remedy(mine)}"
        ) from None


def _network_remedy(mine: Facts) -> str:
    name = mine.interface or "<interface>"
    return f"set GLOO_SOCKET_IFNAME={name} (and NCCL_SOCKET_IFNAME), the network that the nodes share, on all nodes"


def _device(facts: list[Facts], place: Place) -> torch.device:
    """NCCL needs a GPU of its own for each rank."""
    gpus = {(each.node_rank, each.gpu_id) for each in facts if each.gpu_id}
    if len(gpus) < len(facts):
        return torch.device("cpu")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _conclude(report: Report, needs: Any, told: list[str], json_file: Path | None) -> int:
    """Print what was found, on rank 0; returns the exit code."""
    if needs is not None:
        output, *others = report.directories
        bytes_needed, pieces = needs.checkpoint_space()
        report = replace(report, directories=(replace(output, needed=bytes_needed, pieces=pieces), *others))
    found = problems(report)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(report) | {"problems": found}, indent=1))
    print(f"\n{table(report)}\n")
    _print_problems([sentence for sentence in found if sentence not in told])
    print(f"{len(found)} problem(s)" if found else "no problems found", flush=True)
    return 1 if found else 0


def _print_problems(sentences: list[str]) -> None:
    print("".join(f"problem: {sentence}\n" for sentence in sentences), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
