#!/usr/bin/env python
"""Speed and memory of ModMoE beside HF JetMoE and HF Llama of the same active size, in one process.

    python tools/bench.py cpu [--rounds 7] [--bf16] [--out FILE.json]

Rounds are interleaved, so that a machine whose speed drifts slows all of them alike; medians and ratios are printed.
A benchmark, not a test: nothing here passes or fails.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
import yaml
from transformers import (
    DynamicCache,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from modmoe import ModMoEConfig, ModMoEForCausalLM

PRESET = Path(__file__).parents[1] / "configs" / "model" / "molm_tiny.yaml"
LENGTHS = (256, 1024, 2048)
CACHES = (256, 2048)
DECODE_STEPS = 16


def build_models() -> dict[str, PreTrainedModel]:
    """Per block and token, all three multiply by 0.39 M attention and 0.52 M FFN weights."""
    torch.manual_seed(0)
    common = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 4}
    jetmoe = JetMoeConfig(
        **common,
        kv_channels=64,
        num_local_experts=24,  # one number for both sides; 24 + 24 is as many experts as our 16 + 32
        num_experts_per_tok=2,
        intermediate_size=344,  # three matrices where MoLM has two
        output_router_logits=True,
        tie_word_embeddings=False,
    )
    llama = LlamaConfig(**common, num_attention_heads=8, head_dim=64, intermediate_size=688)
    return {
        "ModMoE": ModMoEForCausalLM(ModMoEConfig(**yaml.safe_load(PRESET.read_text()))),
        "HF JetMoE": JetMoeForCausalLM(jetmoe),
        "HF Llama": LlamaForCausalLM(llama),
    }


def train_step(model: PreTrainedModel, ids: torch.Tensor, bf16: bool) -> Callable[[], None]:
    def step() -> None:
        context = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with context:
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def decode(model: PreTrainedModel, ids: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """`DECODE_STEPS` single-token steps on a cache of the length of `ids`, which is restored afterwards."""
    cache = DynamicCache(config=model.config)
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    with torch.no_grad(), context:
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        context = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with torch.no_grad(), context:
            for i in range(DECODE_STEPS):
                model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache.crop(-DECODE_STEPS)

    return step


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after another in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_growth(step: Callable[[], None]) -> float | None:
    """MiB by which the peak of resident memory during a step exceeds what is resident before; None off Linux."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def read(field: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1])

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = read("VmRSS")
    reset.write_text("5")  # resets VmHWM, the peak
    step()
    return (read("VmHWM") - before) / 1024


def random_ids(length: int) -> torch.Tensor:
    return torch.randint(0, 4096, (1, length))


def bench_cpu(rounds: int, bf16: bool) -> list[dict]:
    models = build_models()
    rows = []
    for length in LENGTHS:
        steps = {name: train_step(m.train(), random_ids(length), bf16) for name, m in models.items()}
        times = interleaved(steps, rounds)
        memory = {name: peak_growth(step) for name, step in steps.items()}
        rows.append(row(f"train, T = {length}", length, times, memory))
        print_row(rows[-1])
    for length in CACHES:
        steps = {name: decode(m.eval(), random_ids(length), bf16) for name, m in models.items()}
        times = interleaved(steps, rounds)
        rows.append(row(f"decode, cache {length}", DECODE_STEPS, times, {}))
        print_row(rows[-1])
    return rows


def row(what: str, tokens: int, times: dict[str, float], memory: dict[str, float | None]) -> dict:
    return {
        "what": what,
        "tokens_per_second": {name: tokens / t for name, t in times.items()},
        "ratio_to": {name: t / times["ModMoE"] for name, t in times.items() if name != "ModMoE"},
        "peak_growth_mib": memory,
    }


def print_header(names: list[str]) -> None:
    print(f"{'':20}" + "".join(f"{n + ' tok/s':>18}" for n in names), end="")
    print(f"{'x JetMoE':>10}{'x Llama':>10}   peak memory growth, MiB")


def print_row(row: dict) -> None:
    speeds = "".join(f"{v:18,.0f}" for v in row["tokens_per_second"].values())
    ratios = "".join(f"{v:10.2f}" for v in row["ratio_to"].values())
    memory = ", ".join("?" if v is None else f"{v:.0f}" for v in row["peak_growth_mib"].values())
    print(f"{row['what']:20}{speeds}{ratios}   {memory}", flush=True)


def environment(bf16: bool) -> dict:
    model_name = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x),
        "?",
    )
    return {
        "cpu": model_name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "bf16 autocast" if bf16 else "fp32",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["cpu"])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all cores)")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of fp32")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    about = environment(arguments.bf16)
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print_header(["ModMoE", "HF JetMoE", "HF Llama"])
    rows = bench_cpu(arguments.rounds, arguments.bf16)
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": about, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
