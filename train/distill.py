"""
Distil a dense language model into a modular one, module by module.

    deepspeed train/distill.py --config configs/distill/quickstart.yaml [--KEY VALUE ...]

cuts the teacher into stages, trains each stage of the student in the place of the teacher's (inside the teacher, or a
shallow meta model of it), assembles the student and trains it end to end. Phases that are done are skipped, and an
interrupted one resumes. `--jobs N` trains N stages at a time in processes of their own. `--stage I` trains one stage
alone, on a machine that has OUTPUT_DIR/teacher, and OUTPUT_DIR/meta if there is a meta model. The student is
OUTPUT_DIR/finetuned/final, and OUTPUT_DIR/results.json says what every phase cost. Everything else, exit codes
included, is as in train/pretrain.py; docs/distillation.md explains the keys.
"""

import sys
from pathlib import Path

import threads  # noqa: F401  (before torch)

from modmoe.training.command_line import run_command
from modmoe.training.distillation.config import DistillRun


def train(run: DistillRun) -> int:
    """Distil and report; returns the exit code."""
    from modmoe.training.distillation.run import distill

    return distill(run, Path(__file__).resolve())


def main(arguments: list[str] | None = None) -> int:
    """Distil as the command line says; returns the exit code."""
    return run_command(__doc__, DistillRun, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
