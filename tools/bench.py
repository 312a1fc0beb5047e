#!/usr/bin/env python
"""Speed, memory and accuracy of our kernels beside what people use today, measured in one process.

    python tools/bench.py cpu
    python tools/bench.py cpu --rounds 40 --threads 1 --only "attention*cache 8192" --out cpu.json
    python tools/bench.py cpu --bf16 --only model
    python tools/bench.py cpu --only trained --weights runs/quickstart/final
    python tools/bench.py gpu --out gpu.json

Each row of the table is a workload: a median time for each contender that can run, and how many times as fast ours
are as the others. All contenders get the same inputs, new ones in every round (but see benchmarks/trained.py), in
turns, so that a machine whose speed drifts slows all of them alike. Who cannot run is listed with the reason.

roofline      share of the speed of a large torch.mm, or of a large copy if that is what bounds the row; both are
              measured at the beginning. Work that early stop leaves out counts as done.
worst error   of the outputs and gradients: relative L2 distance from the same computation in float64
peak MiB      growth of resident memory (of PyTorch's allocator on a GPU) during one run

It needs the packages of `pip install -e '.[train]'`; peers are used where they can be imported. A benchmark, not a
test: nothing here passes or fails.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import torch
from benchmarks import suites
from benchmarks.ceiling import measure_ceiling
from benchmarks.environment import environment
from benchmarks.measure import measure
from benchmarks.report import Row, absentees, header, write_json
from benchmarks.stopwatch import stopwatch_for
from benchmarks.trained import trained
from benchmarks.workload import Workload
from tqdm import tqdm

# Whole models take seconds where ops take milliseconds.
MODEL_SHARE = 4


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if arguments.device == "gpu" else "cpu")
    dtype = torch.bfloat16 if arguments.bf16 or device.type == "cuda" else torch.float32
    try:
        rounds = _plan(arguments, device, dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _run(arguments, device, dtype, rounds)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["cpu", "gpu"])
    parser.add_argument(
        "--rounds", type=_positive, default=20, help=f"that count; whole models get a {MODEL_SHARE}th (default 20)"
    )
    parser.add_argument("--threads", type=_positive, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--bf16", action="store_true", help="instead of fp32 on the CPU; on a GPU it always is bf16")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name has this in it, * for anything")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="also what early stop saves on a trained model")
    parser.add_argument("--length", type=_positive, default=2048, help="tokens of text for --weights (default 2048)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write everything as JSON")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _plan(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """The number of rounds of each row that was asked for, by name."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("this torch finds no CUDA device: run `cpu`, or install a CUDA build of torch")
    if arguments.out and not arguments.out.parent.is_dir():
        raise ValueError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    few = math.ceil(arguments.rounds / MODEL_SHARE)
    rounds = {w.name: few if w.whole_model else arguments.rounds for w in _workloads(arguments, device, dtype)}
    chosen = {name: number for name, number in rounds.items() if fnmatch(name, f"*{arguments.only}*")}
    if not chosen:
        raise ValueError(f"--only {arguments.only!r} matches no row. They are:\n" + "\n".join(rounds))
    return chosen


def _run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, rounds: dict[str, int]) -> None:
    stopwatch = stopwatch_for(device)
    ceiling = measure_ceiling(device, dtype, stopwatch, min(arguments.rounds, 10))
    about = environment(device, "bf16" if dtype == torch.bfloat16 else "fp32", ceiling)
    print(header(about))
    rows: list[Row] = []
    with tqdm(total=sum(rounds.values()), unit="round", disable=None) as progress:
        for workload in _workloads(arguments, device, dtype):
            if workload.name not in rounds:
                continue
            progress.set_description(workload.name)
            rows.append(measure(workload, stopwatch, ceiling, rounds[workload.name], progress.update))
            progress.write(rows[-1].text())
            if arguments.out:
                write_json(arguments.out, about, rows)  # after each row, so that an interrupted run leaves them
    for absent in absentees(rows):
        print(f"absent in {len(absent['rows'])} row(s): {absent['contender']}: {absent['reason']}")


def _workloads(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Workload]:
    """Twice asked for, once for their names: they are cheap, and what they have drawn goes with them."""
    yield from suites.gpu(device, dtype) if device.type == "cuda" else suites.cpu(dtype)
    if arguments.weights:
        backend = "triton" if device.type == "cuda" else "cpp"
        yield from trained(arguments.weights, arguments.length, backend, device, dtype)


if __name__ == "__main__":
    sys.exit(main())
