"""Skipped steps, spikes, and where numbers stop being finite, in one process."""

import json
import math

import pytest
import torch

from modmoe.models import ModMoEConfig, ModMoEForCausalLM
from modmoe.training.errors import DivergedError
from modmoe.training.monitoring.events import Events
from modmoe.training.monitoring.late import Late
from modmoe.training.monitoring.loss_spikes import LossSpikes
from modmoe.training.monitoring.nonfinite import find_nonfinite
from modmoe.training.monitoring.step_guard import Outcome, StepGuard, poison, skip_if_not_finite

from .conftest import MODEL


@pytest.fixture
def guard(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    made = StepGuard(
        3,
        6.0,
        Events(tmp_path / "events.jsonl"),
        locate=lambda: "somewhere",
        contents=lambda step: f"block {step}",
        divergence=lambda symptom: f"diverged: {symptom}",
    )
    made.events = lambda: [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    return made


def test_a_row_of_skipped_steps_is_located_once_and_ends_the_run(guard):
    guard.judge(Outcome(1, 2.0, False))
    guard.judge(Outcome(2, math.nan, True))
    guard.judge(Outcome(3, math.nan, True))
    guard.judge(Outcome(4, 1.0, False))  # one good step makes a new row
    guard.judge(Outcome(5, 1.0, True))
    guard.judge(Outcome(6, 1.0, True))
    assert (guard.skipped, guard.loss) == (4, 1.0)
    with pytest.raises(DivergedError, match="diverged: 3 steps in a row had no finite .*: somewhere"):
        guard.judge(Outcome(7, 1.0, True))
    first, second = guard.events()
    assert (first["step"], first["message"]) == (2, "skipped, its loss is not finite: somewhere; block 2")
    assert (second["step"], second["message"]) == (5, "skipped, its gradient is not finite: somewhere; block 5")


def test_a_spike_is_reported_with_what_was_in_it(guard):
    for step in range(40):
        guard.judge(Outcome(step, 2.0 + 0.01 * (step % 5), False))
    guard.judge(Outcome(40, 3.0, False))
    (event,) = guard.events()
    assert (event["event"], event["step"], event["loss"]) == ("loss_spike", 40, 3.0)
    assert event["message"].endswith("; block 40")


def test_spikes_do_not_hide_each_other_and_noise_is_none():
    spikes = LossSpikes(6.0)
    generator = torch.Generator().manual_seed(0)
    noise = (3 + 0.1 * torch.randn(2000, generator=generator)).tolist()
    assert not any(spikes.usual_if_spike(loss) for loss in noise)
    assert all(spikes.usual_if_spike(9.0) for _ in range(10))
    median, deviation = spikes.usual_if_spike(9.0)
    assert median == pytest.approx(3, abs=0.05)
    assert deviation == pytest.approx(0.1, abs=0.03)


def test_falling_and_equal_losses_are_no_spikes():
    falling, equal = LossSpikes(6.0), LossSpikes(6.0)
    assert not any(falling.usual_if_spike(5.0 * 0.97**step) for step in range(200))
    assert not any(equal.usual_if_spike(1.0 + 1e-7 * (step % 2)) for step in range(200))


def test_poison_keeps_finite_losses_and_spoils_the_gradient_of_others():
    weight = torch.tensor(3.0, requires_grad=True)
    poison(2 * weight).backward()
    assert weight.grad == 2.0
    weight.grad = None
    poison(2 * weight + math.inf).backward()  # whose own gradient is finite
    assert weight.grad.isnan()


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_of_the_optimizer_leaves_no_trace(first):
    def step(optimizer, weight, norm):
        weight.grad = torch.ones_like(weight)
        if norm is not None:
            skip_if_not_finite(optimizer, torch.tensor(norm))
        optimizer.step()

    def make():
        weight = torch.nn.Parameter(torch.ones(5))
        return torch.optim.AdamW([weight], lr=0.1, fused=True), weight

    (one, mine), (other, theirs) = make(), make()
    norms = [math.nan, 1.0, 1.0] if first else [1.0, math.inf, 1.0]
    for norm in norms:
        step(one, mine, norm)
    for _ in range(2):
        step(other, theirs, None)
    assert mine.equal(theirs)
    for name, value in other.state[theirs].items():
        assert one.state[mine][name].equal(value), name


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ModMoEForCausalLM(ModMoEConfig(vocab_size=50, sample_topk=1, **MODEL)).train()


@pytest.fixture
def batches():
    ids = torch.randint(50, (2, 8))
    return [{"input_ids": ids, "labels": ids}, {"input_ids": ids.flip(0), "labels": ids.flip(0)}]


CPU = torch.device("cpu")


def test_finite_numbers_are_not_found_and_nothing_changes(model, batches):
    before = torch.get_rng_state()
    assert find_nonfinite(model, batches, CPU, backward=True) is None
    assert model.training
    assert torch.get_rng_state().equal(before)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("backward", [True, False])
def test_weights_that_are_not_finite_are_named(model, batches, backward):
    weight = model.model.layers[1].self_attn.k_proj.weight
    kept = weight.detach().clone()
    weight.data[0, 0] = math.inf
    try:
        found = find_nonfinite(model, batches, CPU, backward)
    finally:
        weight.data.copy_(kept)
    assert found.forward
    assert found.sentence.startswith("the output of model.layers.1.self_attn.k_proj is the first that is not finite")
    assert found.sentence.endswith("and its weights are not finite either")


def test_a_gradient_that_is_not_finite_is_found_where_it_begins(model, batches):
    def spoil(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient / 0.0)

    handle = model.model.layers[0].mlp.experts.register_forward_hook(spoil, prepend=True)
    try:
        assert find_nonfinite(model, batches, CPU, backward=False) is None
        found = find_nonfinite(model, batches, CPU, backward=True)
    finally:
        handle.remove()
    assert not found.forward
    assert found.sentence.startswith(
        "the forward pass is finite; going back, the gradient at the output of model.layers.0.mlp"
    )


def test_late_numbers_are_those_of_the_moment():
    tensor = torch.tensor([1.0, 2.0])
    late = Late(tensor)
    tensor.zero_()
    assert late.tolist() == [1.0, 2.0]
