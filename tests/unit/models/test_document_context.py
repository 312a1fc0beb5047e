import pytest
import torch

from modmoe import ModMoEConfig
from modmoe.layers.stickbreaking import StickbreakingMask
from modmoe.models.context import AttentionInputs, attention_inputs
from modmoe.models.document_context import DocumentContext, running_mean

from .conftest import TINY


def slow_mean(values, length, exists, starts):
    out = torch.zeros(values.shape[0], length, values.shape[1], values.shape[3], dtype=torch.float64)
    for b in range(values.shape[0]):
        for t in range(length):
            last = values.shape[2] - length + t
            seen = [s for s in range(starts[b, t], last + 1) if exists[b, s]]
            if seen:
                out[b, t] = values[b, :, seen].double().mean(1)
    return out


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_running_mean(length, masked):
    values = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(0))
    exists = torch.ones(2, 12, dtype=torch.bool)
    if masked:
        exists[0, :8], exists[1, -2:] = False, False
    found = running_mean(values, length, StickbreakingMask(exists if masked else None))
    torch.testing.assert_close(
        found.double(), slow_mean(values, length, exists, torch.zeros(2, length).long()), rtol=1e-5, atol=1e-6
    )


def test_running_mean_of_packed_documents():
    values = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exists = torch.ones(2, 12, dtype=torch.bool)
    exists[1, 9:] = False
    starts = torch.tensor([[0] * 5 + [5] * 1 + [6] * 6, [0] * 2 + [2] * 10])
    found = running_mean(values, 12, StickbreakingMask(exists, starts))
    torch.testing.assert_close(found, slow_mean(values, 12, exists, starts))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_types_have_the_same_context(implementation):
    keys, values = torch.randn(2, 2, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    embeds, mask = torch.zeros(2, 20, 32), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    positions = torch.cat([torch.arange(9), torch.arange(11)]).expand(2, -1)
    found = {}
    for attention_type in ("stickbreaking", "softmax"):
        config = ModMoEConfig(**TINY, attention_type=attention_type)
        config._attn_implementation = implementation
        inputs: AttentionInputs = attention_inputs(config, embeds, mask, positions, None, None)
        found[attention_type] = DocumentContext(config, 0)(keys, values, 20, inputs).view(2, 20, 16)[mask.bool()]
    torch.testing.assert_close(found["softmax"], found["stickbreaking"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["softmax"].pow(2).mean(-1), torch.ones(36), rtol=1e-3, atol=0)
