"""What a finished run shows: a table of scores, samples, the loss curve and pictures of expert use."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modmoe.data import DomainStatistics
from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.output_dir import RESULTS
from modmoe.training.evaluation import DomainScore

_PROMPTS = {"python": "def ", "c": "#include", "english": "The "}
_SIDE_TITLES = {"attn": "attention experts", "ffn": "FFN experts"}


def score_table(scores: Mapping[str, DomainScore], statistics: Mapping[str, DomainStatistics]) -> str:
    """Bits per byte of each domain beside what simple compressors need for the same validation text."""
    header = ("domain", "nats/token", "bits/byte", "gzip -9", "byte unigram")
    rows = [
        (
            name,
            f"{score.nats_per_token:.3f}",
            f"{score.bits_per_byte:.3f}",
            _number(statistics[name].gzip_bits_per_byte),
            _number(statistics[name].byte_unigram_entropy),
        )
        for name, score in scores.items()
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
    )


def write_results(
    scores: Mapping[str, DomainScore], statistics: Mapping[str, DomainStatistics], output_dir: Path
) -> None:
    """Write the figures of the table to results.json."""
    results = {
        name: {
            "nats_per_token": score.nats_per_token,
            "bits_per_byte": score.bits_per_byte,
            "gzip_bits_per_byte": statistics[name].gzip_bits_per_byte,
            "byte_unigram_entropy": statistics[name].byte_unigram_entropy,
        }
        for name, score in scores.items()
    }
    (output_dir / RESULTS).write_text(json.dumps(results, indent=1))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domain: str, max_new_tokens: int = 48) -> str:
    """A text that the model writes when it is given the beginning of one; the same for the same model."""
    prompt = _PROMPTS.get(domain, "The ")
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=40,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def write_expert_use(scores: Mapping[str, DomainScore], layers: dict[str, list[int]], output_dir: Path) -> None:
    """
    Write each expert's share of the tokens, per domain, router side and layer, as JSON and as a picture.

    For extensions also how many tokens use them at all.

    Args:
        scores: of an evaluation.
        layers: of `routed_layers`.
        output_dir: gets expert_use.json and expert_use.png.
    """
    use = {name: score.loads.shares(layers) for name, score in scores.items()}
    used = {name: score.loads.used(layers) for name, score in scores.items()}
    content = {"layers": layers, "share_of_assignments": use, "share_of_tokens_that_use_the_extension": used}
    (output_dir / "expert_use.json").write_text(json.dumps(content, indent=1))
    # What trains beside a frozen model that has routers need not run these.
    sides = [side for side in layers if any(loads.get(side) for loads in use.values())]
    if sides:
        _draw_expert_use(use, used, sides, layers, output_dir / "expert_use.png")


def _draw_expert_use(
    use: dict[str, dict[str, list[list[float]]]],
    used: dict[str, dict[str, list[float]]],
    sides: list[str],
    layers: dict[str, list[int]],
    path: Path,
) -> None:
    figure, axes = _subplots(len(use), len(sides), width=5.0, height=0.5 + 0.3 * max(len(layers[s]) for s in sides))
    for row, (domain, loads) in enumerate(use.items()):
        for column, side in enumerate(sides):
            axis, shares = axes[row][column], loads[side]
            # Layers may differ in their number of experts; the rest of a row stays empty.
            wide = max(len(layer) for layer in shares)
            # Relative to an even load, so that routers of different sizes share one scale.
            grid = [[v * len(layer) for v in layer] + [float("nan")] * (wide - len(layer)) for layer in shares]
            image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=4, interpolation="nearest")
            axis.set_title(f"{domain}: {_title(side)}", fontsize=9)
            labels = [str(layer) for layer in layers[side]]
            if side in used[domain]:
                labels = [f"{label} ({share:.0%})" for label, share in zip(labels, used[domain][side], strict=True)]
            axis.set_yticks(range(len(labels)), labels)
            axis.set_ylabel("layer (tokens that use it)" if side in used[domain] else "layer")
            axis.set_xticks(range(0, wide, -(-wide // 16)))
            axis.set_xlabel("expert")
            figure.colorbar(image, ax=axis, label="load / even load")
    figure.savefig(path, dpi=120)


def _title(side: str) -> str:
    extension, _, kind = side.rpartition("/")
    return f"{_SIDE_TITLES[kind]} of {extension}" if extension else _SIDE_TITLES[kind]


def draw_loss(metrics_file: Path, path: Path) -> None:
    """Training loss, and validation loss of each domain where it was taken, over tokens."""
    records = read_metrics(metrics_file)
    training = [record for record in records if "loss" in record]
    if not training:
        return
    tokens_per_step = training[-1]["tokens"] / training[-1]["step"]
    figure, axes = _subplots(1, 1, width=7.0, height=3.5)
    axis = axes[0][0]
    if "cross_entropy" in training[-1]:  # all but what learns from hidden states alone
        axis.plot([r["tokens"] for r in training], [r["cross_entropy"] for r in training], label="training")
    suffix = "/nats_per_token"
    for name in sorted({key for record in records for key in record if key.endswith(suffix)}):
        points = [(r["step"] * tokens_per_step, r[name]) for r in records if name in r]
        axis.plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("eval/").removesuffix(suffix))
    axis.set_xlabel("tokens")
    axis.set_ylabel("cross entropy, nats per token")
    if axis.lines:
        axis.legend()
    figure.savefig(path, dpi=120)


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no display, and its axes as a list of rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, (height + 0.8) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
