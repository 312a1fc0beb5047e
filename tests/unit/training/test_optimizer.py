"""Parameter groups and learning-rate schedules."""

import itertools

import pytest
import torch
from torch import nn

from modmoe.training.clock import Clock
from modmoe.training.optimizer import build_optimizer, build_scheduler, lr_ratio, parameter_groups
from modmoe.training.run_config import OptimizationConfig


def settings(**changes):
    return OptimizationConfig(**{"steps": 100, **changes})


def test_only_matrices_decay():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    matrices, vectors = parameter_groups(model, weight_decay=0.3)
    assert matrices["params"] == [model[1].weight]
    assert vectors["params"] == [model[1].bias, model[2].weight, model[2].bias]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


def test_shards_of_zero3_count_by_their_true_shape():
    model = nn.Linear(4, 3)
    model.weight.ds_shape = torch.Size([3, 4])
    flat = nn.Parameter(model.weight.detach().flatten())
    flat.ds_shape = torch.Size([3, 4])
    model.weight = flat
    assert parameter_groups(model, 0.1)[0]["params"] == [flat]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_schedules_warm_up_and_fall_to_the_minimum(schedule):
    config = settings(schedule=schedule, warmup_steps=10, min_lr_ratio=0.1)
    ratios = [lr_ratio(step, 100, config) for step in range(101)]
    assert ratios[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert ratios[10] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(ratios[10:]))
    assert ratios[99] > ratios[100] == pytest.approx(0.1)


def test_wsd_holds_until_its_last_part():
    config = settings(schedule="wsd", decay_fraction=0.25)
    assert lr_ratio(75, 100, config) == 1.0
    assert lr_ratio(80, 100, config) == pytest.approx(0.8)


def test_constant_stays():
    assert lr_ratio(99, 100, settings(schedule="constant")) == 1.0


def test_cosine_is_half_way_in_the_middle():
    assert lr_ratio(50, 100, settings(schedule="cosine")) == pytest.approx(0.5)


def test_the_first_step_uses_the_first_rate():
    model = nn.Linear(2, 2)
    config = settings(learning_rate=0.5, warmup_steps=4)
    optimizer = build_optimizer(model, config)
    build_scheduler(optimizer, config, 100, Clock())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.125)


def test_the_schedule_follows_the_clock_when_that_is_ahead():
    config = OptimizationConfig(steps=100, learning_rate=1.0, schedule="linear", warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    clock = Clock(max_minutes=1.0)
    scheduler = build_scheduler(optimizer, config, 100, clock)
    rates = []
    for elapsed in (0.3, 0.6, 45.0, 60.0):  # seconds of the minute that a run of 100 steps may take
        clock.seconds = elapsed
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([0.99, 0.98, 0.25, 0.0])
