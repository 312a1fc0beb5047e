#!/usr/bin/env python
"""Make a plain Hugging Face directory of a training checkpoint, whatever cluster wrote it.

    python tools/consolidate.py CHECKPOINT OUT [--dtype bfloat16]

OUT gets config.json, model.safetensors (several files if it is large) and the tokenizer, not the optimizer's state.
Memory holds one piece of one tensor at a time; OUT appears only once it is complete. A checkpoint directory itself can
be loaded with `from_pretrained` too; it has the weights in the precision that the run computed with.
"""

import argparse
import sys
from pathlib import Path

import command
import torch

import modmoe  # noqa: F401  (registers the model types)
from modmoe.training.checkpoints.consolidation import consolidate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    known = parser.parse_args(arguments)
    return command.run(lambda: consolidate(known.checkpoint, known.target, DTYPES[known.dtype]))


if __name__ == "__main__":
    sys.exit(main())
