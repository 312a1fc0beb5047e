"""What the experiments share: trainings that are carried out once, scores on fixed text, results kept per seed."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import modmoe  # noqa: F401  (registers the model type)
from modmoe.data import prepare_data
from modmoe.data.config import SourceConfig, TokenizerConfig
from modmoe.training.evaluation import evaluate_domains

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DOMAINS = ("python", "english", "c")
MAX_BYTES = {"c": 4_000_000}

Values = dict[str, Any]
"""What was measured with one seed, by name."""


def main(
    doc: str,
    experiment: str,
    measure_seed: Callable[[int, Path], None],
    table: Callable[[list[Values]], str],
    draw: Callable[[list[Values], Path], None],
) -> None:
    """
    The command line of an experiment.

    Args:
        doc: for --help.
        experiment: its directory in docs/results.
        measure_seed: measures with a seed, training below a directory.
        table: of the values of all seeds, as Markdown.
        draw: the picture of them, to a PNG file.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments", help="where models are trained")
    parser.add_argument("--summary", action="store_true", help="only show what was measured already")
    options = parser.parse_args()
    if not options.summary:
        for seed in options.seeds:
            measure_seed(seed, options.runs / f"seed-{seed}")
    results = [Results(experiment, seed).values for seed in options.seeds]
    (RESULTS / experiment / "table.md").write_text(table(results))
    print(table(results))
    draw(results, RESULTS / experiment / "curves.png")


def train(script: str, config: str, out: Path, **options: Any) -> Path:
    """
    Train, or go on, unless it is done; returns the directory of the model.

    Args:
        script: in train/.
        config: its path from the root of the repository.
        out: output directory of the run.
        options: keys of the configuration, with "__" for their dots.
    """
    if not (out / "results.json").exists():  # the last file that a run writes
        overrides = [part for key, value in options.items() for part in (f"--{key.replace('__', '.')}", str(value))]
        run(ROOT / "train" / script, "--config", ROOT / config, "--output_dir", out, *overrides)
    return out / "final"


def run(*command: str | Path) -> None:
    """Run a Python script of this repository."""
    print("+", *command, flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment, cwd=ROOT)


class Models:
    """The models of one seed; each is trained when it is asked for first, after those that it starts from."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed = seed
        self.directory = directory

    def base(self) -> Path:
        return train("pretrain.py", "experiments/base.yaml", self.directory / "base", seed=self.seed)


class Scorer:
    """
    Cross entropy of models on the same validation blocks of all domains.

    Args:
        tokenizer: gives the directory of a model with the tokenizer of all.
        blocks: of 256 tokens, per domain.
    """

    def __init__(self, tokenizer: Callable[[], Path], blocks: int = 128) -> None:
        self.tokenizer = tokenizer
        self.blocks = blocks

    @cached_property
    def _data(self) -> Any:
        sources = [SourceConfig(name=name, embedded=name, max_bytes=MAX_BYTES.get(name)) for name in DOMAINS]
        tokenizer = TokenizerConfig(name=str(self.tokenizer()))
        return prepare_data(sources, tokenizer, 256, ROOT / ".cache" / "modmoe", seed=0, num_train_blocks=1)

    def __call__(self, directory: Path, domains: Sequence[str] = DOMAINS) -> dict[str, float]:
        """Nats per token of the model of a directory, by domain."""
        scores = evaluate_domains(
            AutoModelForCausalLM.from_pretrained(directory),
            {name: self._data.validation[name] for name in domains},
            self._data.statistics,
            max_blocks=self.blocks,
            batch_size=8,
            device=torch.device("cpu"),
            autocast=contextlib.nullcontext,
        )
        return {name: score.nats_per_token for name, score in scores.items()}


class Results:
    """
    What was measured with one seed: a JSON file that grows, so that an interrupted experiment goes on.

    Args:
        experiment: its directory in docs/results.
        seed: of the runs.
    """

    def __init__(self, experiment: str, seed: int) -> None:
        self.path = RESULTS / experiment / f"seed-{seed}.json"
        self.values: Values = json.loads(self.path.read_text()) if self.path.exists() else {}

    def measure(self, name: str, how: Callable[[], Any]) -> Any:
        """The value of that name, measured now if it was not yet."""
        if name not in self.values:
            self.values[name] = how()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text(json.dumps(self.values, indent=1) + "\n")
            os.replace(scratch, self.path)
            print(f"{self.path.stem}  {name}: {self.values[name]}", flush=True)
        return self.values[name]


def mean_and_spread(values: Iterable[float], form: str = "{:+.2f}") -> str:
    """Mean and sample standard deviation as text; of one value, that."""
    values = list(values)
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.replace('+', '').format(statistics.stdev(values))}" if len(values) > 1 else mean
