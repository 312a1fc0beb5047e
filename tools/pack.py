#!/usr/bin/env python
"""Ship the experts that were added to a model without the model.

    python tools/pack.py create --model EXTENDED --name c --out PACK
    python tools/pack.py apply --model BASE --pack PACK [PACK ...] --out DIR
    python tools/pack.py remove --model EXTENDED --name c --out DIR
    python tools/pack.py merge --model EXTENDED --name c --out DIR
    python tools/pack.py list --model DIR

A pack holds one extension and fits only the model it was made for. Removing it restores that model bit for bit.
Several packs of one base make one model; each was trained without the others, so try what they do together. "merge"
makes the experts of a "common" extension ordinary ones, for good.
"""

import argparse
import sys
from pathlib import Path

import command

from modmoe.surgery.model_directory import ModelDirectory
from modmoe.surgery.pack import apply_packs, create_pack, merge_common, remove_extension


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return command.run(lambda: COMMANDS[options.command](options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        subparser = commands.add_parser(name)
        subparser.add_argument("--model", type=Path, required=True, metavar="DIR", help="not modified")
        if name == "apply":
            subparser.add_argument("--pack", type=Path, nargs="+", required=True, metavar="PACK")
        elif name != "list":
            subparser.add_argument("--name", required=True, help="of the extension")
        if name != "list":
            subparser.add_argument("--out", type=Path, required=True, help="a new directory")
    return parser.parse_args(arguments)


def create(options: argparse.Namespace) -> str:
    pack = create_pack(options.model, options.name, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    return f"{options.out}: {size:,} bytes, for base {pack.base.fingerprint}"


def apply(options: argparse.Namespace) -> str:
    packs = apply_packs(options.model, options.pack, options.out)
    names = [extension.name for extension in ModelDirectory(options.out).config.extension_list()]
    lines = [
        f"note: pack {pack.extension.name!r} was made in a model with extension {other!r}, which is not here"
        for pack in packs
        for other in pack.beside
        if other not in names
    ]
    return "\n".join([*lines, f"{options.out}: with {', '.join(pack.extension.name for pack in packs)}"])


def remove(options: argparse.Namespace) -> str:
    remove_extension(options.model, options.name, options.out)
    return f"{options.out}: without {options.name}"


def merge(options: argparse.Namespace) -> str:
    merge_common(options.model, options.name, options.out)
    return f"{options.out}: {options.name} is part of the model's own pools"


def show(options: argparse.Namespace) -> str:
    """One line for each extension."""
    model = ModelDirectory(options.model)
    lines = []
    for extension in model.config.extension_list():
        count = sum(spec.numel for name, spec in model.specs.items() if extension.owns(name))
        slots = f"top-{extension.num_experts_per_tok} and top-{extension.num_attn_experts_per_tok}"
        lines.append(
            f"{extension.name}: {extension.mode}, {extension.num_experts} FFN and {extension.num_attn_experts} "
            f"attention experts in each layer, {slots if extension.mode == 'group' else 'no slots of their own'}, "
            f"{count:,} parameters"
        )
    return "\n".join(lines or [f"{options.model} has no extensions"])


COMMANDS = {"create": create, "apply": apply, "remove": remove, "merge": merge, "list": show}


if __name__ == "__main__":
    sys.exit(main())
