"""What every model of this architecture must do, for each switch of it."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modmoe import ModMoEConfig, ModMoEForSequenceClassification
from modmoe.models.context import AttentionInputs, document_starts

from .conftest import TINY, build

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def test_every_parameter_gets_a_gradient(variant, ids):
    model = build(**variant).train()
    model(ids, labels=ids).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_routers_get_gradient_from_the_balance_loss_alone(ids):
    model = build().train()
    model(ids, labels=ids).aux_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.any()
    assert model.model.layers[1].self_attn.gate.weight.grad.any()


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(variant, ids):
    model = build(**variant).eval()
    together = model(ids).logits
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(together, alone, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(variant, ids, side):
    model = build(**variant).eval()
    mask = torch.ones_like(ids)
    pad = slice(None, 6) if side == "left" else slice(-6, None)
    mask[0, pad] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions, labels=ids.masked_fill(mask == 0, -100))
    alone = model(ids[:1, mask[0].bool()])
    torch.testing.assert_close(padded.logits[0, mask[0].bool()], alone.logits[0], **TOLERANCE)


@torch.no_grad()
def test_continuing_from_a_cache_equals_one_pass(variant, ids):
    model = build(**variant).eval()
    full = model(ids).logits
    cache, pieces = DynamicCache(config=model.config), []
    for piece in ids.split([11, 1, 5, 3], dim=1):
        pieces.append(model(piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, **TOLERANCE)
    assert cache.layers[0].keys.shape == (3, TINY["num_key_value_heads"], 20, TINY["head_dim"])


@torch.no_grad()
@pytest.mark.parametrize("context", ["plain", "mask of ones", "empty cache"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_type": "softmax"}, {"attention_type": "softmax", "is_causal": False}],
    ids=["stickbreaking", "softmax", "bidirectional"],
)
def test_packed_documents_equal_separate_ones(ids, changes, context):
    model = build(**changes).eval()
    lengths = [7, 1, 12]
    inputs = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None].expand(3, -1)}
    if context == "mask of ones":
        inputs["attention_mask"] = torch.ones_like(ids)
    elif context == "empty cache":
        inputs["past_key_values"] = DynamicCache(config=model.config)
    packed = model(ids, **inputs).logits
    separate = torch.cat([model(document).logits for document in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, **TOLERANCE)


def test_document_starts():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 7, 8]])
    assert document_starts(positions).tolist() == [[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 0, 0]]
    left = torch.tensor([[1, 1, 0, 1, 2, 3]])
    assert document_starts(left, torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()).tolist() == [[0, 0, 2, 2, 2, 2]]


@torch.no_grad()
def test_a_hole_in_the_mask_is_no_boundary(ids):
    model = build().eval()
    mask = torch.ones_like(ids)
    mask[:, 8] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    holed = model(ids, attention_mask=mask, position_ids=positions).logits[:, 9:]
    without = model(torch.cat([ids[:, :8], ids[:, 9:]], dim=1)).logits[:, 8:]
    torch.testing.assert_close(holed, without, **TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(ids, use_reentrant):
    plain, checkpointed = build().train(), build().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs = [m(ids, labels=ids) for m in (plain, checkpointed)]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(outputs[0].aux_loss, outputs[1].aux_loss)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


@torch.no_grad()
def test_bidirectional_softmax_sees_the_future(ids):
    model = build(attention_type="softmax", is_causal=False).eval()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 97
    assert not torch.allclose(model(ids).logits[:, 0], model(changed).logits[:, 0])
    causal = build(attention_type="softmax").eval()
    torch.testing.assert_close(causal(ids).logits[:, 0], causal(changed).logits[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_generation_with_left_padding_equals_without(variant, ids, settings):
    if settings.get("do_sample"):
        settings = settings | {"top_k": 1}  # sampling machinery, one possible outcome
    model = build(**variant).eval()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    settings = settings | {"max_new_tokens": 6, "pad_token_id": 0}
    batched = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(ids[:1, 6:], **settings)
    assert torch.equal(batched[0, 20:], alone[0, 14:])
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **settings), batched)


def test_hidden_states_and_attentions(ids):
    out = build()(ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert len(out.hidden_states) == 3
    assert [w.shape for w in out.attentions] == [(3, 8, 20, 20)] * 2
    assert [r.shape for r in out.router_logits] == [(60, 6)] * 2
    assert [r.shape for r in out.attn_router_logits] == [(60, 4)] * 2
    assert build()(ids).router_logits is None


def test_tokens_per_expert_counts_real_tokens(ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    out = build()(ids, attention_mask=mask, labels=ids)
    assert [int(load.sum()) for load in out.tokens_per_expert] == [2 * 54] * 2
    everything = build(route_padding=True)(ids, attention_mask=mask, labels=ids)
    assert int(everything.tokens_per_expert[0].sum()) == 2 * 60


def test_labels_change_nothing_for_the_routers(ids):
    prompt_masked = ids.clone()
    prompt_masked[:, :10] = -100
    model = build()
    assert torch.equal(model(ids, labels=ids).aux_loss, model(ids, labels=prompt_masked).aux_loss)


def test_sample_topk_acts_in_training_only(ids):
    model = build(sample_topk=1)
    assert torch.equal(model.eval()(ids).logits, build().eval()(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_selection_bias_moves_towards_idle_experts(ids):
    model = build(use_selection_bias=True, selection_bias_update_rate=0.5, num_experts_per_tok=1)
    out = model(ids, labels=ids)
    model.update_selection_bias(out.tokens_per_expert, out.attn_tokens_per_expert)
    layer = model.model.layers[0]
    for load, gate in (
        (out.tokens_per_expert[0], layer.mlp.gate),
        (out.attn_tokens_per_expert[0], layer.self_attn.gate),
    ):
        assert torch.equal(gate.selection_bias, 0.5 * (load.mean() - load).sign())
    assert model.bfloat16().model.layers[0].mlp.gate.selection_bias.dtype == torch.float32
    with pytest.raises(ValueError, match="use_selection_bias=False"):
        build().update_selection_bias(out.tokens_per_expert, out.attn_tokens_per_expert)


def test_resizing_embeddings(ids):
    model = build(tie_word_embeddings=True)
    before = model(ids).logits
    model.resize_token_embeddings(110)
    after = model(ids).logits
    assert after.shape[-1] == 110
    torch.testing.assert_close(after[..., :97], before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_classifier_reads_the_last_real_token_on_both_sides(ids):
    torch.manual_seed(0)
    config = ModMoEConfig(**TINY, num_labels=3, pad_token_id=0)
    model = ModMoEForSequenceClassification(config).eval()
    ids = ids.clamp(min=1)
    alone = model(ids[:1, 6:]).logits
    left, right = torch.zeros_like(ids[:1]), torch.zeros_like(ids[:1])
    left[:, 6:], right[:, :14] = ids[:1, 6:], ids[:1, 6:]
    for padded in (left, right):
        torch.testing.assert_close(model(padded, attention_mask=(padded != 0).long()).logits, alone, **TOLERANCE)
        torch.testing.assert_close(model(padded).logits, alone, **TOLERANCE)  # by pad_token_id
    out = model(left, attention_mask=(left != 0).long(), labels=torch.tensor([2]))
    torch.testing.assert_close(out.loss, out.cross_entropy + config.router_aux_loss_coef * out.aux_loss)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("gated", [True, False])
def test_experts_of_transformers_agree_with_ours(ids, implementation, gated):
    model = build(gated_ffn=gated, hidden_act="silu").eval()
    assert model.config._experts_implementation == "modmoe"
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    ours = model(ids, attention_mask=mask).logits
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, ours, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 1, "num_attn_experts": 1}, {"num_shared_experts": 1}], ids=str
)
def test_offloaded_weights_give_the_same_logits(ids, changes):
    accelerate = pytest.importorskip("accelerate")
    expected = build(**changes).eval()(ids).logits
    model = accelerate.cpu_offload(build(**changes).eval(), execution_device="cpu")
    torch.testing.assert_close(model(ids).logits, expected)


@torch.no_grad()
def test_settings_reach_the_layers(ids):
    layer = build(attend_current=False).model.layers[0]
    x = torch.randn(1, 1, 32)
    assert not layer.self_attn(x, AttentionInputs())[0].any()  # a first token that sees nothing
    assert build().model.layers[0].self_attn(x, AttentionInputs())[0].any()
    model = build(attention_type="softmax", attention_dropout=0.5).train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for std in (0.02, 0.3):
        experts = build(initializer_range=std).model.layers[0].mlp.experts
        assert experts.gate_up_proj.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("labels", ["causal", "class"])
def test_the_trainer_accumulates_without_changing_the_scale(tmp_path, ids, labels):
    """transformers' own Trainer: the step's gradient is the same for one batch of three and three of one."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    options = {"router_aux_loss_type": "none", "router_z_loss_weight": 1.0, "router_aux_loss_coef": 1.0}
    norms = []
    for batch, accumulation in ((3, 1), (1, 3)):
        model = build(**options, pad_token_id=0)
        if labels == "class":
            torch.manual_seed(0)
            model = ModMoEForSequenceClassification(model.config)
        rows = [{"input_ids": row, "labels": row if labels == "causal" else torch.tensor(1)} for row in ids]
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=1e9,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_a_step_without_labels_has_loss_zero(ids, count):
    model = build().train()
    nothing = torch.full_like(ids, -100)
    out = model(ids, labels=nothing, num_items_in_batch=count)
    assert out.cross_entropy == 0
    assert out.loss == 0  # router losses are weighted by the share of the labels
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    padding = torch.zeros_like(ids)
    assert model(ids, padding, labels=nothing, num_items_in_batch=count, num_tokens_in_batch=count).loss == 0


def test_global_batch_without_statistics_is_an_error(ids):
    model = build(aux_scope="global_batch").train()
    with pytest.raises(ValueError, match="needs router_statistics of the whole step.*aux_scope='micro_step'"):
        model(ids, labels=ids, num_items_in_batch=57)
    model(ids, labels=ids)  # a forward that is its own step needs none


def test_bad_inputs_are_named(ids):
    model = build().eval()
    with pytest.raises(ValueError, match=r"input_ids hold 97, outside the vocabulary 0..96"):
        model(ids.clone().fill_(97))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1\).*\(3, 20\)"):
        model(ids, attention_mask=torch.ones(3, 1))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="StaticCache has room for 8 tokens, and is given 20 after 0"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(ValueError, match="no tokens"):
        model(ids[:, :0])
    bidirectional = build(attention_type="softmax", is_causal=False).eval()
    with pytest.raises(ValueError, match="bidirectional model .* cannot continue from a cache"):
        bidirectional(ids, past_key_values=bidirectional(ids, use_cache=True).past_key_values)
    softmax = build(attention_type="softmax").eval()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 1\)"):
        softmax(ids, attention_mask=torch.ones(3, 1))
    with pytest.raises(ValueError, match="attn_implementation='sdpa' computes softmax attention"):
        model.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["modmoe", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_biases_of_experts_count_in_every_implementation(ids, implementation, gated):
    model = build(ffn_bias=True, gated_ffn=gated).eval()
    biases = [p for n, p in model.named_parameters() if n.endswith("_bias")]
    assert len(biases) == 2 * TINY["num_hidden_layers"]
    without = model(ids).logits
    for bias in biases:
        bias.normal_()
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    assert (expected - without).abs().max() > 0.1
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)


def test_learned_positions_end_where_their_table_does():
    model = build(attention_type="softmax", position_embedding="learned", max_position_embeddings=8).eval()
    ids = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match="position 8 lies beyond the 8 learned positions"):
        model(ids)
    assert not torch.equal(*model(ids[:, :8]).logits[0, :2])
