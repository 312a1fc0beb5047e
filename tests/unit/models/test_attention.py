"""Which attention a model runs: stick-breaking under its own name, softmax by any implementation of transformers."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import flash_attention_mask
from transformers.utils import is_flash_attn_2_available

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.models.context import document_starts, flash_documents

from .conftest import TINY, build

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
LENGTHS = [7, 1, 12]
PACKED = torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(3, -1)


def softmax(implementation: str, is_causal: bool = True, **changes) -> ModMoEForCausalLM:
    model = build(attention_type="softmax", is_causal=is_causal, attn_implementation=implementation, **changes)
    assert model.config._attn_implementation == implementation
    return model.eval()


def padding(side: str) -> torch.Tensor:
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, slice(None, 6) if side == "left" else slice(-6, None)] = 0
    return mask


CONTEXTS = {
    "plain": {},
    "packed": {"position_ids": PACKED},
    "left padding": {"attention_mask": padding("left")},
    "right padding": {"attention_mask": padding("right")},
    "packed and padded": {"attention_mask": padding("right"), "position_ids": PACKED},
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_sdpa_equals_eager(ids, context, is_causal):
    inputs = CONTEXTS[context]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    results = []
    for implementation in ("eager", "sdpa"):
        model = softmax(implementation, is_causal)
        logits = model(ids, **inputs).logits[real]
        logits.square().mean().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (eager, eager_gradients), (sdpa, sdpa_gradients) = results
    torch.testing.assert_close(sdpa, eager, **TOLERANCE)
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(sdpa_gradients[name], gradient, **TOLERANCE, msg=name)


@torch.no_grad()
def test_sdpa_continues_from_a_cache_as_eager(ids):
    results = []
    for implementation in ("eager", "sdpa"):
        model, cache = softmax(implementation), DynamicCache()
        results.append(torch.cat([model(p, past_key_values=cache).logits for p in ids.split([9, 1, 10], dim=1)], 1))
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_absent_flash_attention_is_said():
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on, but it cannot be used"):
        build(attention_type="softmax", attn_implementation="flash_attention_2")


def varlen_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs):
    """What flash attention does with its arguments, document by document over the flattened batch."""
    assert attention_mask is None
    batch, heads, length, dim = query.shape
    flat = [x.transpose(1, 2).reshape(1, batch * length, -1, dim).transpose(1, 2) for x in (query, key, value)]
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, start:end] for x in flat), scale=scaling, is_causal=module.is_causal, enable_gqa=True
        )
        for start, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True)
    ]
    assert kwargs["max_length_q"] == cu_seq_lens_q.diff().max()
    return torch.cat(pieces, 2).transpose(1, 2).reshape(batch, length, heads, dim), None


@torch.no_grad()
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("extensions", [[], [{"name": "new", "num_experts": 3, "num_attn_experts": 2}]])
def test_flash_attention_is_told_the_documents(ids, is_causal, extensions):
    """Without it, transformers finds documents in a batch of one row alone."""
    AttentionInterface.register("flash_stand_in", varlen_attention)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model = softmax("sdpa", is_causal, extensions=extensions)
    for name, parameter in model.named_parameters():
        if name.endswith("context_weight"):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    expected = model(ids, position_ids=PACKED).logits
    model.config._attn_implementation_internal = "flash_stand_in"
    torch.testing.assert_close(model(ids, position_ids=PACKED).logits, expected, **TOLERANCE)
    ones = torch.ones_like(ids)
    torch.testing.assert_close(model(ids, ones, position_ids=PACKED).logits, expected, **TOLERANCE)


def test_flash_documents():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    documents = flash_documents(document_starts(positions), None)
    assert documents["cu_seq_lens_q"].tolist() == [0, 3, 5, 10]
    assert documents["cu_seq_lens_q"].dtype == torch.int32
    assert documents["max_length_k"] == 5
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    padded = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert flash_documents(document_starts(padded, left), left) == {}
    with pytest.raises(ValueError, match="cannot read packed documents and padding from one batch"):
        flash_documents(document_starts(positions, left), left)


@pytest.mark.parametrize("asked", [None, "eager", "stickbreaking"])
def test_stickbreaking_has_one_name(ids, asked):
    model = build(attn_implementation=asked).eval()
    assert model.config._attn_implementation == "stickbreaking"
    assert ModMoEForCausalLM(model.config).config._attn_implementation == "stickbreaking"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "stickbreaking"
    assert model(ids, output_attentions=True).attentions[0].shape == (3, 8, 20, 20)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@torch.no_grad()
def test_static_cache(ids, is_causal):
    model = softmax("sdpa", is_causal)
    cache = StaticCache(config=model.config, max_cache_len=32)
    if is_causal:
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **TOLERANCE)
    else:
        with pytest.raises(ValueError, match="would see the unused slots of a StaticCache"):
            model(ids, past_key_values=cache)


@pytest.mark.parametrize("name", ["sdpa", "flash_attention_2", "flex_attention", "kernels-community/flash-attn2"])
def test_a_stickbreaking_model_refuses_softmax(name):
    message = f"attn_implementation='{name}' computes softmax attention"
    with pytest.raises(ValueError, match=message):
        build(attn_implementation=name)
    with pytest.raises(ValueError, match=message):
        build().set_attn_implementation(name)
    with pytest.raises(ValueError, match=message):
        build().get_correct_attn_implementation(name)  # what a larger model asks of its parts


def test_a_softmax_model_refuses_stickbreaking():
    with pytest.raises(ValueError, match="'modmoe' model whose config says attention_type='softmax'.*another model"):
        build(attention_type="softmax", attn_implementation="stickbreaking")
    with pytest.raises(ValueError, match="another model"):
        build(attention_type="softmax").set_attn_implementation("stickbreaking")


def test_the_op_runs_on_the_chosen_backend(ids, monkeypatch):
    from modmoe.layers import stickbreaking

    seen = []
    op = stickbreaking.stickbreaking_attention
    monkeypatch.setattr(
        stickbreaking, "stickbreaking_attention", lambda *a, **k: seen.append(k["backend"]) or op(*a, **k)
    )
    model = build()
    model(ids)
    model(ids, output_attentions=True)
    assert seen == [None, None, "reference", "reference"]


def test_config_alone_chooses_nothing():
    assert ModMoEConfig(**TINY)._attn_implementation is None


def test_attentions_asked_for_in_the_config(ids, tmp_path):
    model = build(output_attentions=True).eval()
    model.save_pretrained(tmp_path)
    loaded = ModMoEForCausalLM.from_pretrained(tmp_path, output_attentions=True)
    for m in (model, loaded):
        assert m(ids).attentions[0].shape == (3, 8, 20, 20)
    model.config.output_attentions = False
    assert model(ids).attentions is None
    model.config.output_attentions = True
    assert model(ids).attentions is not None
    with pytest.raises(ValueError, match="output_attentions.*not supported when using.*sdpa"):
        softmax("sdpa").config.output_attentions = True
