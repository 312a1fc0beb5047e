"""Which experts stay, from the scores of all.

Letters: E experts of a pool.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Place = tuple[int, str]
"""Number of the block, and "attn" or "ffn"."""
Scope = Literal["layer", "global"]


def plan_pruning(
    scores: Mapping[Place, Tensor],
    *,
    keep: float | None = None,
    keep_experts: int | None = None,
    threshold: float | None = None,
    scope: Scope = "layer",
) -> dict[Place, list[int]]:
    """
    Choose the experts that stay. Exactly one of `keep`, `keep_experts` and `threshold` says how many.

    Args:
        scores: (E,) per pool, at least 0, the higher the more worth keeping. Of equal experts the lower number stays.
        keep: fraction of the experts, rounded up.
        keep_experts: number of experts of each pool; a pool that has no more keeps all.
        threshold: experts with at least this score.
        scope: "layer" looks at each pool by itself, so that equal pools stay equal with `keep` and `keep_experts`.
            "global" divides scores by their mean over the pool, which makes layers comparable, and ranks all experts
            of a side together: `keep` and `keep_experts` then hold on average over layers, `threshold` is a multiple
            of the mean, and each pool keeps at least its best expert.

    Returns:
        per pool the numbers of the experts that stay, ascending; at least one.

    Raises:
        ValueError: contradictory or impossible wishes; names the value.
    """
    if sum(wish is not None for wish in (keep, keep_experts, threshold)) != 1:
        raise ValueError(
            f"give exactly one of keep={keep}, keep_experts={keep_experts} and threshold={threshold}: it says how "
            "many experts stay"
        )
    if scope not in get_args(Scope):
        raise ValueError(f"scope {scope!r} is not one of {', '.join(get_args(Scope))}")
    if scope == "global":
        scores = {place: s / s.mean().clamp_min(torch.finfo(s.dtype).tiny) for place, s in scores.items()}
    if threshold is not None:
        return _above(scores, threshold, scope)
    counts = {place: _count(len(s), keep, keep_experts) for place, s in scores.items()}
    if keep_experts is not None and scores and all(keep_experts > len(s) for s in scores.values()):
        most = max(len(s) for s in scores.values())
        raise ValueError(f"keep_experts={keep_experts} is more than any pool has: give 1 to {most}")
    if scope == "layer":
        return {place: _best(s, counts[place]) for place, s in scores.items()}
    plan: dict[Place, list[int]] = {}
    for side in {side for _, side in scores}:
        pools = {place: s for place, s in scores.items() if place[1] == side}
        total = sum(counts[place] for place in pools)
        if keep is not None:  # rounded once
            total = _count(sum(map(len, pools.values())), keep, None)
        plan |= _best_of_all(pools, total)
    return {place: plan[place] for place in scores}


def _count(num_experts: int, keep: float | None, keep_experts: int | None) -> int:
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} is not a fraction of the experts: give more than 0 and at most 1")
        # 0.07 * 100 is a little more than 7.
        return max(1, math.ceil(keep * num_experts - 1e-9))
    assert keep_experts is not None
    if keep_experts < 1:
        raise ValueError(f"keep_experts={keep_experts} would remove everything: give at least 1")
    return min(keep_experts, num_experts)


def _best(scores: Tensor, count: int) -> list[int]:
    order = scores.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def _best_of_all(pools: Mapping[Place, Tensor], count: int) -> dict[Place, list[int]]:
    plan = {place: _best(s, 1) for place, s in pools.items()}
    others = [
        (-score, place, expert)
        for place, s in pools.items()
        for expert, score in enumerate(s.tolist())
        if expert not in plan[place]
    ]
    for _, place, expert in sorted(others)[: max(0, count - len(plan))]:
        plan[place].append(expert)
    return {place: sorted(experts) for place, experts in plan.items()}


def _above(scores: Mapping[Place, Tensor], threshold: float, scope: Scope) -> dict[Place, list[int]]:
    plan = {place: (s >= threshold).nonzero().flatten().tolist() for place, s in scores.items()}
    empty = [place for place, experts in plan.items() if not experts]
    if empty:
        layer, side = min(empty, key=lambda place: scores[place].max().item())
        best = scores[layer, side].max().item()
        unit = " times the mean" if scope == "global" else ""
        raise ValueError(
            f"threshold={threshold:g} would remove every {side} expert of layer {layer}, whose best scores "
            f"{best:.4g}{unit}: give at most that"
        )
    return plan
