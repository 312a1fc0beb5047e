"""Experts of one FFN: copies and clusters equal it, re-drawn neurons look like the old ones."""

import pytest
import torch
import torch.nn.functional as F

from modmoe import ModMoEConfig
from modmoe.models.blocks import ModMoEMLP
from modmoe.surgery.upcycle_ffn import upcycle_ffn

CHANGES = {"copy": {"norm_topk_prob": True}, "cluster": {"unit_gates": True}}


def mlp(gated: bool, bias: bool, dtype: torch.dtype = torch.float64, **changes) -> ModMoEMLP:
    fields = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    fields |= {"num_experts": 1, "router_type": "linear", "gated_ffn": gated, "ffn_bias": bias}
    config = ModMoEConfig(**(fields | changes))
    config._experts_implementation = "modmoe"
    module = ModMoEMLP(config, 0).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return module


def pool(dense: ModMoEMLP, method: str, top_k: int, **options) -> ModMoEMLP:
    """Eight experts of a dense FFN, with the router that belongs to them or a random one."""
    config = dense.config
    size = 24 if method == "copy" else 3
    counts = {"num_experts": 8, "num_experts_per_tok": top_k, "intermediate_size": size}
    routed = mlp(config.gated_ffn, config.ffn_bias, **counts, **CHANGES[method])
    generator = torch.Generator().manual_seed(1)
    upcycled = upcycle_ffn(dense.experts.state_dict(), method, 8, top_k, generator=generator, **options)
    routed.experts.load_state_dict(upcycled.experts)
    if upcycled.router is not None:
        routed.gate.weight.data = upcycled.router
    return routed


@pytest.fixture(params=[True, False], ids=["gated", "plain"])
def gated(request) -> bool:
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def dense(request, gated) -> ModMoEMLP:
    return mlp(gated, request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(("method", "top_k"), [("copy", 1), ("copy", 3), ("copy", 8), ("cluster", 8)])
def test_the_start_equals_the_dense_ffn(dense, x, method, top_k):
    expected, _, _ = dense(x)
    assert expected.abs().max() > 10
    torch.testing.assert_close(pool(dense, method, top_k)(x)[0], expected, rtol=0, atol=1e-10)


def test_fewer_clusters_are_the_sum_of_their_neurons(dense, x):
    """And the output bias counts once."""
    routed = pool(dense, "cluster", 3)
    output, routing, _ = routed(x)
    weights, expected = dense.experts.state_dict(), torch.zeros_like(x)
    hidden = dense.experts.activate(
        F.linear(x, weights[dense.experts.up_name][0], weights.get(dense.experts.bias_name, [None])[0])
    )
    clusters = neurons_of(routed, dense)
    for token, chosen in enumerate(routing.top_k_index):
        active = torch.zeros(24, dtype=torch.float64)
        active[clusters[chosen].flatten()] = 1.0
        b, t = divmod(token, 9)
        expected[b, t] = weights["down_proj"][0] @ (hidden[b, t] * active)
    if "down_proj_bias" in weights:
        expected += weights["down_proj_bias"][0]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    assert (output - dense(x)[0]).abs().max() > 1


def neurons_of(routed: ModMoEMLP, dense: ModMoEMLP) -> torch.Tensor:
    """(8, 3): which of the dense FFN's neurons each expert has, told by their output weights."""
    ours, theirs = routed.experts.down_proj.mT, dense.experts.down_proj[0].T
    return (ours[:, :, None] == theirs).all(-1).to(torch.int64).argmax(-1)


def test_clusters_share_out_all_neurons(dense):
    found = neurons_of(pool(dense, "cluster", 2), dense)
    assert torch.equal(found.flatten().sort().values, torch.arange(24))


def test_router_rows_point_to_the_clusters_keys(gated):
    dense = mlp(gated, False)
    keys = getattr(dense.experts, dense.experts.up_name).data[0, :24]
    group = torch.arange(24) % 8
    keys.copy_(0.1 * keys + 5 * torch.eye(16, dtype=torch.float64)[group])
    routed = pool(dense, "cluster", 1)
    _, routing, _ = routed(torch.eye(16, dtype=torch.float64)[None, :8])
    chosen = neurons_of(routed, dense)[routing.top_k_index[:, 0]]
    assert torch.equal(group[chosen], torch.arange(8)[:, None].expand(8, 3))


def test_router_logits_have_unit_deviation_for_inputs_of_the_scale_given(x):
    dense, scale = mlp(True, False), torch.linspace(0.01, 3.0, 16, dtype=torch.float64)
    router = upcycle_ffn(dense.experts.state_dict(), "cluster", 8, 2, input_scale=scale).router
    inputs = scale * torch.randn(20000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (inputs @ router.T).std(0).tolist() == pytest.approx([1.0] * 8, rel=0.05)


def test_redrawn_neurons_are_as_many_as_asked_and_look_like_the_old(gated):
    dense = mlp(gated, True, hidden_size=64, intermediate_size=96)
    weights = {name: 3 + 0.5 * w for name, w in dense.experts.state_dict().items()}
    if gated:
        weights["gate_up_proj"][:, :96] -= 5  # gates and ups differ
    experts = upcycle_ffn(weights, "copy", 3, 1, reinit=0.25, generator=torch.Generator().manual_seed(0)).experts
    assert torch.equal(experts["down_proj_bias"], weights["down_proj_bias"].expand(3, -1))
    changed = (experts["down_proj"] != weights["down_proj"]).any(1)
    assert changed.sum(-1).tolist() == [24, 24, 24]
    assert not torch.equal(changed[0], changed[1])
    for name in (dense.experts.up_name, dense.experts.bias_name):
        halves = experts[name].unflatten(1, (-1, 96)), weights[name].unflatten(1, (-1, 96))
        moved = (
            (halves[0] != halves[1]).flatten(3).any(-1) if name == dense.experts.up_name else halves[0] != halves[1]
        )
        assert torch.equal(moved, changed[:, None].expand_as(moved))
        for new, old in zip(halves[0].unbind(1), halves[1].unbind(1), strict=True):
            new, old = new[changed], old.expand_as(new)[changed]
            assert new.mean().item() == pytest.approx(old.mean().item(), abs=0.25)
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.25)
    new = experts["down_proj"].mT[changed]
    assert (new.mean().item(), new.std().item()) == pytest.approx((3.0, 0.5), abs=0.05)


def test_no_neuron_is_redrawn_unless_asked(dense):
    weights = dense.experts.state_dict()
    for name, stacked in upcycle_ffn(weights, "copy", 4, 1).experts.items():
        assert torch.equal(stacked, weights[name].expand_as(stacked))


def test_weights_stay_in_their_dtype_and_are_not_changed():
    weights = {name: w.bfloat16() for name, w in mlp(True, True).experts.state_dict().items()}
    before = {name: w.clone() for name, w in weights.items()}
    for method, options in (("copy", {"reinit": 0.5}), ("cluster", {})):
        upcycled = upcycle_ffn(weights, method, 4, 2, **options)
        assert {w.dtype for w in upcycled.experts.values()} == {torch.bfloat16}
        assert all(torch.equal(weights[name], w) for name, w in before.items())
    assert upcycled.router.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("split", 8, 2), "method='split' must be one of copy, cluster"),
        (("cluster", 7, 2), "num_experts=7 does not divide the 24 neurons .* such as 6"),
        (("cluster", 0, 2), "num_experts=0 does not divide the 24 neurons .* such as 1"),
        (("copy", 8, 2, 1.5), r"reinit=1.5 must be a share between 0 and 1"),
        (("cluster", 8, 2, 0.5), "reinit=0.5 would break up the clusters: it belongs to method='copy'"),
    ],
)
def test_wrong_arguments(arguments, message):
    method, count, top_k, *reinit = arguments
    with pytest.raises(ValueError, match=message):
        upcycle_ffn(
            mlp(True, False).experts.state_dict(), method, count, top_k, **({"reinit": reinit[0]} if reinit else {})
        )
