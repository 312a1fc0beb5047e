"""Whole models on a device: the numbers of the CPU, a cache, one graph, and a training step that nobody waits for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.models.conftest import VARIANTS, build
from tests.unit.models.test_compile import EXTENDED

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.cpu() - expected.cpu()).norm() / expected.norm().clamp_min(1e-30)).item()


def batch(device: str) -> dict[str, Tensor]:
    """Packed documents, with labels."""
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in (17, 1, 22)]).expand(3, -1)
    return {"input_ids": ids.to(device), "labels": ids.to(device), "position_ids": positions.to(device)}


@pytest.mark.parametrize("changes", [*VARIANTS.values(), EXTENDED], ids=[*VARIANTS, "extended"])
def test_the_same_as_on_the_cpu(changes: dict[str, Any]) -> None:
    results = []
    for device in ("cpu", DEVICE):
        model = build(**changes).to(device).train()
        out = model(**batch(device), use_cache=False)
        out.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert relative_error(results[1][name], expected) < 1e-3, name


@pytest.mark.parametrize("attention_type", ["stickbreaking", "softmax"])
def test_a_cache_changes_nothing(attention_type: str) -> None:
    model = build(attention_type=attention_type).to(DEVICE).eval()
    ids = batch(DEVICE)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :30], use_cache=True)
        steps = [out.logits]
        for t in range(30, 40):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), whole) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attention_type", ["stickbreaking", "softmax"])
def test_a_static_cache_changes_nothing(attention_type: str) -> None:
    """`generate` compiles its steps by itself on a GPU."""
    model = build(attention_type=attention_type).to(DEVICE).eval()
    ids = batch(DEVICE)["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)
    assert model.generate(ids, **options, cache_implementation="static").equal(expected)


def test_one_graph() -> None:
    model = build().to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    ours, theirs = (run(**batch(DEVICE), use_cache=False).loss for run in (compiled, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_training_step_waits_for_nothing() -> None:
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
        pytest.skip("grouped_mm reads its offsets on the host of such a device")
    model = build(sample_topk=1, use_selection_bias=True, router_z_loss_weight=0.1).to(DEVICE).train()
    inputs = batch(DEVICE)
    counts = {name: torch.full((), 120, device=DEVICE) for name in ("num_items_in_batch", "num_tokens_in_batch")}

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**inputs, **counts, use_cache=False).loss
        loss.backward()

    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
