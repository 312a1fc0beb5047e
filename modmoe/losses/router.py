"""Auxiliary losses of the routers.

With g(m|x) the full softmax of a router and p(m) its mean over the routed tokens (E experts, N tokens):

    mutual information   MI  = sum_m p log p - mean_x sum_m g log g = -I(m; x)    <= 0, at best -log E
    load concentration   CON = -sum_m p log p = H(m)                              >= 0, 0: one expert does all
    Switch               E * sum_m f_m p_m           f: share of the assignments, a constant to the gradient
    router z             mean_x logsumexp(l)^2

MI and CON: ModuleFormer, arXiv:2306.04640 section 3; Switch: arXiv:2101.03961 eq. (4) with f summing to one;
z: ST-MoE, arXiv:2202.08906 eq. (5).

Because sum_m dp = 0, the gradient of sum p log p is that of sum g * stopgrad(log p). So each loss is linear in
sums over the local tokens once p and f are known: a plain all-reduce of those sums, taken outside of anything that
is recomputed, makes values and gradients exact over ranks, and a first pass over all micro-batches makes them exact
over an optimizer step.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, get_args

import torch
import torch.distributed as dist

BalanceLoss = Literal["mi", "concentration", "switch", "none"]


class RouterStatistics:
    """
    Sums over tokens from which every loss above follows, one vector per router; add them to merge token sets.

    A vector is [sum of g (E), assignments (E), sum of g log g, sum of logsumexp^2, tokens], fp32 or wider.
    """

    def __init__(self, vectors: Sequence[torch.Tensor]) -> None:
        self.vectors = tuple(vectors)

    @classmethod
    def of(
        cls,
        logits: Sequence[torch.Tensor],
        top_k_index: Sequence[torch.Tensor],
        token_mask: torch.Tensor | None = None,
    ) -> Self:
        """
        Args:
            logits: per router (N, E), on any devices.
            top_k_index: per router (N, K); index E counts for no expert.
            token_mask: (N,) bool, the routed tokens; None is all.
        """
        return cls([_sums(scores, index, token_mask) for scores, index in zip(logits, top_k_index, strict=True)])

    def __add__(self, other: Self) -> Self:
        return type(self)([a + b for a, b in zip(self.vectors, other.vectors, strict=True)])

    def detach(self) -> Self:
        return type(self)([v.detach() for v in self.vectors])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Self:
        """The sums over all ranks of the group, without gradient, in one collective."""
        flat = torch.cat([v.detach() for v in self.vectors])
        dist.all_reduce(flat, group=group)
        return type(self)(flat.split([len(v) for v in self.vectors]))

    def tokens_per_expert(self) -> list[torch.Tensor]:
        """Per router (E,) fp32: how many tokens chose each expert."""
        return [_split(v)[1].detach() for v in self.vectors]

    def tokens_per_router(self) -> list[torch.Tensor]:
        """Per router () fp32: the tokens that count; of an extension's those that use one of its experts."""
        return [v[-1].detach() for v in self.vectors]

    @property
    def num_tokens(self) -> torch.Tensor:
        """() fp32: routed tokens, those that the first router has seen: routers of extensions count fewer."""
        return self.tokens_per_router()[0]


def _sums(logits: torch.Tensor, top_k_index: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    num_experts = logits.shape[-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_norm = logits.logsumexp(-1)
    log_g = logits - log_norm[:, None]
    g = log_g.exp()
    keep = torch.ones_like(log_norm) if token_mask is None else token_mask.to(log_norm)
    # The extra bin takes the sentinel index of tokens that are not routed.
    counts = logits.new_zeros(num_experts + 1)
    counts = counts.scatter_add(0, top_k_index.flatten(), torch.ones_like(top_k_index.flatten(), dtype=counts.dtype))
    scalars = torch.stack(
        [
            ((g * log_g.clamp_min(torch.finfo(g.dtype).min)).sum(-1) * keep).sum(),
            (log_norm.square() * keep).sum(),
            keep.sum(),
        ]
    )
    # A product of elements and a sum, here and below: autocast would make matrix products of bf16.
    return torch.cat([(keep[:, None] * g).sum(0), counts[:-1], scalars])


class _Sums(NamedTuple):
    """The parts of vectors (..., 2E + 3): the first two (..., E), the others (...)."""

    prob: torch.Tensor
    assignments: torch.Tensor
    neg_entropy: torch.Tensor
    z: torch.Tensor
    tokens: torch.Tensor


def _split(vectors: torch.Tensor) -> _Sums:
    num_experts = (vectors.shape[-1] - 3) // 2
    prob, assignments, scalars = vectors.split([num_experts, num_experts, 3], dim=-1)
    return _Sums(prob, assignments, *scalars.unbind(-1))


def _by_size(statistics: RouterStatistics) -> list[torch.Tensor]:
    """The vectors of all routers with the same number of experts as one (R, 2E + 3): few operations for many."""
    sizes = dict.fromkeys(map(len, statistics.vectors))
    return [torch.stack([v for v in statistics.vectors if len(v) == size]) for size in sizes]


def _numerators(local: torch.Tensor, reference: torch.Tensor, kinds: Sequence[str]) -> torch.Tensor:
    """(R, 2E + 3) -> (R, kinds): losses times the tokens they are averaged over; linear in sums of local tokens.

    `reference` has no gradient.
    """
    sums, whole = _split(local), _split(reference)
    p = whole.prob / whole.tokens.clamp_min(1)[:, None]
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    values = []
    for kind in kinds:
        if kind == "mi":
            values.append((sums.prob * log_p).sum(-1) - sums.neg_entropy)
        elif kind == "concentration":
            values.append(-(sums.prob * log_p).sum(-1))
        elif kind == "switch":
            f = whole.assignments / whole.assignments.sum(-1, keepdim=True).clamp_min(1)
            values.append(p.shape[-1] * (sums.prob * f).sum(-1))
        elif kind == "z":
            values.append(sums.z)
        else:
            raise ValueError(f"balance={kind!r} is not one of {get_args(BalanceLoss)}")
    return torch.stack(values, dim=-1)


def _weighted(losses: torch.Tensor, kinds: Sequence[str], z_weight: float) -> torch.Tensor:
    """(): the sum of one loss per kind, without bringing their weights to the device."""
    return torch.stack(
        [loss * z_weight if kind == "z" else loss for loss, kind in zip(losses, kinds, strict=True)]
    ).sum()


class RouterLosses(NamedTuple):
    """The auxiliary loss of one forward pass."""

    aux_loss: torch.Tensor
    """(): unscaled value over the reference tokens; its gradient is that of `contribution` with weight=None."""
    parts: dict[str, torch.Tensor]
    """Detached value of each loss by name, over the reference tokens."""
    contribution: torch.Tensor
    """(): what this forward adds to the training loss before the coefficient; its sum over the micro-steps and
    ranks of an optimizer step is the loss of the step."""


def router_losses(
    local: RouterStatistics,
    reference: RouterStatistics,
    *,
    balance: BalanceLoss = "mi",
    z_weight: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    weight: torch.Tensor | float | None = None,
) -> RouterLosses:
    """
    Balance loss plus `z_weight` times the z-loss, per router, then reduced over routers.

    Args:
        local: sums over this forward's tokens, with gradient.
        reference: sums over the tokens that define p and f: `local` itself, or all ranks, or the whole step.
        balance: which balance loss.
        z_weight: factor on the z-loss; 0 leaves it out.
        reduction: over routers.
        weight: factor on the sums of the local tokens in `contribution`; one over the reference's tokens if None.

    Returns:
        see `RouterLosses`; all in fp32 or wider.
    """
    kinds = ([] if balance == "none" else [balance]) + (["z"] if z_weight else [])
    if not kinds:
        zero = local.vectors[0].new_zeros(())
        return RouterLosses(zero, {}, zero)
    if [*map(len, local.vectors)] != [*map(len, reference.vectors)]:
        raise ValueError("local and reference statistics must be of the same routers, in the same order")
    pairs = list(zip(_by_size(local), _by_size(reference.detach()), strict=True))
    numerators = torch.cat([_numerators(a, b, kinds) for a, b in pairs])
    values = torch.cat([_numerators(b, b, kinds) for _, b in pairs])
    scale = 1.0 / len(local.vectors) if reduction == "mean" else 1.0
    per_token = 1.0 / reference.num_tokens.clamp_min(1)
    totals = (values * per_token).sum(0) * scale
    local_total = _weighted(numerators.sum(0), kinds, z_weight) * scale
    surrogate = local_total * per_token
    value = _weighted(totals, kinds, z_weight)
    return RouterLosses(
        aux_loss=surrogate + (value - surrogate).detach(),
        parts={kind: totals[i] for i, kind in enumerate(kinds)},
        contribution=local_total * (per_token if weight is None else weight),
    )
