"""The causal LM compiles as one graph, forward and backward."""

import pytest
import torch

from .conftest import build

EXTENDED = {
    "num_hidden_layers": 1,
    "extensions": [
        {"name": "group", "num_experts": 3, "num_experts_per_tok": 2, "num_attn_experts": 2},
        {"name": "common", "num_experts": 1, "num_attn_experts": 2, "mode": "common"},
    ],
}


def compare(backend: str, ids: torch.Tensor, **changes) -> None:
    torch._dynamo.reset()
    eager, model = build(**changes).train(), build(**changes).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    batch = {"attention_mask": mask, "labels": ids, "use_cache": False}
    ours, theirs = compiled(ids, **batch), eager(ids, **batch)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_type": "softmax", "num_experts": 1},
        {"gated_ffn": False, "router_type": "gmm"},
        EXTENDED,
        EXTENDED | {"attention_type": "softmax"},
    ],
    ids=["stickbreaking", "softmax", "gmm", "extended", "extended-softmax"],
)
def test_fullgraph(ids, changes):
    compare("aot_eager", ids, **changes)


@pytest.mark.slow
def test_inductor(ids):
    compare("inductor", ids)
