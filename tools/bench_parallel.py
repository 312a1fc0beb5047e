#!/usr/bin/env python
"""Expert parallelism beside pure data parallelism: step time and memory of both in one run.

    deepspeed --num_gpus 2 tools/bench_parallel.py --rounds 20
    deepspeed --num_gpus 2 tools/bench_parallel.py --chunks 1 2 4 --trace trace/

Every row trains the same model on the same tokens with DeepSpeed, AdamW and float32 (bf16 on GPUs); rows take
turns, so that a machine whose speed drifts slows all alike. A process alone compares a model without and with the
machinery of expert parallelism, whose cost must not show.

step          median over rounds of the slowest rank's time for one optimizer step
experts MiB   weights of the experts on one rank; gradients and optimizer state are three to five times that
growth MiB    of resident memory on rank 0 (of PyTorch's allocator on a GPU) from before the model was made to after
              its first steps
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from benchmarks.stopwatch import resident_mib

from modmoe import ModMoEConfig
from modmoe.parallel.loading import fresh_model
from modmoe.training.optimizer import parameter_groups
from modmoe.training.ranks.bootstrap import prepare_process

PRESET = Path(__file__).parents[1] / "configs" / "model" / "molm_tiny.yaml"
WARM_UP_STEPS = 3


def main() -> int:
    arguments = _parse()
    prepare_process(use_deepspeed=True)
    import deepspeed

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)  # the engine does so too late for what comes before it
    deepspeed.init_distributed()
    config = ModMoEConfig(**yaml.safe_load(arguments.model.read_text()))
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (arguments.batch, arguments.length)
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(device)
    contenders = {
        name: _Contender(config, *layout, arguments.zero_stage, device) for name, layout in _layouts(arguments).items()
    }
    growth = {name: contender.prepare(ids) for name, contender in contenders.items()}
    times = _measure(contenders, ids, arguments.rounds, device)
    if arguments.trace:
        arguments.trace.mkdir(parents=True, exist_ok=True)
        for name, contender in contenders.items():
            _trace(contender, ids, arguments.trace / f"{name.replace(' ', '_')}_rank{dist.get_rank()}.json")
    if dist.get_rank() == 0:
        _report(contenders, growth, times, ids.numel() * dist.get_world_size())
    dist.destroy_process_group()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PRESET, help="YAML file with fields of ModMoEConfig")
    parser.add_argument("--batch", type=int, default=2, help="rows per rank and step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--zero-stage", type=int, default=1, choices=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=10, help="steps of each contender that count")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[1], help="parts whose transfers overlap with experts"
    )
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write a trace of one step per contender and rank")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the DeepSpeed launcher
    return parser.parse_args()


def _layouts(arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Name -> expert-parallel size and chunks."""
    world = dist.get_world_size()
    if world == 1:
        return {"plain model": (0, 1), "expert parallel 1": (1, 1)}
    rows = {f"expert parallel {world}, {c} chunk(s)": (world, c) for c in arguments.chunks}
    return {"data parallel": (1, 1), **rows}


class _Contender:
    """One model in training; `size` 0 is a model that nobody has told of expert parallelism."""

    def __init__(self, config: ModMoEConfig, size: int, chunks: int, stage: int, device: torch.device) -> None:
        self._layout = (config, size, chunks)
        self._stage = stage
        self._device = device
        self.model: Any = None
        self._engine: Any = None

    def prepare(self, ids: torch.Tensor) -> float:
        """Build and take the first steps; returns the growth of memory in MiB."""
        gc.collect()
        before = _memory(self._device)
        self._engine = self._build()
        for _ in range(WARM_UP_STEPS):
            self.step(ids)
        gc.collect()
        return _memory(self._device) - before

    def _build(self) -> Any:
        import deepspeed

        from modmoe.parallel.engine import announce, expert_parallel_topology

        config, size, chunks = self._layout
        topology = expert_parallel_topology(size) if size else None
        torch.manual_seed(0)
        self.model = fresh_model(config, topology, chunks=chunks)
        if size > 1:
            announce(self.model, size, self._stage)
        bf16 = self._device.type == "cuda"
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": self._stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        }
        optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), lr=1e-4, fused=True)
        engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        return engine

    def step(self, ids: torch.Tensor) -> None:
        """One optimizer step."""
        loss = self._engine(ids, labels=ids, use_cache=False).loss
        self._engine.backward(loss)
        self._engine.step()

    def expert_mib(self) -> float:
        """Weights of the experts on this rank, before ZeRO shards them."""
        pools = [p for _, experts in self.model.routed_pools() for p in experts.parameters()]
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in pools) / 2**20


def _measure(contenders: dict[str, _Contender], ids: torch.Tensor, rounds: int, device: torch.device) -> dict:
    """Name -> seconds per round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            times[name].append(_seconds(lambda name=name: contenders[name].step(ids), device))
    return times


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, device=device, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _memory(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else resident_mib()


def _trace(contender: _Contender, ids: torch.Tensor, path: Path) -> None:
    with torch.profiler.profile() as profile:
        contender.step(ids)
    profile.export_chrome_trace(str(path))


def _report(contenders: dict[str, _Contender], growth: dict[str, float], times: dict, tokens: int) -> None:
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians))
    print(f"{'':32}{'step':>12}{'tokens/s':>12}{'x ' + first:>18}{'experts MiB':>14}{'growth MiB':>12}")
    for name, seconds in medians.items():
        print(
            f"{name:32}{seconds * 1000:>9.1f} ms{tokens / seconds:>12,.0f}{seconds / medians[first]:>18.3f}"
            f"{contenders[name].expert_mib():>14.1f}{growth[name]:>12.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
