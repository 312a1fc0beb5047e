"""`experts_implementation="megablocks"`: the error where it is absent, and our side of it on a stand-in.

megablocks itself: tests/gpu/test_interfaces.py.
"""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import transformers
from torch import Tensor

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.layers import megablocks

ABSENT = importlib.util.find_spec("megablocks") is None


@pytest.mark.skipif(not ABSENT, reason="megablocks is installed")
def test_absent_megablocks_is_said_with_the_remedy():
    message = (
        "'megablocks' cannot be used.*No module named 'megablocks'.*pip install --no-deps.*'modmoe' needs nothing"
    )
    with pytest.raises(ImportError, match=message):
        ModMoEForCausalLM(ModMoEConfig(hidden_size=32, num_hidden_layers=1, experts_implementation="megablocks"))
    model = ModMoEForCausalLM(ModMoEConfig(hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ImportError, match=message):
        model.set_experts_implementation("megablocks")
    config = transformers.MixtralConfig(
        vocab_size=9,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    other = transformers.MixtralForCausalLM(config)
    other.set_experts_implementation("megablocks")  # transformers does not ask us
    with pytest.raises(ImportError, match=message):
        other(torch.tensor([[1, 2]]))


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """grouped_gemm 0.3's contract, on any dtype and device: counts on the host, contiguous, no rows left over."""
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.dtype == torch.int64
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert int(batch_sizes.sum()) == a.shape[0]
    pieces = zip(a.split(batch_sizes.tolist()), b.mT if trans_b else b, strict=True)
    return torch.cat([rows @ weight for rows, weight in pieces])


@pytest.fixture
def stand_in(monkeypatch) -> ModuleType:
    package, util, ops = (ModuleType(n) for n in ("megablocks", "megablocks.grouped_gemm_util", "ops"))
    ops.gmm, util.ops, package.grouped_gemm_util = gmm, ops, util
    monkeypatch.setitem(sys.modules, "megablocks", package)
    monkeypatch.setitem(sys.modules, "megablocks.grouped_gemm_util", util)
    return util


@pytest.mark.parametrize("module", ["muse_spark", "nemotron_h", "aria", "openai_privacy_filter"])
def test_our_side_equals_ours(stand_in, monkeypatch, module):
    from .test_grouped_experts import assert_same, experts_of

    monkeypatch.setattr(megablocks, "_check", lambda *args: None)  # the stand-in runs here, megablocks would not
    experts = experts_of(module)
    index = torch.tensor([[0, 2], [5, 5], [4, 0], [2, 5], [0, 4]])  # experts 1 and 3 are idle
    gates = torch.rand(5, 2).masked_fill(index == 5, 0).requires_grad_()
    x = torch.randn(5, 16, requires_grad=True)
    results = []
    for implementation in ("modmoe", "megablocks"):
        experts.config._experts_implementation = implementation
        out = experts(x, index, gates)
        leaves = {"x": x, "gates": gates, **dict(experts.named_parameters())}
        gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        results.append({"out": out, **dict(zip(leaves, gradients, strict=True))})
    assert_same(results[1], results[0])


def test_what_megablocks_cannot_multiply_is_refused(stand_in):
    from .test_grouped_experts import experts_of

    experts = experts_of("aria")
    experts.config._experts_implementation = "megablocks"
    x, index, gates = torch.randn(2, 16), torch.tensor([[0, 1]] * 2), torch.rand(2, 2)
    with pytest.raises(RuntimeError, match=r"bfloat16 on CUDA alone, but hidden_states are torch.float32 on cpu"):
        experts(x, index, gates)


def test_megablocks_without_its_grouped_gemm(stand_in):
    stand_in.ops = None  # how megablocks says so
    with pytest.raises(ImportError, match="No module named 'grouped_gemm'.*pip install --no-deps"):
        megablocks.grouped_gemm()
