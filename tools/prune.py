#!/usr/bin/env python
"""Remove the experts that a model does not use.

    python tools/expert_report.py --model DIR --data python=embedded:python --out REPORT
    python tools/prune.py --model DIR --usage REPORT/usage.json --keep 0.5 --dry-run
    python tools/prune.py --model DIR --usage REPORT/usage.json --keep 0.5 --out PRUNED

DIR is a native model, or one of transformers' Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE. Models of any size can be
pruned: their weights pass through memory one tensor at a time. DIR is not changed.
"""

import argparse
import shlex
import sys
from pathlib import Path

import command

import modmoe
from modmoe.surgery.expert_tensors import ExpertCheckpoint
from modmoe.surgery.model_directory import check_new
from modmoe.surgery.prune import choose_pruning
from modmoe.surgery.prune_table import markdown, table
from modmoe.surgery.usage import METRICS, UsageReport


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return command.run(lambda: prune(options, heading(arguments)))


def prune(options: argparse.Namespace, heading: str) -> str:
    if options.out is not None:
        check_new(options.out, options.model)
    pruning = choose_pruning(
        ExpertCheckpoint(options.model),
        UsageReport.load(options.usage),
        metric=options.metric,
        domain=options.domain,
        sides=options.sides,
        denominator=options.denominator,
        keep=options.keep,
        keep_experts=options.keep_experts,
        threshold=options.threshold,
        scope=options.scope,
    )
    print(table(pruning))
    for warning in pruning.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        return "\nnothing written"
    pruning.write(options.out, markdown(pruning, heading))
    return f"\nwritten to {options.out}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--usage", type=Path, required=True, metavar="REPORT", help="usage.json of expert_report.py")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--keep", type=float, metavar="FRACTION", help="of the experts, rounded up")
    amount.add_argument("--keep-experts", type=int, metavar="N", help="in each layer and on each side")
    amount.add_argument("--threshold", type=float, metavar="SCORE", help="keep the experts with at least this score")
    parser.add_argument("--metric", choices=METRICS, default="frequency", help="score of an expert [frequency]")
    parser.add_argument(
        "--scope",
        choices=("layer", "global"),
        default="layer",
        help="layer: the same number everywhere; global: scores over their layer's mean, ranked over layers [layer]",
    )
    parser.add_argument(
        "--denominator",
        choices=("keep", "drop"),
        default="drop",
        help="drop the router rows of removed experts, or keep the rows only in the softmax [drop]",
    )
    parser.add_argument("--domain", metavar="NAME", help="of the report; all together if not given")
    parser.add_argument("--sides", type=sides, default=(), metavar="attn,ffn", help="where experts may go [all]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new directory")
    parser.add_argument("--dry-run", action="store_true", help="print what would go, write nothing")
    options = parser.parse_args(arguments)
    if options.out is None and not options.dry_run:
        parser.error("--out is required, except with --dry-run")
    return options


def sides(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= {"attn", "ffn"}:
        raise argparse.ArgumentTypeError(f"must be attn, ffn or attn,ffn, got {text!r}")
    return names


def heading(arguments: list[str] | None) -> str:
    line = shlex.join(sys.argv[1:] if arguments is None else arguments)
    return f"## Pruned\n\nExperts were removed with ModMoE {modmoe.__version__}: `tools/prune.py {line}`."


if __name__ == "__main__":
    sys.exit(main())
