"""What a pruning would change, as a table: experts, parameters, bytes, and the weights that a token passes through."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from modmoe.models import ModMoEConfig
from modmoe.models.safetensors_stream import TensorSpec
from modmoe.surgery.prune import Pruning

_HEADER = ("layer", "side", "experts", "top-k", "experts that go", "parameters", "bytes")


class Size(NamedTuple):
    """Of some tensors."""

    parameters: int
    """Floating-point numbers; router tables are none."""
    num_bytes: int


def size_of(specs: Iterable[TensorSpec]) -> Size:
    specs = list(specs)
    return Size(sum(spec.numel for spec in specs if spec.dtype.is_floating_point), sum(spec.nbytes for spec in specs))


def size_before(pruning: Pruning) -> Size:
    """Of the whole checkpoint."""
    weights = pruning.checkpoint.weights
    return size_of(map(weights.spec, weights))


def size_after(pruning: Pruning) -> Size:
    """Of what would be left."""
    return size_of(map(pruning.spec, pruning.tensors))


def active_before(pruning: Pruning) -> int:
    """
    Weights that one token passes through, which is half the floating-point operations of a forward pass without
    attention over the context. The output layer counts, the embedding is only looked up.
    """
    checkpoint = pruning.checkpoint
    idle = sum(
        checkpoint.weights.spec(tensor.name).numel * (pool.num_experts - pool.top_k) // pool.num_experts
        for pool in checkpoint.pools.values()
        for tensor in pool.experts
    )
    return size_before(pruning).parameters - idle - _looked_up(pruning) - _idle_in_extensions(pruning)


def active_after(pruning: Pruning) -> int:
    """The same of the pruned model."""
    idle = 0
    for place, old in pruning.checkpoint.pools.items():
        new = pruning.pools[place]
        pool = sum(pruning.checkpoint.weights.spec(tensor.name).numel for tensor in old.experts)
        idle += pool * (len(new.experts) - new.top_k) // old.num_experts
    return size_after(pruning).parameters - idle - _looked_up(pruning) - _idle_in_extensions(pruning)


def _looked_up(pruning: Pruning) -> int:
    """Tables of embeddings, without one that is the output layer as well."""
    tables = ["embed_positions.weight"]
    if not pruning.checkpoint.config.tie_word_embeddings:
        tables.append("embed_tokens.weight")
    weights = pruning.checkpoint.weights
    return sum(weights.spec(name).numel for name in weights if name.endswith(tuple(tables)))


def _idle_in_extensions(pruning: Pruning) -> int:
    """What a token does not use of extensions, which pruning leaves as they are."""
    config, weights = pruning.checkpoint.config, pruning.checkpoint.weights
    idle = 0
    for extension in config.extension_list() if isinstance(config, ModMoEConfig) else ():
        for name in weights:
            if extension.owns(name) and ".experts." in name:
                attention, spec = ".self_attn." in name, weights.spec(name)
                top_k = extension.num_attn_experts_per_tok if attention else extension.num_experts_per_tok
                # Common experts have no slots of their own: one of them is used in place of an old one.
                used = top_k if extension.mode == "group" else 0
                idle += spec.numel * (spec.shape[0] - used) // spec.shape[0]
    return idle


def rows(pruning: Pruning) -> list[tuple[str, ...]]:
    """For each router what `_HEADER` names; "old -> new" where that changes."""
    found: list[tuple[str, ...]] = []
    weights = pruning.checkpoint.weights
    for place, old in pruning.checkpoint.pools.items():
        new = pruning.pools[place]
        before = size_of(weights.spec(tensor.name) for tensor in (*old.router, *old.experts))
        after = size_of(pruning.spec(name) for name in _tensors_of(pruning, f"{old.module}."))
        gone = sorted(set(range(old.num_experts)) - set(new.experts))
        found.append(
            (
                str(place[0]),
                place[1],
                _change(old.num_experts, len(new.experts)),
                _change(old.top_k, new.top_k),
                _ranges(gone),
                _change(before.parameters, after.parameters),
                _change(before.num_bytes, after.num_bytes),
            )
        )
    return found


def _tensors_of(pruning: Pruning, module: str) -> list[str]:
    parts = (f"{module}gate.", f"{module}experts.")
    return [name for name in pruning.tensors if name.startswith(parts)]


def table(pruning: Pruning) -> str:
    """Plain text: the rows, then the model as a whole."""
    lines = [_HEADER, *rows(pruning)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", *totals(pruning)])


def markdown(pruning: Pruning, heading: str) -> str:
    """The same for a model card."""
    lines = ["| " + " | ".join(line) + " |" for line in rows(pruning)]
    header = "| " + " | ".join(_HEADER) + " |"
    rule = "|" + "---|" * len(_HEADER)
    return "\n".join(["", heading, "", header, rule, *lines, "", *(f"- {line}" for line in totals(pruning)), ""])


def totals(pruning: Pruning) -> list[str]:
    """Parameters, bytes and active compute of the model, before and after."""
    before, after = size_before(pruning), size_after(pruning)
    active, active_left = active_before(pruning), active_after(pruning)
    return [
        f"parameters: {_change(before.parameters, after.parameters)} {_percent(before.parameters, after.parameters)}",
        f"bytes: {_change(before.num_bytes, after.num_bytes)} {_percent(before.num_bytes, after.num_bytes)}",
        f"operations per token: {_change(2 * active, 2 * active_left)} {_percent(active, active_left)}; two for each "
        "weight that it passes through, attention over the context not counted",
    ]


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


def _percent(before: int, after: int) -> str:
    return f"({100 * (after - before) / before:+.1f} %)"


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"; "none" of nothing."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
