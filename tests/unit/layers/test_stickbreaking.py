"""`attn_implementation="stickbreaking"` in a model that is not ours: a Llama that declares it, with random weights."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from modmoe.layers.stickbreaking import StickbreakingMask, stickbreaking_attention_forward
from modmoe.ops import reference

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
DECLARED = {"attention_type": "stickbreaking", "attn_implementation": "stickbreaking"}
LENGTHS = [5, 1, 8]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(2, -1)


def build(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(TINY | DECLARED | changes))).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 61, (2, 14), generator=torch.Generator().manual_seed(1))


def embeds(length: int = 6) -> torch.Tensor:
    return torch.zeros(2, length, 16)


def layer(**changes):
    return build(**changes).model.layers[0].self_attn


@pytest.mark.parametrize("attend_current", [True, False])
def test_equals_the_reference(attend_current):
    module = layer(attend_current=attend_current)
    q, k, v = torch.randn(2, 4, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    key_mask, start = torch.rand(2, 5) > 0.3, torch.tensor([[0, 1, 1], [0, 0, 3]])
    mask = StickbreakingMask(key_mask, start)
    out, weights = stickbreaking_attention_forward(module, q, k, v, mask, scaling=0.7, output_attentions=True)
    expected = reference.stickbreaking_attention(
        q.double(), k.double(), v.double(), 0.7, attend_current, key_mask, start
    )
    assert_close(out.double(), expected[0].transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert_close(weights.double(), expected[2], rtol=1e-5, atol=1e-6)
    fast, none = stickbreaking_attention_forward(module, q, k, v, mask, scaling=0.7)
    assert none is None
    assert fast.is_contiguous()
    assert_close(fast, out)


@torch.no_grad()
def test_it_is_another_model_than_softmax(ids):
    model = build()
    ours = model(ids).logits
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(ids).logits, ours, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("pad", [slice(None, 4), slice(-4, None)], ids=["left", "right"])
def test_padding_is_as_if_absent(ids, pad):
    model = build()
    mask = torch.ones_like(ids)
    mask[0, pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits[0, mask[0].bool()]
    assert_close(padded, model(ids[:1, mask[0].bool()]).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_documents_do_not_see_each_other(ids, compiled):
    model = build()
    separate = torch.cat([model(document, use_cache=False).logits for document in ids.split(LENGTHS, dim=1)], dim=1)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    packed = forward(ids, position_ids=POSITIONS, use_cache=False).logits
    assert_close(packed, separate, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_continuing_from_a_cache_and_generation(ids):
    model = build()
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([9, 1, 4], dim=1)]
    assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = model.generate(ids[:1, 5:], max_new_tokens=5, do_sample=False)
    assert torch.equal(together[0, 14:], alone[0, 9:])


def test_training_reaches_every_parameter(ids):
    model = build().train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_mask_is_never_a_matrix():
    config = build().config
    length = 5000
    inputs = {"config": config, "inputs_embeds": embeds(length), "past_key_values": None}
    plain = create_causal_mask(**inputs, attention_mask=None)
    assert plain == StickbreakingMask(None, None)
    padded = create_causal_mask(**inputs, attention_mask=torch.ones(2, length))
    assert padded.key_mask.shape == (2, length)
    assert padded.key_mask.dtype == torch.bool
    positions = torch.arange(length).remainder(2000)[None]
    packed = create_causal_mask(**inputs, attention_mask=None, position_ids=positions)
    assert packed.document_start.shape == (2, length)
    assert packed.document_start[1, [0, 1999, 2000, 4999]].tolist() == [0, 0, 2000, 4000]


def test_a_softmax_model_is_refused(ids):
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.set_attn_implementation("stickbreaking")
    message = "on a 'llama' model whose config says attention_type=None.*another model.*attn_implementation='sdpa'"
    with pytest.raises(ValueError, match=message):
        model(ids)
    with pytest.raises(ValueError, match=message):
        create_causal_mask(model.config, embeds(), None, None)
    module, q = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 4)
    with pytest.raises(ValueError, match=message):
        stickbreaking_attention_forward(module, q, q[:, :2], q[:, :2], None)


def test_masks_that_cannot_be_honoured_are_refused():
    config = build().config
    config.sliding_window = 3
    inputs = {"config": config, "inputs_embeds": embeds(), "attention_mask": None, "past_key_values": None}
    with pytest.raises(ValueError, match="no sliding window, got a window of 3 keys"):
        create_sliding_window_causal_mask(**inputs)
    with pytest.raises(ValueError, match="cannot honour or_mask_function or and_mask_function"):
        create_causal_mask(**inputs, and_mask_function=lambda b, h, q, k: k != 1)
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1]] * 2)  # such as the patches of an image
    for shape in (
        lambda: create_causal_mask(**inputs, block_sequence_ids=blocks),
        lambda: create_bidirectional_mask(config, embeds(), None),
    ):
        with pytest.raises(ValueError, match="this mask has another shape"):
            shape()


def test_look_ahead_is_refused_in_a_graph_too():
    config = build().config

    def make(x, blocks):
        mask = create_causal_mask(config, x, None, None, block_sequence_ids=blocks)
        return mask.document_start + 0

    compiled = torch.compile(make, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="this mask has another shape"):
        compiled(embeds(), torch.tensor([[-1, 0, 0, 0, -1, -1]] * 2))


def test_unused_slots_and_prepared_masks_are_refused(ids):
    model = build()
    with pytest.raises(ValueError, match="got 32 slots for 0 cached and 14 new tokens; use DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 9\) and must have \(2, 14\)"):
        model(ids, attention_mask=torch.ones(2, 9), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="takes the StickbreakingMask.*no prepared 4-D masks"):
        model(ids, attention_mask=torch.ones(2, 1, 14, 14).tril())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "dropout=0.1: stick-breaking attention has no dropout"),
        ({"is_causal": False}, "is_causal=False"),
        ({"sliding_window": 4}, "cannot honour sliding_window=4"),
        ({"softcap": 30.0}, "cannot honour softcap=30.0"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_honoured_are_refused(arguments, message):
    q = torch.zeros(1, 4, 3, 4)
    with pytest.raises(ValueError, match=message):
        stickbreaking_attention_forward(layer(), q, q[:, :2], q[:, :2], None, **arguments)


def test_a_sliding_window_model_is_refused(ids):
    model = MistralForCausalLM(MistralConfig(**TINY, **DECLARED, sliding_window=4))
    with pytest.raises(ValueError, match="no sliding window, got a window of 4 keys"):
        model(ids)
