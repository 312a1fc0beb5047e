"""Removing experts from a saved model, on the disk: the weights pass through memory one tensor or expert at a time.

Letters: E experts of a pool, K of them per token, R rows of its router: E, and those of pruned experts that stay in
the softmax.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from modmoe.models import ModMoEConfig
from modmoe.models.safetensors_stream import MAX_SHARD_BYTES, TensorSpec, WeightsWriter
from modmoe.surgery.expert_tensors import ExpertCheckpoint, ExpertPool
from modmoe.surgery.model_directory import copy_all_but_weights, native_config, new_directory
from modmoe.surgery.prune_plan import Place, Scope, plan_pruning
from modmoe.surgery.usage import UsageReport

Denominator = Literal["keep", "drop"]

_CONFIG = "config.json"
_CARD = "README.md"


class PrunedPool(NamedTuple):
    """What becomes of one router and its experts."""

    experts: list[int]
    """The experts that stay, by their old numbers, ascending."""
    top_k: int
    router_rows: list[int]
    """The router's rows that stay, by their old numbers, ascending; none if a dense layer is left."""
    rows: list[int]
    """Of the rows that stay, the one of each expert."""


class Source(NamedTuple):
    """Where a tensor comes from."""

    name: str
    rows: list[int] | None = None
    """The rows that stay; None is the whole tensor."""


@dataclass(frozen=True, eq=False)
class Pruning:
    """
    What would go from a checkpoint; `write` does it.

    Args:
        checkpoint: the model.
        kept: per pool the experts that stay; pools that are not named keep all.
        denominator: "drop" removes the router rows of the experts that go, which raises the gates of the others;
            "keep" leaves them in the softmax, where they are never chosen, so that the gates of the others stay what
            they are. Rows of experts that were pruned earlier stay either way.

    Raises:
        ValueError: what models of this type cannot be.
    """

    checkpoint: ExpertCheckpoint
    kept: Mapping[Place, list[int]]
    denominator: Denominator = "drop"

    def __post_init__(self) -> None:
        if self.denominator not in get_args(Denominator):
            raise ValueError(f"denominator {self.denominator!r} is not one of {', '.join(get_args(Denominator))}")
        if self.checkpoint.is_native:
            try:
                native_config(self.fields)
            except ValueError as error:
                raise ValueError(
                    f"what is left would be no model ({error}): keep more experts, or use denominator 'keep'"
                ) from None
            return
        kind = self.checkpoint.config.model_type
        counts = sorted({len(pool.experts) for pool in self.pools.values()})
        if self.denominator == "keep":
            raise ValueError(f"denominator 'keep' needs a native model, and this is {kind!r}: use 'drop'")
        if len(counts) > 1:
            raise ValueError(
                f"{kind!r} has the same number of experts in all layers, not {counts[0]} to {counts[-1]}: use scope "
                "'layer' with keep or keep_experts"
            )

    @cached_property
    def pools(self) -> dict[Place, PrunedPool]:
        return {
            place: _prune_pool(pool, self.kept.get(place), self.denominator, self.checkpoint.is_native)
            for place, pool in self.checkpoint.pools.items()
        }

    @property
    def is_empty(self) -> bool:
        """Whether nothing goes."""
        return all(len(self.pools[place].experts) == old.num_experts for place, old in self.checkpoint.pools.items())

    @cached_property
    def tensors(self) -> dict[str, Source | Tensor]:
        """Name -> where it comes from, or the tensor, of all that the pruned model has."""
        place_of = {
            tensor.name: (place, tensor)
            for place, pool in self.checkpoint.pools.items()
            for tensor in (*pool.router, *pool.experts)
        }
        found: dict[str, Source | Tensor] = {}
        for name in self.checkpoint.weights:
            if name not in place_of:
                found[name] = Source(name)
                continue
            place, tensor = place_of[name]
            new, module = self.pools[place], self.checkpoint.pools[place].module
            if tensor.expert is not None:
                if tensor.expert in new.experts:
                    found[f"{module}.experts.{new.experts.index(tensor.expert)}.{tensor.rest}"] = Source(name)
            elif tensor in self.checkpoint.pools[place].experts:
                found[name] = Source(name, new.experts)
            elif new.router_rows:
                found |= self._router_tensor(name, tensor.rest, new)
        for place, new in self.pools.items():
            if len(new.rows) < len(new.router_rows):
                found[f"{self.checkpoint.pools[place].module}.gate.expert_rows"] = torch.tensor(new.rows)
        return found

    def _router_tensor(self, name: str, rest: str, new: PrunedPool) -> dict[str, Source | Tensor]:
        if rest == "expert_rows":  # made anew
            return {}
        rows = {"weight": new.router_rows, "selection_bias": new.experts}
        return {name: Source(name, rows.get(rest))}

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor of the pruned model."""
        source = self.tensors[name]
        if isinstance(source, Tensor):
            return TensorSpec.of(source)
        spec = self.checkpoint.weights.spec(source.name)
        return spec if source.rows is None else TensorSpec(spec.dtype, (len(source.rows), *spec.shape[1:]))

    @cached_property
    def fields(self) -> dict[str, Any]:
        """config.json of the pruned model."""
        fields = dict(self.checkpoint.fields)
        if self.is_empty:
            return fields
        if not self.checkpoint.is_native:
            pool = next(iter(self.pools.values()))
            names = [name for name in ("num_experts", "num_local_experts") if name in fields]
            return fields | dict.fromkeys(names, len(pool.experts)) | {"num_experts_per_tok": pool.top_k}
        for side, name in (("attn", "attn_experts"), ("ffn", "experts")):
            fields |= self._native_fields(side, name)
        fields.pop("num_local_experts", None)  # another name of num_experts, which is set
        sample_topk = cast(ModMoEConfig, self.checkpoint.config).sample_topk
        routed = [pool.top_k for pool in self.pools.values() if pool.router_rows]
        return fields | {"sample_topk": min([sample_topk, *routed])}

    def _native_fields(self, side: str, name: str) -> dict[str, Any]:
        config = self.checkpoint.config
        layers = range(config.num_hidden_layers)
        pools = {layer: self.pools[layer, side] for layer in layers if (layer, side) in self.pools}
        counts = [len(pools[layer].experts) if layer in pools else 1 for layer in layers]
        ghosts = [len(pools[layer].router_rows) - counts[layer] if layer in pools else 0 for layer in layers]
        top_k = _per_layer(getattr(config, f"num_{name}_per_tok"), len(layers))
        if any(pool.top_k < top_k[layer] for layer, pool in pools.items()):
            top_k = [min(pair) for pair in zip(top_k, counts, strict=True)]
        return {
            f"num_{name}": _short(counts),
            f"num_{name}_per_tok": _short(top_k),
            f"num_pruned_{name}": _short([max(0, ghost) for ghost in ghosts]),
        }

    @property
    def warnings(self) -> list[str]:
        """A sentence for each side on which tokens use fewer experts than before."""
        found = []
        for side in ("attn", "ffn"):
            lower = {
                place[0]: (old.top_k, self.pools[place].top_k)
                for place, old in self.checkpoint.pools.items()
                if place[1] == side and self.pools[place].top_k < old.top_k
            }
            if lower:
                most = max(old for old, _ in lower.values())
                changes = ", ".join(f"layer {layer}: {old} to {new}" for layer, (old, new) in lower.items())
                found.append(
                    f"fewer {side} experts stay than a token uses, so it uses fewer ({changes}): keep at least {most} "
                    "in each layer to avoid it"
                )
        old, new = getattr(self.checkpoint.config, "sample_topk", 0), self.fields.get("sample_topk", 0)
        if new < old:
            found.append(f"sample_topk falls from {old} to {new}, the fewest experts that a token now uses")
        return found

    def write(self, out: Path, card: str = "", max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """
        Write the pruned model with all other files of the checkpoint: tokenizer, generation config, README.

        The directory appears once it is complete. Memory holds one tensor, or one expert's part of it, at a time.

        Args:
            out: a new or empty directory outside of the checkpoint's.
            card: Markdown that is added to the README.
            max_shard_bytes: of weights in one file.

        Raises:
            FileExistsError, ValueError: see `check_new`.
            OSError: where the disk cannot take it.
        """
        source = self.checkpoint.directory
        with new_directory(out, source) as written:
            copy_all_but_weights(source, written)
            (written / _CONFIG).write_text(json.dumps(self.fields, indent=2) + "\n")
            if card:
                with (written / _CARD).open("a") as readme:
                    readme.write(card)
            if not self.is_empty:
                self._write_weights(written, max_shard_bytes)
                return
            # The same files: weights are used where they lie in a file, and on a CPU the last bit of a product can
            # depend on the address.
            for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
                shutil.copyfile(file, written / file.name)

    def _write_weights(self, directory: Path, max_shard_bytes: int) -> None:
        weights = self.checkpoint.weights
        specs = {name: self.spec(name) for name in self.tensors}
        with WeightsWriter(directory, specs, max_shard_bytes) as writer:
            for name, source in self.tensors.items():
                if isinstance(source, Tensor):
                    writer.write(name, source)
                elif source.rows is None:
                    writer.write(name, weights[source.name])
                else:
                    for row in source.rows:
                        writer.write(name, weights.rows(source.name, row, row + 1))


def choose_pruning(
    checkpoint: ExpertCheckpoint,
    report: UsageReport,
    *,
    metric: str = "frequency",
    domain: str | None = None,
    sides: Iterable[str] = (),
    denominator: Denominator = "drop",
    keep: float | None = None,
    keep_experts: int | None = None,
    threshold: float | None = None,
    scope: Scope = "layer",
) -> Pruning:
    """
    What should go from a checkpoint, by the use of its experts.

    Args:
        checkpoint: the model.
        report: of this very checkpoint.
        metric, domain: as for `UsageReport.scores`.
        sides: of "attn" and "ffn", where experts may go; all that the model has if empty.
        denominator: see `Pruning`.
        keep, keep_experts, threshold, scope: see `plan_pruning`.

    Raises:
        ValueError: a report of another model, or wishes that cannot be met; names the value.
    """
    report.check_model(checkpoint.directory)
    present = {side for _, side in checkpoint.pools}
    absent = sorted(set(sides) - present)
    if absent:
        raise ValueError(f"the model has no {absent[0]!r} experts to remove; it has {', '.join(sorted(present))}")
    scores = {
        (layer, side): report.scores(metric, domain, layer=layer, side=side)
        for layer, side in checkpoint.pools
        if side in (set(sides) or present)
    }
    kept = plan_pruning(scores, keep=keep, keep_experts=keep_experts, threshold=threshold, scope=scope)
    return Pruning(checkpoint, kept, denominator)


def _prune_pool(pool: ExpertPool, kept: list[int] | None, denominator: Denominator, is_native: bool) -> PrunedPool:
    kept = list(range(pool.num_experts)) if kept is None else kept
    gone = {row for expert, row in enumerate(pool.rows) if expert not in kept} if denominator == "drop" else set()
    router_rows = [row for row in range(pool.num_rows) if row not in gone]
    rows = [router_rows.index(pool.rows[expert]) for expert in kept]
    if is_native and len(router_rows) == 1:  # a softmax over one is 1: a dense layer
        router_rows = rows = []
    return PrunedPool(kept, min(pool.top_k, len(kept)), router_rows, rows)


def _per_layer(value: int | list[int], num_layers: int) -> list[int]:
    return value if isinstance(value, list) else [value] * num_layers


def _short(values: list[int]) -> int | list[int]:
    """One number for all layers where it is the same."""
    return values[0] if len(set(values)) == 1 else values
