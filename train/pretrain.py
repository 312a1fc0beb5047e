"""
Pretrain a modular language model.

    deepspeed train/pretrain.py --config configs/train/quickstart.yaml [--section.key VALUE ...]

Any key of the config can be given on the command line: --optimization.learning_rate 3e-4 --init DIR. Running the same
command again resumes. `python train/pretrain.py` works too, as a single process. Exit codes: 0 finished; 2 mistake in
the configuration or the data; 129, 130 and 143 interrupted by a closed terminal, Ctrl-C or SIGTERM, after saving; 1
anything else.
"""

import sys

import threads  # noqa: F401  (before torch)

from modmoe.training.command_line import run_command
from modmoe.training.run_config import RunConfig


def train(run: RunConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    from modmoe.training.pretraining import pretrain

    return pretrain(run)


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    return run_command(__doc__, RunConfig, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
