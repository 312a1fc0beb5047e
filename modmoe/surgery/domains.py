"""Which experts belong to which domain: mutual information between the domain of a token and the expert it chose.

Domains count equally, however many tokens of each were measured: with p(m|d) the load of expert m on domain d, E
experts and D domains,

    p(m) = mean_d p(m|d),   MI = mean_d sum_m p(m|d) log(p(m|d) / p(m)),   0 <= MI <= log min(D, E)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Specialisation:
    """How the experts of one router are distributed among domains; float64."""

    domain_shares: Tensor
    """(D, E): p(d|m), of an expert's tokens the share from each domain; 0 for an expert without tokens."""
    contributions: Tensor
    """(E,): what each expert adds to the mutual information, nats; never negative."""
    strengths: Tensor
    """(E,): KL(p(d|m) || uniform) / log D: 0 serves all domains alike, 1 a single one; 0 with one domain."""

    @property
    def mutual_information(self) -> float:
        """Nats."""
        return float(self.contributions.sum())

    @property
    def homes(self) -> Tensor:
        """(E,) int64: the domain that an expert serves most."""
        return self.domain_shares.argmax(0)


def specialisation(loads: Sequence[Tensor]) -> Specialisation:
    """
    Args:
        loads: per domain (E,), each expert's share of the assignments.
    """
    by_domain = torch.stack(list(loads)).double()
    num_domains = len(by_domain)
    total = by_domain.sum(0)
    shares = by_domain / total.where(total > 0, 1.0)
    divergence = torch.xlogy(shares, shares * num_domains).sum(0).clamp_min(0)
    return Specialisation(
        domain_shares=shares,
        contributions=divergence * total / num_domains,
        strengths=divergence / math.log(max(num_domains, 2)),
    )
