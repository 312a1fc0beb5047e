"""
Fine-tune a modular language model: all of it, its experts, its routers, an extension, or LoRA adapters.

    deepspeed train/finetune.py --config configs/train/finetune.yaml --init DIR --output_dir OUT [--KEY VALUE ...]

Everything that train/pretrain.py supports works here too: resuming, DeepSpeed, expert parallelism, exit codes. The
section `finetuning` sets what is trained, the schedule of the router loss, the teacher, and which experts are removed
during training. OUT/final is a plain Hugging Face directory; after LoRA training the adapters are merged into it, and
are also saved in OUT/final/adapter.
"""

import sys

import threads  # noqa: F401  (before torch)

from modmoe.training.command_line import run_command
from modmoe.training.finetuning.config import FinetuningRun


def train(run: FinetuningRun) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    from modmoe.training.finetuning.run import finetune

    return finetune(run)


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    return run_command(__doc__, FinetuningRun, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
