"""How evenly routers spread tokens over experts: sums kept on the device and a few bounded figures per router."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from modmoe.models import ModMoEConfig

SIDES = {"attn": "attn_tokens_per_expert", "ffn": "tokens_per_expert"}
"""Router side -> field of the model's output."""

Sums = dict[str, list[torch.Tensor]]


def routed_layers(config: PreTrainedConfig) -> dict[str, list[int]]:
    """
    Side -> layers that have a router there, in the order of the model's outputs; empty for models
    other than ModMoE's.

    An extension with routers of its own adds the sides NAME/ffn and NAME/attn; experts of a "common" one are the last
    of the model's own routers.
    """
    if not isinstance(config, ModMoEConfig):
        return {side: [] for side in SIDES}
    layers = range(config.num_hidden_layers)
    sides = {
        "attn": [layer for layer in layers if config.attn_router_rows_at(layer)],
        "ffn": [layer for layer in layers if config.router_rows_at(layer)],
    }
    for extension in config.extension_list():
        if extension.mode == "group":
            sides |= {f"{extension.name}/ffn": list(layers)} if extension.num_experts else {}
            sides |= {f"{extension.name}/attn": list(layers)} if extension.num_attn_experts else {}
    return sides


def common_experts(config: PreTrainedConfig) -> dict[str, int]:
    """Side -> how many experts of "common" extensions come after the model's own in each of its routers."""
    if not isinstance(config, ModMoEConfig):
        return {side: 0 for side in SIDES}
    common = [extension for extension in config.extension_list() if extension.mode == "common"]
    return {"attn": sum(e.num_attn_experts for e in common), "ffn": sum(e.num_experts for e in common)}


class RouterLoads:
    """
    Tokens per expert of every router, summed over forward passes without waiting for the device.

    Attributes:
        sums: "attn", "ffn", and for each extension "NAME/" -> tokens per expert, (E,) of each router in the order of
            the model's outputs.
        users: for each extension "NAME/" -> (2,) of each router: tokens that use one of its experts, and all.
    """

    def __init__(self, sums: Sums | None = None, users: Sums | None = None) -> None:
        self.sums: Sums = sums or {}
        self.users: Sums = users or {}

    def _tables(self) -> tuple[Sums, Sums]:
        return self.sums, self.users

    def clear(self) -> None:
        """Forget all."""
        for table in self._tables():
            table.clear()

    def add(self, outputs: Any) -> None:
        """Count one forward pass of a causal LM; models without routers count nothing."""
        found = {side: getattr(outputs, field, None) for side, field in SIDES.items()}
        found |= _by_prefix(outputs, "extension_tokens_per_expert")
        self.merge(RouterLoads(_exact(found), _exact(_by_prefix(outputs, "extension_users"))))

    def merge(self, other: "RouterLoads") -> None:
        """Add the sums of other forward passes."""
        for mine, theirs in zip(self._tables(), other._tables(), strict=True):
            for key, sums in theirs.items():
                before = mine.get(key, [torch.zeros_like(values) for values in sums])
                mine[key] = [total + values for total, values in zip(before, sums, strict=True)]

    def scale(self, factor: torch.Tensor | float) -> None:
        """Multiply all sums by a number, or a scalar on their device."""
        for table in self._tables():
            table.update({key: [values * factor for values in sums] for key, sums in table.items()})

    def all_reduce(self) -> None:
        """Sum over all ranks, in one collective."""
        flat = [values for table in self._tables() for sums in table.values() for values in sums]
        if not flat or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        joined = torch.cat(flat)
        dist.all_reduce(joined)
        parts = iter(joined.split([len(values) for values in flat]))
        for table in self._tables():
            table.update({key: [next(parts) for _ in sums] for key, sums in table.items()})

    def shares(self, layers: dict[str, list[int]]) -> dict[str, list[list[float]]]:
        """Side -> per router each expert's share of the assignments; `layers` as for `metrics`."""
        return {side: [_share(load).tolist() for load in loads] for side, loads in _by_side(self.sums, layers).items()}

    def used(self, layers: dict[str, list[int]]) -> dict[str, list[float]]:
        """Side of an extension -> per router the share of the tokens that use it at all; `layers` as for `metrics`."""
        return {
            side: [float(users / tokens.clamp_min(1)) for users, tokens in counts]
            for side, counts in _by_side(self.users, layers).items()
        }

    def metrics(
        self, layers: dict[str, list[int]], expert_parallel_size: int = 1, common: dict[str, int] | None = None
    ) -> dict[str, float]:
        """
        Three figures per router, and per side the worst violation, the mean entropy and all dead experts.

        For the routers of extensions also the share of the tokens that use them. With expert parallelism also the
        worst load of a rank on each side, whose experts the others wait for; extensions stay whole on every rank.

        Args:
            layers: of `routed_layers`.
            expert_parallel_size: ranks over which the experts of each layer are distributed.
            common: of `common_experts`.
        """
        metrics: dict[str, float] = {}
        used = self.used(layers)
        for side, loads in _by_side(self.sums, layers).items():
            figures = [balance(load) for load in loads]
            metrics[f"router/{side}/max_violation"] = max(f["max_violation"] for f in figures)
            metrics[f"router/{side}/entropy"] = sum(f["entropy"] for f in figures) / len(figures)
            metrics[f"router/{side}/dead_experts"] = sum(f["dead_experts"] for f in figures)
            if side in used:
                metrics[f"router/{side}/used"] = round(sum(used[side]) / len(used[side]), 4)
                figures = [f | {"used": round(share, 4)} for f, share in zip(figures, used[side], strict=True)]
            elif expert_parallel_size > 1:
                shared = [load[: len(load) - (common or {}).get(side, 0)] for load in loads]
                metrics[f"router/{side}/rank_load"] = max(rank_load(load, expert_parallel_size) for load in shared)
            for layer, router in zip(layers[side], figures, strict=True):
                metrics |= {f"router/{side}/layer_{layer:02d}/{name}": value for name, value in router.items()}
        return metrics


def _by_prefix(outputs: Any, field: str) -> dict[str, Iterable[torch.Tensor]]:
    """What an output holds by name of extension, under the beginnings of their sides."""
    return {f"{name}/": tensors for name, tensors in (getattr(outputs, field, None) or {}).items()}


def _exact(found: Mapping[str, Iterable[torch.Tensor] | None]) -> Sums:
    """In float64, which holds every count that occurs exactly; without those who have no router."""
    return {key: [values.detach().to(torch.float64) for values in sums] for key, sums in found.items() if sums}


def _by_side(sums: Sums, layers: dict[str, list[int]]) -> Sums:
    """Of each side of `layers` that has been counted; the routers of an extension's sides follow each other."""
    rest = {key: iter(values) for key, values in sums.items()}
    own = {side: side if side in SIDES else side[: side.index("/") + 1] for side in layers}
    return {side: [next(rest[key]) for _ in layers[side]] for side, key in own.items() if layers[side] and key in rest}


def balance(load: torch.Tensor) -> dict[str, float]:
    """
    Figures of one router from its load (E,).

    Returns:
        max_violation: largest load over the mean load, minus one: 0 is even, E - 1 is one expert for all;
        entropy: of the load, relative to the largest possible: 1 is even, as a single expert always is, 0 is one
            expert for all;
        dead_experts: how many got no token.
    """
    share = _share(load)
    entropy = torch.special.entr(share).sum() / torch.log(load.new_tensor(float(len(load)))) if len(load) > 1 else 1.0
    # Without any token there is no share above the mean.
    max_violation = (share.max() * len(load) - 1).clamp_min(0)
    return {
        "max_violation": round(float(max_violation), 4),
        "entropy": round(float(entropy), 4),
        "dead_experts": float((load == 0).sum()),
    }


def rank_load(load: torch.Tensor, ranks: int) -> float:
    """
    Largest load of an expert-parallel rank over the mean: 1 is even, `ranks` is one rank doing all.

    Args:
        load: (E,) tokens per expert.
        ranks: each of which holds E / ranks experts that follow each other.
    """
    per_rank = load.view(ranks, -1).sum(1)
    return round(float(per_rank.max() / per_rank.mean().clamp_min(1)), 4)


def _share(load: torch.Tensor) -> torch.Tensor:
    return load / load.sum().clamp_min(1)
