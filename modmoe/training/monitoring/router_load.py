"""How evenly routers spread tokens over experts: sums kept on the device and a few bounded figures per router."""

from typing import Any

import torch
import torch.distributed as dist

from modmoe.models import ModMoEConfig

SIDES = {"attn": "attn_tokens_per_expert", "ffn": "tokens_per_expert"}
"""Router side -> field of the model's output."""


def routed_layers(config: ModMoEConfig) -> dict[str, list[int]]:
    """Side -> layers that have a router there, in the order of the model's outputs."""
    layers = range(config.num_hidden_layers)
    return {
        "attn": [layer for layer in layers if config.attn_router_rows_at(layer)],
        "ffn": [layer for layer in layers if config.router_rows_at(layer)],
    }


class RouterLoads:
    """Tokens per expert of every router, summed over forward passes without waiting for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, list[torch.Tensor]] = {}

    def add(self, outputs: Any) -> None:
        """Count one forward pass of a causal LM; models without routers count nothing."""
        for side, field in SIDES.items():
            # float64 holds every count that occurs exactly.
            loads = [load.detach().to(torch.float64) for load in getattr(outputs, field, None) or ()]
            if side in self.sums:
                loads = [total + load for total, load in zip(self.sums[side], loads, strict=True)]
            if loads:
                self.sums[side] = loads

    def merge(self, other: "RouterLoads") -> None:
        """Add the sums of other forward passes."""
        for side, loads in other.sums.items():
            mine = self.sums.get(side, [torch.zeros_like(load) for load in loads])
            self.sums[side] = [total + load for total, load in zip(mine, loads, strict=True)]

    def scale(self, factor: torch.Tensor | float) -> None:
        """Multiply all sums by a number, or a scalar on their device."""
        self.sums = {side: [load * factor for load in loads] for side, loads in self.sums.items()}

    def all_reduce(self) -> None:
        """Sum over all ranks, in one collective."""
        flat = [load for loads in self.sums.values() for load in loads]
        if not flat or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        joined = torch.cat(flat)
        dist.all_reduce(joined)
        parts = iter(joined.split([len(load) for load in flat]))
        self.sums = {side: [next(parts) for _ in loads] for side, loads in self.sums.items()}

    def shares(self) -> dict[str, list[list[float]]]:
        """Side -> per router each expert's share of the assignments."""
        return {side: [_share(load).tolist() for load in loads] for side, loads in self.sums.items()}

    def metrics(self, layers: dict[str, list[int]], expert_parallel_size: int = 1) -> dict[str, float]:
        """
        Three figures per router, and per side the worst violation, the mean entropy and all dead experts.

        With expert parallelism also the worst load of a rank on each side, whose experts the others wait for.

        Args:
            layers: of `routed_layers`.
            expert_parallel_size: ranks that share out the experts of each layer.
        """
        metrics: dict[str, float] = {}
        for side, loads in self.sums.items():
            figures = [balance(load) for load in loads]
            metrics[f"router/{side}/max_violation"] = max(f["max_violation"] for f in figures)
            metrics[f"router/{side}/entropy"] = sum(f["entropy"] for f in figures) / len(figures)
            metrics[f"router/{side}/dead_experts"] = sum(f["dead_experts"] for f in figures)
            if expert_parallel_size > 1:
                metrics[f"router/{side}/rank_load"] = max(rank_load(load, expert_parallel_size) for load in loads)
            for layer, router in zip(layers[side], figures, strict=True):
                metrics |= {f"router/{side}/layer_{layer:02d}/{name}": value for name, value in router.items()}
        return metrics


def balance(load: torch.Tensor) -> dict[str, float]:
    """
    Figures of one router from its load (E,), E > 1.

    Returns:
        max_violation: largest load over the mean load, minus one: 0 is even, E - 1 is one expert for all;
        entropy: of the load, relative to the largest possible: 1 is even, 0 is one expert for all;
        dead_experts: how many got no token.
    """
    share = _share(load)
    entropy = torch.special.entr(share).sum() / torch.log(load.new_tensor(float(len(load))))
    max_violation = share.max() * len(load) - 1
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
