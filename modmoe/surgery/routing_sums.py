"""What one router did to a set of tokens, as sums: everything the usage report says follows from them.

Letters: N tokens, E experts, K experts per token. g(m|x) is the softmax of the router's logits over all E experts.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoutingSums:
    """
    Sums over the routed tokens of one router. Those of two token sets add up to those of their union, whether they
    come from two batches, two domains or two processes. Counts are int64 and exact, the rest is float64.
    """

    tokens: Tensor
    """() int64: routed tokens."""
    chosen_together: Tensor
    """(E, E) int64: tokens that chose both experts; the diagonal says how many chose each."""
    gate: Tensor
    """(E,): gates, over the tokens that chose the expert."""
    probability: Tensor
    """(E,): g(m|x), over all tokens."""
    entropy: Tensor
    """(): -sum_m g log g in nats, over all tokens."""
    output_norm: Tensor
    """(E,): norm of the expert's output before the gate, over the tokens that chose it."""
    saliency: Tensor
    """(E,): gate * norm of the output, over the tokens that chose it (REAP, arXiv:2510.13999)."""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        logits: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        output_norms: Tensor,
        token_mask: Tensor | None = None,
    ) -> Self:
        """
        Args:
            logits: (N, E), of the router before its softmax.
            top_k_index: (N, K) int64, the chosen experts, all different, E for none; of a masked token anything.
            top_k_weights: (N, K), the gates that the model used.
            output_norms: (N, K), norm of each chosen expert's output.
            token_mask: (N,) bool, the routed tokens; None is all.
        """
        num_tokens, num_experts = logits.shape
        real = torch.ones(num_tokens, dtype=torch.bool, device=logits.device) if token_mask is None else token_mask
        weights, norms = top_k_weights.double(), output_norms.double()
        # Masked tokens and slots without an expert write to a column of their own, which is cut off. In the others no
        # two slots of a token meet, so nothing is added up here, and no result depends on an order of additions.
        index = top_k_index.masked_fill(~real[:, None], num_experts)

        def by_expert(values: Tensor) -> Tensor:
            """(N, K) -> (N, E), 0 where the expert was not chosen."""
            return logits.new_zeros(num_tokens, num_experts + 1, dtype=torch.float64).scatter(1, index, values)[:, :-1]

        chosen = by_expert(torch.ones_like(weights))
        probability = logits[real].double().softmax(-1)
        return cls(
            tokens=real.sum(),
            chosen_together=(chosen.T @ chosen).round().long(),
            gate=by_expert(weights).sum(0),
            probability=probability.sum(0),
            entropy=torch.special.entr(probability).sum(),
            output_norm=by_expert(norms).sum(0),
            saliency=by_expert(weights * norms).sum(0),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: value + getattr(other, name) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def cpu(self) -> Self:
        """The same sums in host memory."""
        return type(self)(**{name: value.cpu() for name, value in self.tensors().items()})

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists of numbers, which `from_json` reads back bit for bit."""
        return {name: value.tolist() for name, value in self.tensors().items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        integers = {"tokens", "chosen_together"}
        return cls(
            **{
                field.name: torch.tensor(
                    content[field.name], dtype=torch.int64 if field.name in integers else torch.float64
                )
                for field in dataclasses.fields(cls)
            }
        )

    @property
    def num_experts(self) -> int:
        return len(self.gate)

    @property
    def assignments(self) -> Tensor:
        """(E,) int64: tokens that chose each expert."""
        return self.chosen_together.diagonal()

    @property
    def load(self) -> Tensor:
        """(E,): share of the (token, expert) pairs; sums to one, all 0 without tokens."""
        return self.assignments.double() / self.assignments.sum().clamp_min(1)

    @property
    def max_violation(self) -> float:
        """Largest load over the mean load, minus one: 0 is even, E - 1 is one expert for all."""
        return float(self.load.max() * self.num_experts - 1)

    @property
    def mean_gate(self) -> Tensor:
        """(E,): mean over all tokens, 0 where the expert was not chosen."""
        return self.gate / self.tokens.clamp_min(1)

    @property
    def mean_gate_if_chosen(self) -> Tensor:
        """(E,): mean over the tokens that chose the expert; 0 if there are none."""
        return self._per_assignment(self.gate)

    @property
    def mean_output_norm(self) -> Tensor:
        """(E,): mean over the tokens that chose the expert; 0 if there are none."""
        return self._per_assignment(self.output_norm)

    @property
    def reap(self) -> Tensor:
        """(E,): mean of gate * norm of output over the tokens that chose the expert; 0 if there are none."""
        return self._per_assignment(self.saliency)

    @property
    def mean_probability(self) -> Tensor:
        """(E,): p(m), the mean of g(m|x) over all tokens."""
        return self.probability / self.tokens.clamp_min(1)

    @property
    def token_entropy(self) -> float:
        """H(m|x) in nats, the mean over tokens: 0 is a router that is always sure."""
        return float(self.entropy / self.tokens.clamp_min(1))

    @property
    def mean_entropy(self) -> float:
        """H(m) in nats, the entropy of p(m): log E is even."""
        return float(torch.special.entr(self.mean_probability).sum())

    @property
    def mutual_information(self) -> float:
        """I(m; x) = H(m) - H(m|x) in nats; minus the loss that ModuleFormer trains with (arXiv:2306.04640)."""
        return self.mean_entropy - self.token_entropy

    @property
    def expected_together(self) -> Tensor:
        """
        (E, E): how many tokens would choose both experts if each pair were as frequent as the loads of the two allow,
        n_i n_j times what makes the sum over all pairs right; 0 on the diagonal and with one expert per token.
        """
        counts = self.assignments.double()
        pairs = torch.outer(counts, counts).fill_diagonal_(0)
        together = self.chosen_together.sum() - counts.sum()
        return pairs * together / pairs.sum().clamp_min(1)

    @property
    def co_activation(self) -> Tensor:
        """
        (E, E), symmetric: tokens that chose both experts over `expected_together`: 1 is chance, more is attraction.
        NaN where nothing is expected, the diagonal included.
        """
        expected = self.expected_together
        return self.chosen_together.double() / expected.where(expected > 0, torch.nan)

    def dead(self, below: float) -> Tensor:
        """(E,) bool: load under `below` times the even load 1 / E."""
        return self.load * self.num_experts < below

    def _per_assignment(self, total: Tensor) -> Tensor:
        return total / self.assignments.clamp_min(1)
