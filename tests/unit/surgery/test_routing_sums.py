"""The sums of a router against a loop over tokens, and the figures against what is known in closed form."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe.surgery.routing_sums import RoutingSums

N, E, K = 23, 5, 3


def sample(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits, chosen experts, gates, norms."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, E, generator=generator)
    gates, index = logits.softmax(-1).topk(K)
    return logits, index, gates, 3 * torch.rand(N, K, generator=generator)


def mask() -> torch.Tensor:
    return torch.arange(N) % 4 != 0


def brute_force(logits, index, gates, norms, real) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros(E, dtype=torch.float64) for name in ("gate", "probability", "output_norm", "saliency")}
    together, entropy, tokens = torch.zeros(E, E, dtype=torch.int64), 0.0, 0
    for token in range(N):
        if not real[token]:
            continue
        tokens += 1
        scores = [math.exp(x) for x in logits[token].tolist()]
        for expert, score in enumerate(scores):
            g = score / sum(scores)
            sums["probability"][expert] += g
            entropy -= g * math.log(g)
        for slot, expert in enumerate(index[token].tolist()):
            gate, norm = float(gates[token, slot]), float(norms[token, slot])
            sums["gate"][expert] += gate
            sums["output_norm"][expert] += norm
            sums["saliency"][expert] += gate * norm
            for other in index[token].tolist():
                together[expert, other] += 1
    return {
        **sums,
        "chosen_together": together,
        "entropy": torch.tensor(entropy, dtype=torch.float64),
        "tokens": torch.tensor(tokens),
    }


@pytest.mark.parametrize("real", [torch.ones(N, dtype=torch.bool), mask()], ids=["all", "masked"])
def test_sums_equal_a_loop_over_tokens(real):
    inputs = sample()
    found = RoutingSums.of(*inputs, real).tensors()
    expected = brute_force(*inputs, real)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_a_masked_token_may_have_any_choice():
    logits, index, gates, norms = sample()
    index_of_none = index.masked_fill(~mask()[:, None], E)
    for a, b in zip(
        RoutingSums.of(logits, index_of_none, gates, norms, mask()).tensors().values(),
        RoutingSums.of(logits, index, gates, norms, mask()).tensors().values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_sums_of_parts_add_up():
    inputs = sample()
    parts = [RoutingSums.of(*(t[part] for t in inputs)) for part in (slice(0, 7), slice(7, 8), slice(8, N))]
    whole = RoutingSums.of(*inputs)
    for name, value in (parts[0] + parts[1] + parts[2]).tensors().items():
        assert_close(value, whole.tensors()[name], rtol=1e-13, atol=1e-13)
        assert value.dtype == whole.tensors()[name].dtype


def test_low_precision_inputs_are_summed_in_double():
    inputs = [t.bfloat16() if t.is_floating_point() else t for t in sample()]
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    assert_close(RoutingSums.of(*inputs).reap, RoutingSums.of(*wide).reap, rtol=0, atol=0)


def test_no_tokens_give_zeros_and_not_nan():
    sums = RoutingSums.of(*sample(), torch.zeros(N, dtype=torch.bool))
    for figure in (sums.load, sums.mean_gate, sums.mean_gate_if_chosen, sums.reap, sums.mean_probability):
        assert torch.equal(figure, torch.zeros(E, dtype=torch.float64))
    assert sums.mutual_information == 0


def test_experts_of_probability_zero_have_no_entropy():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    sums = RoutingSums.of(logits, torch.tensor([[0]]), torch.ones(1, 1), torch.ones(1, 1))
    assert sums.token_entropy == pytest.approx(math.log(2))


def test_json_keeps_every_bit():
    sums = RoutingSums.of(*sample(), mask())
    again = RoutingSums.from_json(sums.to_json())
    for name, value in sums.tensors().items():
        assert torch.equal(again.tensors()[name], value)
        assert again.tensors()[name].dtype == value.dtype


def choose(experts: list[list[int]], num_experts: int, gate: float = 1.0) -> RoutingSums:
    index = torch.tensor(experts)
    logits = torch.full((len(experts), num_experts), -40.0, dtype=torch.float64).scatter(1, index, 0.0)
    gates = torch.full(index.shape, gate)
    return RoutingSums.of(logits, index, gates, torch.full(index.shape, 2.0))


def test_a_router_that_is_sure_and_even_has_all_the_information():
    sums = choose([[0], [1], [2], [3]], 4)
    assert sums.mutual_information == pytest.approx(math.log(4))
    assert sums.token_entropy == pytest.approx(0, abs=1e-12)
    assert sums.max_violation == pytest.approx(0)


def test_a_router_that_does_not_look_at_the_token_has_no_information():
    sums = choose([[1]] * 6, 4)
    assert sums.mutual_information == pytest.approx(0, abs=1e-12)
    assert sums.max_violation == pytest.approx(3)
    assert sums.dead(0.01).tolist() == [True, False, True, True]


def test_mean_gates_over_all_tokens_and_over_those_that_chose():
    sums = choose([[0], [0], [0], [1]], 2, gate=0.5)
    assert sums.mean_gate.tolist() == [0.375, 0.125]
    assert sums.mean_gate_if_chosen.tolist() == [0.5, 0.5]
    assert sums.reap.tolist() == [1.0, 1.0]
    assert sums.mean_output_norm.tolist() == [2.0, 2.0]


def test_dead_is_relative_to_an_even_load():
    sums = choose([[0]] * 97 + [[1]] * 3, 2)  # loads 0.97 and 0.03, even is 0.5
    assert sums.dead(0.05).tolist() == [False, False]
    assert sums.dead(0.07).tolist() == [False, True]


def test_co_activation_is_one_where_pairs_are_as_frequent_as_loads_allow():
    every_pair = [[a, b] for a in range(4) for b in range(a + 1, 4)]
    ratios = choose(every_pair * 5, 4).co_activation
    assert ratios.diagonal().isnan().all()
    assert_close(ratios.fill_diagonal_(1.0), torch.ones(4, 4, dtype=torch.float64))


def test_co_activation_of_couples_that_stay_together():
    sums = choose([[0, 1], [2, 3]] * 5, 4)
    assert sums.co_activation[0, 1] == pytest.approx(3)  # all of a third of the possible pairs
    assert sums.co_activation[0, 2] == 0
    assert sums.expected_together.sum() == sums.chosen_together.sum() - sums.assignments.sum()


def test_one_expert_per_token_has_no_co_activation():
    assert choose([[0], [1]], 2).co_activation.isnan().all()
