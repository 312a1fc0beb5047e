"""A dense Llama loads into the modular skeleton and gives Llama's logits."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modmoe.models.dense import from_dense

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "rope",
    [
        None,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=["default", "llama3"],
)
def test_logits_and_cache_are_llamas(attn_implementation, tied, rope):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=12,
            tie_word_embeddings=tied,
            rope_parameters=rope,
            attn_implementation=attn_implementation,
            initializer_range=0.2,
        )
    ).eval()
    model = from_dense(llama)
    model.set_attn_implementation(attn_implementation)
    ids = torch.randint(0, 97, (2, 24))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    ours, theirs = model(ids, attention_mask=mask), llama(ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=1e-5, atol=1e-5)
    generated = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (model, llama)]
    assert torch.equal(*generated)


def test_gradients_are_llamas():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, initializer_range=0.2))
    model = from_dense(llama).train()
    ids = torch.randint(0, 97, (2, 16))
    llama(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    ours = {k: v.grad for k, v in model.named_parameters()}
    q = llama.model.layers[1].self_attn.q_proj.weight.grad
    torch.testing.assert_close(ours["model.layers.1.self_attn.experts.q_proj.weight"][0], q, rtol=1e-4, atol=1e-6)
    gate, up = ours["model.layers.1.mlp.experts.gate_up_proj"][0].chunk(2)
    torch.testing.assert_close(gate, llama.model.layers[1].mlp.gate_proj.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(up, llama.model.layers[1].mlp.up_proj.weight.grad, rtol=1e-4, atol=1e-6)
