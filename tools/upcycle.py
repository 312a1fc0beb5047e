#!/usr/bin/env python
"""Make a modular model of a dense one: its feed-forward networks become pools of experts.

    python tools/upcycle.py --dense DIR --method cluster --experts 16 --top-k 16 --out DIR
    python tools/upcycle.py --dense DIR --method copy --experts 8 --top-k 2 --reinit 0.5 --out DIR

Dense models are those of modmoe.models.dense: Llama, Mistral, Qwen2, Qwen3, GPT-2, and dense ones of our own.
"cluster" divides the neurons of each network among the experts: with all experts active the model equals its parent,
with fewer it is cheaper and approximate. "copy" repeats each network: the model is larger, and equals its parent for
any top-k.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import command

from modmoe.surgery.upcycle import RouterStart, upcycle
from modmoe.surgery.upcycle_ffn import METHODS
from modmoe.training.yaml_config import load_yaml


def main() -> int:
    arguments = parser().parse_args()
    return command.run(
        lambda: upcycle(
            arguments.dense,
            arguments.out,
            arguments.method,
            fields(arguments),
            reinit=arguments.reinit,
            router=arguments.router,
            seed=arguments.seed,
        )
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, metavar="DIR", help="the dense model; only read")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML or JSON with fields of ModMoEConfig")
    parser.add_argument("--experts", type=int, metavar="N", help="experts of a layer (num_experts)")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts that a token uses (num_experts_per_tok)")
    parser.add_argument(
        "--reinit", type=float, default=0.0, metavar="SHARE", help="of each copy's neurons, drawn anew"
    )
    parser.add_argument("--router", choices=get_args(RouterStart), help="its start; centroids for clusters by default")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the config file, where the command line does not say otherwise."""
    chosen = {"num_experts": arguments.experts, "num_experts_per_tok": arguments.top_k}
    saved = load_yaml(arguments.config) if arguments.config else {}
    return saved | {name: value for name, value in chosen.items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
