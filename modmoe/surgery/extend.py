"""Adding experts to a saved model, and training them alone.

Letters: E experts of a pool, n new ones.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import nn

from modmoe.models import ModMoEConfig, ModMoEModel
from modmoe.models.extension import Extension
from modmoe.models.safetensors_stream import TensorSpec
from modmoe.surgery.model_directory import ModelDirectory, check_new, native_config, write_model
from modmoe.surgery.usage import UsageReport

Init = Literal["zero", "clone", "random"]

_OUTPUTS = ("down_proj", "o_proj.weight")


class Cost(NamedTuple):
    """What an extension costs on top of the model."""

    parameters: int
    """New ones."""
    active_parameters: int
    """Of these, what one token passes through at most: it may decline."""
    multiply_adds: int
    """Per token at most, without those that grow with the context."""
    multiply_adds_per_key: int
    """Per token and key that it attends to."""


class MostUsed(NamedTuple):
    """The experts that a usage report has seen most, for copies to begin with."""

    report: UsageReport
    """Of the model that is extended."""
    domain: str | None = None
    """On which domain; None is all measured tokens together."""

    def experts(self, layer: int, side: str, count: int) -> list[int]:
        """The experts of a pool of `count`, most used first; those of "common" extensions are left out."""
        load = self.report.scores("frequency", self.domain, layer=layer, side=side)[:count]
        return load.argsort(descending=True, stable=True).tolist()


def add_extension(
    directory: Path,
    out: Path,
    extension: Extension,
    *,
    init: Init = "zero",
    seed: int = 0,
    most_used: MostUsed | None = None,
) -> Cost:
    """
    Write a model with an extension in every layer. The weights of the old one pass through memory tensor by tensor.

    Args:
        directory: a native model; not modified.
        out: a new directory, which appears once it is complete.
        extension: what is added.
        init: how it starts. "zero": output projections of zeros, the rest as in a new model; in a router group the
            logits are then those of the old model, bit for bit, and common rows begin as the mean of the old ones.
            "clone": copies of the old experts and of their router; null gets the mean of its rows. "random": all as in
            a new model.
        seed: of random numbers; the same seed gives the same weights.
        most_used: which experts "clone" copies; without it, those that come first in their pool.

    Raises:
        FileNotFoundError: no native model in `directory`.
        FileExistsError: if `out` exists.
        ValueError: an extension that does not fit the model, such as one whose name is taken; a usage report of
            another model, or where nothing is copied.
    """
    if init not in get_args(Init):
        raise ValueError(f"init={init!r} is not one of {', '.join(get_args(Init))}")
    check_new(out, directory)
    model = ModelDirectory(directory)
    if most_used is not None:
        if init != "clone":
            raise ValueError(f"init={init!r} copies no experts, so a usage report cannot choose any: leave it out")
        most_used.report.check_model(directory)
        most_used.report.check_domain(most_used.domain)
    fields = with_extension(model, extension)
    skeleton = on_meta(native_config(fields))
    specs = extension_specs(model, skeleton, extension)
    new = _new_tensors(model, skeleton, extension, init, seed, most_used)
    pieces = itertools.chain(model.weights.items(), ((name, piece.to(specs[name].dtype)) for name, piece in new))
    write_model(model, out, fields, model.specs | specs, pieces)
    return extra_cost(skeleton, extension)


def train_only(model: nn.Module, extensions: Iterable[str] | str) -> list[str]:
    """
    Let nothing be trained but the named extensions (lifelong learning). `model.requires_grad_(True)` undoes it.

    What is frozen stays the same bit for bit: an optimizer that is given trainable parameters alone neither decays nor
    partitions the rest.

    Args:
        model: with the extensions.
        extensions: their names.

    Returns:
        the names of the parameters that stay trainable.

    Raises:
        ValueError: if the model has no such extension.
    """
    wanted = [extensions] if isinstance(extensions, str) else list(extensions)
    config: Any = model.config
    present = {extension.name: extension for extension in config.extension_list()}
    unknown = [name for name in wanted if name not in present]
    if unknown or not wanted:
        problem = f"the model has no extension {unknown[0]!r}" if unknown else "no extension is named"
        raise ValueError(f"{problem}: it has {', '.join(present) or 'none; add one with tools/extend.py'}")
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(present[extension].owns(name) for extension in wanted))
        trainable += [name] if parameter.requires_grad else []
    return trainable


def with_extension(
    model: ModelDirectory, extension: Extension, fields: dict[str, Any] | None = None
) -> dict[str, Any]:
    """
    A model's config.json with one extension more.

    Args:
        model: to be extended.
        extension: what is added.
        fields: of config.json, if other extensions have been added to them.

    Raises:
        ValueError: if its name is taken, or it does not fit.
    """
    fields = model.fields if fields is None else fields
    present = fields.get("extensions", [])
    if any(other["name"] == extension.name for other in present):
        raise ValueError(
            f"{model.path} has an extension {extension.name!r} already: choose another name, or remove that one with "
            "tools/pack.py remove"
        )
    fields = fields | {"extensions": [*present, dataclasses.asdict(extension)]}
    native_config(fields)
    return fields


def on_meta(config: ModMoEConfig) -> ModMoEModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return ModMoEModel(config)


def extension_specs(model: ModelDirectory, skeleton: ModMoEModel, extension: Extension) -> dict[str, TensorSpec]:
    """
    Names, dtypes and shapes of an extension's tensors in the files of `model`, dtypes as those of the old pools.

    Args:
        skeleton: the model with the extension.
    """
    dtypes = {"gate": _dtype_of(model, ".gate.weight"), "experts": _dtype_of(model, ".experts.")}
    return {
        model.prefix + name: TensorSpec(dtypes[name.split(f".extensions.{extension.name}.")[1].split(".")[0]], shape)
        for name, shape in ((name, tuple(p.shape)) for name, p in skeleton.named_parameters())
        if extension.owns(name)
    }


def _dtype_of(model: ModelDirectory, part: str) -> torch.dtype:
    return next(spec.dtype for name, spec in model.specs.items() if part in name)


def extra_cost(skeleton: ModMoEModel, extension: Extension) -> Cost:
    """What an extension of `skeleton`, which has it, costs."""
    total = active = products = 0
    for gate, experts in skeleton.extension_pools(extension.name):
        # Common experts have no slots of their own.
        used = getattr(gate, "top_k", 0)
        for parameter in (*gate.parameters(), *experts.parameters()):
            total += parameter.numel()
        active += sum(p.numel() for p in gate.parameters())
        active += used * sum(p[0].numel() for p in experts.parameters())
        products += sum(p.numel() for p in gate.parameters() if p.ndim > 1)
        products += used * sum(p[0].numel() for p in experts.parameters() if p.ndim > 2)
    config = skeleton.config
    groups = [other.name for other in config.extension_list() if other.mode == "group"]
    slots = extension.num_attn_experts_per_tok if extension.num_attn_experts and extension.name in groups else 0
    heads = slots * config.num_attention_heads
    # All extensions read the document context that the first one needs: a head of its own for each kv head, or in
    # stick-breaking models less, a sum.
    if groups[:1] == [extension.name]:
        heads += cast(int, config.num_key_value_heads)
    return Cost(total, active, products, 2 * config.num_hidden_layers * heads * (config.head_dim or 0))


def gate_bound(model: ModelDirectory, extension: Extension, init: Init) -> float | None:
    """
    How much of a token's softmax the new rows of a "common" extension take at most, before any training.

    The old gates shrink by this share. With n rows of mean logit beside E old ones it is n / (n + E), for
    sum exp(l) >= E exp(mean l). GMM routers compare directions, and that of the mean row may be the nearest; their
    logits lie between -T and T, which leaves n / (n + E exp(-2 T)). Clones take what the experts they copy take: 1/2
    of all if each is copied once.

    Returns:
        the largest share of all routers; None for random rows, of which nothing is known.
    """
    config = model.config
    sides = (
        ("mlp", extension.num_experts, config.experts_at),
        ("self_attn", extension.num_attn_experts, config.attn_experts_at),
    )
    shares = []
    for layer, (side, new, experts_at) in itertools.product(range(config.num_hidden_layers), sides):
        old, _ = experts_at(layer)
        if not new or init == "random":
            continue
        if init == "clone":
            copies = -(-new // old)
            shares.append(copies / (copies + 1))
            continue
        temperature = f"{model.prefix}layers.{layer}.{side}.gate.log_temperature"
        spread = 2 * float(model.weights[temperature].exp()) if temperature in model.weights else 0.0
        shares.append(new / (new + old * math.exp(-spread)))
    return max(shares, default=None)


# How new weights start.


def _new_tensors(
    model: ModelDirectory,
    skeleton: ModMoEModel,
    extension: Extension,
    init: Init,
    seed: int,
    most_used: MostUsed | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values, in float32, of an extension's tensors: one layer's side in memory at a time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, part in list(skeleton.named_modules()):
            if name.endswith(f".extensions.{extension.name}"):
                part.to_empty(device="cpu")
                part.apply(skeleton._init_weights)
                base = model.prefix + name.split(".extensions.")[0]
                _start(part, base, model, extension, init, most_used)
                yield from ((f"{model.prefix}{name}.{rest}", p.detach()) for rest, p in part.named_parameters())
                part.to(device="meta")


@torch.no_grad()
def _start(
    part: nn.Module,
    base: str,
    model: ModelDirectory,
    extension: Extension,
    init: Init,
    most_used: MostUsed | None,
) -> None:
    """Change the weights of a new model into what `init` says; `base` is the name of the module with the old pool."""
    weights, common = model.weights, extension.mode == "common"
    parameters = dict(part.named_parameters())
    experts = {name: p for name, p in parameters.items() if name.startswith("experts.")}
    if init == "zero":
        for name, parameter in experts.items():
            if name.endswith(_OUTPUTS):
                parameter.zero_()
        if common:
            parameters["gate.weight"][:] = _router_rows(model, base).mean(0)
    if init != "clone":
        return
    originals = _originals(base, model, extension, most_used)
    for name, parameter in experts.items():
        for i, expert in enumerate(originals):
            parameter[i] = weights.rows(f"{base}.{name}", expert, expert + 1)[0]
    if f"{base}.gate.weight" not in weights:
        return  # of a dense layer, which has no router to copy
    for name, parameter in parameters.items():
        if name == "gate.weight":
            rows = _router_rows(model, base)
            copies = rows[originals]
            parameter.copy_(copies if common else torch.cat([rows.mean(0, keepdim=True), copies]))
        elif name.startswith("gate.") and name != "gate.context_weight":  # the old routers have no such thing
            parameter.copy_(weights[f"{base}.{name}"])


def _originals(base: str, model: ModelDirectory, extension: Extension, most_used: MostUsed | None) -> list[int]:
    """For each new expert of the pool in module `base` the old one that it is a copy of."""
    *_, number, side = base.split(".")
    layer, is_attention = int(number), side == "self_attn"
    count, _ = (model.config.attn_experts_at if is_attention else model.config.experts_at)(layer)
    new = extension.num_attn_experts if is_attention else extension.num_experts
    order = list(range(count))
    if most_used is not None and count > 1:
        order = most_used.experts(layer, "attn" if is_attention else "ffn", count)
    return [order[i % count] for i in range(new)]


def _router_rows(model: ModelDirectory, base: str) -> torch.Tensor:
    """(E, width) in float32: the router's row of each old expert, without those of pruned ones."""
    rows, own = model.weights[f"{base}.gate.weight"].float(), f"{base}.gate.expert_rows"
    return rows[model.weights[own]] if own in model.weights else rows
