#!/usr/bin/env python
"""Measure which experts of a model are used on which domain of text.

    python tools/expert_report.py --model DIR --data python=embedded:python english=embedded:english --out REPORT

DIR is a saved model with its tokenizer: native, IBM's, or a transformers MoE model. A domain is NAME=PLACE, and PLACE
a file, directory or pattern (plain text, jsonl, parquet), embedded:NAME (python, english, c; without their validation
text), or dataset:NAME or dataset:NAME:CONFIG (on the hub or local). REPORT gets index.html with everything in it, the
pictures alone, usage.csv, and usage.json for other programs.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import command
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import modmoe
from modmoe import ModMoEPreTrainedModel
from modmoe.data.tokenizer import DocumentEncoder
from modmoe.surgery.fingerprint import checkpoint_identity
from modmoe.surgery.texts import load_saved_tokenizer, parse_domains, text_batches
from modmoe.surgery.usage import UsageReport, measure_usage
from modmoe.surgery.usage_files import PAGE_FILE, check_output, write_report

NATIVE_TYPES = ("modmoe", "moduleformer")
Batch = dict[str, torch.Tensor]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PLACE")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT")
    parser.add_argument("--text-field", default="text", help="column with the text [text]")
    parser.add_argument("--tokens", type=_count, default=131072, help="tokens of each domain, at most [131072]")
    parser.add_argument("--sequence-length", type=_count, default=512, help="tokens of a sequence [512]")
    parser.add_argument("--batch-size", type=_count, default=8, help="sequences of a forward pass [8]")
    options = parser.parse_args(arguments)
    disable_progress_bar()  # of loading; measuring has its own
    return command.run(lambda: write(options))


def write(options: argparse.Namespace) -> str:
    report = measure(options)
    write_report(report, options.out)
    return f"{summary(report)}\n\nwritten to {options.out / PAGE_FILE}"


def measure(options: argparse.Namespace) -> UsageReport:
    """What can be refused is refused before the model is loaded and any text measured."""
    check_output(options.out, options.model)
    identity = checkpoint_identity(options.model)
    config = AutoConfig.from_pretrained(options.model)
    sources = parse_domains(options.data, options.text_field)
    tokenizer = load_saved_tokenizer(options.model)
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise ValueError(
            f"the tokenizer in {options.model} has {len(tokenizer)} tokens but the model knows "
            f"{config.get_text_config().vocab_size}: save the tokenizer that the model was trained with"
        )
    encoder = DocumentEncoder(tokenizer)
    amounts = {name: getattr(options, name) for name in ("sequence_length", "batch_size")}
    # Other models are given no positions: they would take packed documents for one where a batch has several rows.
    amounts |= {"max_tokens": options.tokens, "with_positions": config.model_type in NATIVE_TYPES}
    batches = {name: begin(text_batches(source, encoder, **amounts)) for name, source in sources.items()}
    model = load_model(options.model)
    return measure_usage(
        model,
        {name: progress(name, domain, options.tokens) for name, domain in batches.items()},
        identity=identity,
        arguments={
            "data": " ".join(options.data),
            "tokens": options.tokens,
            "sequence_length": options.sequence_length,
            "batch_size": options.batch_size,
            "dtype": str(model.dtype),
            "versions": ", ".join(f"{p.__name__} {p.__version__}" for p in (modmoe, torch, transformers)),
        },
    )


def begin(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, the first one read already: a broken source is found before others take their time."""
    return itertools.chain([next(batches)], batches)


def load_model(directory: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, output_loading_info=True)
    # Native models check this themselves; of others transformers only warns, and makes the weights up.
    if info["missing_keys"] and not isinstance(model, ModMoEPreTrainedModel):
        raise ValueError(
            f"{len(info['missing_keys'])} tensors are missing in {directory}, such as {min(info['missing_keys'])}: "
            "copy or save the checkpoint again"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def progress(name: str, batches: Iterator[Batch], max_tokens: int) -> Iterator[Batch]:
    with tqdm(desc=name, total=max_tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(batch["input_ids"].numel())


def summary(report: UsageReport) -> str:
    """A line for each router."""
    tokens = ", ".join(f"{name} {count:,}" for name, count in report.tokens.items())
    lines = [f"tokens: {tokens}", "layer  side  experts  top-k  max violation  dead  I(m;x)  I(m;domain)"]
    for router in report.routers:
        sums, domain_information = router.on(), router.specialisation.mutual_information
        dead = int(sums.dead(report.dead_below).sum())
        lines.append(
            f"{router.layer:5d}  {router.side:>4}  {router.num_experts:7d}  {router.top_k:5d}  "
            f"{sums.max_violation:13.2f}  {dead:4d}  {sums.mutual_information:6.3f}  {domain_information:11.4f}"
        )
    return "\n".join(lines)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
