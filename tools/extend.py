#!/usr/bin/env python
"""Add experts to a trained model. They can be trained on something new while all old weights stay as they are.

    python tools/extend.py --model DIR --experts 4 --attn-experts 2 --name c --out EXTENDED

Every layer gets new FFN and attention experts. "group" (the default) gives them a router of their own, whose null
choice lets a token use none of them: with --init zero the model answers as before, bit for bit, until it is trained.
"common" puts them into the old routers, where they take mass from the old gates and slots from the old experts
(ModuleFormer's way). --init clone copies the first experts of each layer, or with --usage the most used ones. Train
what is new with train/finetune.py, method "extension", and ship it with tools/pack.py.
"""

import argparse
import sys
from pathlib import Path

import command

from modmoe.models.extension import Extension
from modmoe.surgery.extend import Cost, MostUsed, add_extension, gate_bound
from modmoe.surgery.model_directory import ModelDirectory
from modmoe.surgery.usage import UsageReport


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a native model; not modified")
    parser.add_argument("--out", type=Path, required=True, metavar="EXTENDED", help="a new directory")
    parser.add_argument("--experts", type=int, default=0, help="new FFN experts of each layer [0]")
    parser.add_argument("--attn-experts", type=int, default=0, help="new attention experts of each layer [0]")
    parser.add_argument("--top-k", type=int, default=1, help="new FFN experts that a token uses at most [1]")
    parser.add_argument("--attn-top-k", type=int, default=1, help="new attention experts, likewise [1]")
    parser.add_argument("--init", choices=["zero", "clone", "random"], default="zero", help="[zero]")
    parser.add_argument(
        "--usage", type=Path, metavar="REPORT", help="usage.json of expert_report.py: clone the most used experts"
    )
    parser.add_argument("--domain", metavar="NAME", help="of the report; all together if not given")
    parser.add_argument("--mode", choices=["group", "common"], default="group", help="[group]")
    parser.add_argument("--name", default="extension", help="of what is added [extension]")
    parser.add_argument("--seed", type=int, default=0, help="of random weights [0]")
    options = parser.parse_args(arguments)
    return command.run(lambda: extend(options))


def extend(options: argparse.Namespace) -> str:
    extension = Extension(
        options.name, options.experts, options.top_k, options.attn_experts, options.attn_top_k, options.mode
    )
    cost = add_extension(
        options.model,
        options.out,
        extension,
        init=options.init,
        seed=options.seed,
        most_used=most_used(options),
    )
    lines = [describe(cost)]
    if extension.mode == "common":
        lines.append(describe_bound(gate_bound(ModelDirectory(options.model), extension, options.init)))
    return "\n".join([*lines, f"written to {options.out}"])


def most_used(options: argparse.Namespace) -> MostUsed | None:
    """What --usage and --domain say."""
    if options.usage is None:
        if options.domain is not None:
            raise ValueError(f"--domain {options.domain} is of a usage report: give one with --usage")
        return None
    return MostUsed(UsageReport.load(options.usage), options.domain)


def describe(cost: Cost) -> str:
    """What an extension costs."""
    return (
        f"{cost.parameters:,} new parameters, of which a token uses {cost.active_parameters:,} at most\n"
        f"{cost.multiply_adds:,} more multiply-adds per token, and {cost.multiply_adds_per_key:,} for each key that "
        "it attends to"
    )


def describe_bound(share: float | None) -> str:
    """What common rows do to the old ones."""
    if share is None:
        return "approximate: random rows may take any share of a token's gates"
    return (
        f"approximate: untrained, the new rows take at most {share:.1%} of a token's softmax, and the old gates "
        "shrink by as much; where a new expert is among the chosen, an old one is not"
    )


if __name__ == "__main__":
    sys.exit(main())
