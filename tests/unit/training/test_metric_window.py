"""Means over steps, and what skipped ones leave in them: nothing."""

import math
from types import SimpleNamespace

import pytest
import torch

from modmoe.training.monitoring.metric_window import MetricWindow


def outputs(loss, load):
    return SimpleNamespace(
        loss=torch.tensor(loss),
        cross_entropy=torch.tensor(loss - 1),
        aux_losses={"mi": torch.tensor(10 * loss)},
        tokens_per_expert=(torch.tensor(load),),
        attn_tokens_per_expert=None,
    )


def step(window, losses, applied=True, load=(1, 3)):
    window.begin_step()
    for loss in losses:
        window.add(outputs(loss, load), torch.tensor(1 / len(losses)))
    window.end_step(torch.tensor(applied))


def test_micro_steps_add_up_and_steps_are_averaged():
    window = MetricWindow()
    step(window, [1.0, 2.0])
    step(window, [3.0, 4.0])
    assert float(window.step_loss) == 7.0
    metrics, loads = window.means()
    assert metrics == pytest.approx({"loss": 5.0, "cross_entropy": 3.0, "aux/mi": 25.0, "skipped_steps": 0})
    assert loads.sums["ffn"][0].tolist() == [4.0, 12.0]


def test_a_skipped_step_leaves_no_trace_but_its_count():
    window = MetricWindow()
    step(window, [2.0])
    step(window, [math.nan], applied=False, load=(100, 0))
    assert window.step_loads.sums["ffn"][0].tolist() == [0.0, 0.0]  # so that the selection bias stays too
    step(window, [4.0])
    metrics, loads = window.means()
    assert (metrics["loss"], metrics["skipped_steps"]) == (3.0, 1)
    assert loads.sums["ffn"][0].tolist() == [2.0, 6.0]


def test_a_window_of_skipped_steps_has_no_means_and_the_next_one_begins_anew():
    window = MetricWindow()
    step(window, [math.nan], applied=False)
    metrics, loads = window.means()
    assert metrics == {"skipped_steps": 1}
    assert not loads.sums
    step(window, [2.0])
    assert window.means()[0]["loss"] == 2.0
