"""Optional implementations behind transformers' interfaces, on a device: flash attention and megablocks."""

import pytest
import torch
from torch.testing import assert_close
from transformers.utils import is_flash_attn_2_available

from tests.unit.layers.test_grouped_experts import experts_of
from tests.unit.models.conftest import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

POSITIONS = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None].expand(3, -1)
PADDED = torch.ones(3, 20, dtype=torch.int64)
PADDED[0, :6] = 0
CONTEXTS = {"plain": {}, "packed": {"position_ids": POSITIONS}, "left padding": {"attention_mask": PADDED}}


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).float().norm() / expected.float().norm()).item()


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed, see docs/interfaces.md")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_flash_attention_equals_sdpa(context, is_causal):
    # One expert on each side: a router would turn a rounding into another choice.
    changes = {"attention_type": "softmax", "is_causal": is_causal, "num_experts": 1, "num_attn_experts": 1}
    inputs = {name: value.cuda() for name, value in CONTEXTS[context].items()}
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1)).cuda()
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    results = []
    for implementation in ("sdpa", "flash_attention_2"):
        model = build(**changes, attn_implementation=implementation).to("cuda", torch.bfloat16)
        logits = model(ids, **inputs).logits[real]
        logits.float().square().mean().backward()
        results.append((logits, model.model.layers[0].self_attn.k_proj.weight.grad))
    for flash, sdpa in zip(results[1], results[0], strict=True):
        assert relative_error(flash, sdpa) < 0.03


def test_megablocks_equals_ours():
    pytest.importorskip("megablocks.grouped_gemm_util", reason="megablocks is not installed, see docs/interfaces.md")
    experts = experts_of("muse_spark").to("cuda", torch.bfloat16)
    index = torch.tensor([[0, 2], [5, 5], [4, 0], [2, 5], [0, 4]], device="cuda")  # experts 1 and 3 are idle
    gates = torch.rand(5, 2, device="cuda").masked_fill(index == 5, 0).requires_grad_()
    x = torch.randn(5, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for implementation in ("modmoe", "megablocks"):
        experts.config._experts_implementation = implementation
        out = experts(x, index, gates)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, gates, *experts.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(theirs, ours) < 0.03
    idle = results[1][3][[1, 3]]
    assert_close(idle, torch.zeros_like(idle))
