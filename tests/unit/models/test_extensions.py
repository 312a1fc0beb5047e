"""Models with extensions: what new experts do to outputs, losses and gradients."""

import pytest
import torch
from transformers import GenerationConfig

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.models.extension import Extension

from .conftest import TINY
from .conftest import build as build_anew

GROUP = {"name": "g", "num_experts": 3, "num_experts_per_tok": 2, "num_attn_experts": 2}
COMMON = {"name": "c", "num_experts": 2, "num_attn_experts": 1, "mode": "common"}
BOTH = {"extensions": [GROUP, COMMON]}


@torch.no_grad()
def build(**changes) -> ModMoEForCausalLM:
    """Of routers that have learned to read what documents are about, which begins with zeros."""
    model = build_anew(**changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("context_weight"):
            parameter.normal_(std=0.5, generator=generator)
    return model


def test_its_weights_are_told_apart_by_name_and_the_others_keep_theirs():
    base, extended = build().state_dict(), build(**BOTH).state_dict()
    own = {name for name in extended if Extension.of(GROUP).owns(name) or Extension.of(COMMON).owns(name)}
    assert {name: tensor.shape for name, tensor in extended.items() if name not in own} == {
        name: tensor.shape for name, tensor in base.items()
    }
    assert not [name for name in base if Extension.of(GROUP).owns(name)]
    assert not Extension("gg", 1).owns("model.layers.0.mlp.extensions.g.gate.weight")


@torch.no_grad()
def test_outputs_of_routers(ids):
    model = build(**BOTH)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert [x.shape for x in out.router_logits] == [(60, 6 + 2)] * 2
    assert [x.shape for x in out.attn_router_logits] == [(60, 4 + 1)] * 2
    assert out.extension_router_logits.keys() == {"g"}
    assert [x.shape for x in out.extension_router_logits["g"]] == [(60, 1 + 3)] * 2 + [(60, 1 + 2)] * 2
    for index, load in zip(out.extension_router_indices["g"], out.extension_tokens_per_expert["g"], strict=True):
        assert load.tolist() == [int((index == expert).sum()) for expert in range(len(load))]
        assert (index[:5] == len(load)).all()  # padding
        assert 0 < load.sum() < index.numel()
    assert build()(ids, labels=ids).extension_tokens_per_expert is None


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"gated_ffn": False}])
def test_implementations_of_experts_agree(ids, changes):
    expected = build(**BOTH, **changes).eval()(ids).logits
    for name in ("eager", "grouped_mm"):
        found = build(**BOTH, **changes, experts_implementation=name).eval()(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention_type": "softmax"}])
def test_decoding_equals_one_pass(ids, changes):
    model = build(**BOTH, **changes).eval()
    whole, cache, parts = model(ids).logits, None, []
    for piece in ids.split([7, 1, 1, 11], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    generated = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
    assert generated[:, 4].equal(model(ids[:, :4]).logits[:, -1].argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"attention_type": "softmax"}])
def test_a_document_is_read_as_if_it_were_alone(ids, changes):
    """Neither documents packed before it nor padding on either side change what its routers read."""
    model = build(**BOTH, **changes).eval()
    alone = [model(row[None]).logits[0] for row in (ids[0, :8], ids[0, 8:])]
    packed = model(ids[:1], position_ids=torch.cat([torch.arange(8), torch.arange(12)])[None]).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    for left in (0, 5):
        padded, mask, positions = (
            torch.nn.functional.pad(x, (left, 5 - left))
            for x in (ids[:1], torch.ones_like(ids[:1]), torch.cat([torch.arange(8), torch.arange(12)])[None])
        )
        found = model(padded, attention_mask=mask, position_ids=positions).logits[0]
        torch.testing.assert_close(found[mask[0].bool()], torch.cat(alone), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_context_gets_what_attention_is_told(ids):
    model = build(**BOTH, attention_type="softmax").eval()
    told = model(ids, is_causal=False).logits
    model.config.is_causal = False
    for layer in model.model.layers:
        for module in layer.self_attn.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    torch.testing.assert_close(told, model(ids).logits)


@torch.no_grad()
def test_continuous_batching_generates_the_same(ids):
    model = build(extensions=[GROUP], attention_type="softmax").eval()
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=96)
    expected = [model.generate(row[None], generation_config=config)[0, len(row) :].tolist() for row in ids[:, :9]]
    found = model.generate_batch([row.tolist() for row in ids[:, :9]], generation_config=config)
    assert sorted(result.generated_tokens for result in found.values()) == sorted(expected)


@torch.no_grad()
@pytest.mark.parametrize("extensions", [[], [GROUP]])
def test_generation_with_a_static_cache(ids, extensions):
    model = build(extensions=extensions, attention_type="softmax").eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    assert model.generate(ids, **options, cache_implementation="static", disable_compile=True).equal(expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(ids, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build(**BOTH).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_routers_stay_in_float32(tmp_path):
    build(**BOTH).save_pretrained(tmp_path)
    model = ModMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name


def balance_loss(model, ids, kind):
    model.config.router_aux_loss_type = kind
    return model(ids, labels=ids).aux_loss


@pytest.mark.parametrize("kind", ["mi", "concentration", "switch"])
@pytest.mark.parametrize("router_type", ["linear", "mlp"])
def test_balance_losses_leave_the_null_choice_alone(ids, kind, router_type):
    """They balance the tokens that use the new experts and have no gradient on how many these are."""
    model = build(extensions=[GROUP], router_type=router_type)
    for name, parameter in model.named_parameters():
        if ".extensions." in name and name.endswith(("down_proj", "o_proj.weight")):
            parameter.data.zero_()  # else the gates change what later routers see
    balance_loss(model, ids, kind).backward()
    for gate, _ in model.extension_pools("g"):
        assert not gate.weight.grad[0].any()
        assert gate.weight.grad[1:].any()


@torch.no_grad()
def test_tokens_that_decline_do_not_count_in_balance_losses(ids):
    model, base = build(extensions=[GROUP]), build()
    model.load_state_dict(base.state_dict(), strict=False)
    for gate, _ in model.extension_pools("g"):
        gate.in_proj.bias.fill_(5.0)
        gate.weight[0] = 5.0
    out = model(ids, labels=ids)
    assert not any(load.any() for load in out.extension_tokens_per_expert["g"])
    # The mean is over 4 routers there, and over 8 here.
    assert torch.equal(out.logits, base(ids).logits)
    torch.testing.assert_close(2 * out.aux_loss, base(ids, labels=ids).aux_loss)


def test_active_parameters(ids):
    model = build(**BOTH)
    base, (group_ffn, *_), (common_ffn, *_) = build(), model.extension_pools("g"), model.extension_pools("c")
    routers = sum(p.numel() for gate, _ in (*model.extension_pools("g"), *model.extension_pools("c"))
                  for p in gate.parameters())  # fmt: skip
    ffn, attn = 3 * 32 * 24, 2 * 32 * 32
    assert model.num_active_parameters() == base.num_active_parameters() + routers + 2 * (2 * ffn + 1 * attn)
    assert (group_ffn[1].num_experts, common_ffn[1].num_experts) == (3, 2)


def test_a_frozen_router_keeps_its_selection_bias(ids):
    model = build(extensions=[GROUP], use_selection_bias=True)
    model.model.layers[0].mlp.gate.requires_grad_(False)
    out = model(ids, labels=ids)
    model.update_selection_bias(out.tokens_per_expert, out.attn_tokens_per_expert)
    assert not model.model.layers[0].mlp.gate.selection_bias.any()
    assert model.model.layers[1].mlp.gate.selection_bias.any()


@pytest.mark.parametrize(
    ("extensions", "changes", "message"),
    [
        ([{"name": "a"}], {}, "num_experts=0 and num_attn_experts=0: give it at least one expert"),
        ([{"name": "a", "num_experts": 2, "num_experts_per_tok": 3}], {}, "between 1 and num_experts=2"),
        ([{"name": "a", "num_experts": -1}], {}, "num_experts=-1 of extension 'a' must be a number from 0 up"),
        ([{"name": "a.b", "num_experts": 1}], {}, "'a.b' must be made of letters"),
        ([{"name": "keys", "num_experts": 1}], {}, "'keys' is an attribute of PyTorch's modules"),
        ([{"name": "a", "num_experts": 1}] * 2, {}, "two extensions have the name 'a'"),
        ([{"name": "a", "experts": 1}], {}, "an extension is a dictionary with a name, and perhaps num_experts,"),
        ([{"name": "a", "num_experts": 1, "mode": "x"}], {}, "mode='x' of extension 'a' must be 'group' or 'common'"),
        ([GROUP], {"num_experts": 1, "num_attn_experts": 1}, "'g' needs a model with experts"),
        ([COMMON], {"num_experts": [6, 1]}, "needs a router to join, and layer 1 is dense: use mode='group'"),
        ([COMMON], {"use_selection_bias": True}, "use_selection_bias=True: use mode='group'"),
    ],
)
def test_refused(extensions, changes, message):
    with pytest.raises(Exception, match=message):
        ModMoEConfig(**(TINY | changes), extensions=extensions)
