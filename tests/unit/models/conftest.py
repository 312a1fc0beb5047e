import pytest
import torch

from modmoe import ModMoEConfig, ModMoEForCausalLM

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_attn_experts": 4,
    "num_attn_experts_per_tok": 2,
    "intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "router_hidden_size": 16,
    "initializer_range": 0.3,
}

# Every switch of the architecture is on in some variant.
VARIANTS = {
    "default": {},
    "linear-router": {"router_type": "linear", "norm_topk_prob": True},
    "gmm-router": {"router_type": "gmm"},
    "molm": {"gated_ffn": False, "hidden_act": "gelu_new", "norm_type": "layernorm", "key_value_bias": True},
    "shared-experts": {"num_shared_experts": 2},
    "softmax": {"attention_type": "softmax"},
    "strict": {"attend_current": False},
    "dense": {"num_experts": 1, "num_attn_experts": 1},
    "dense-attention": {"num_attn_experts": 1, "attention_type": "softmax"},
    "per-layer": {"num_experts": [3, 6], "num_attn_experts": [1, 4], "num_experts_per_tok": [1, 3]},
    "biases": {"query_bias": True, "key_value_bias": True, "attention_output_bias": True, "ffn_bias": True},
    "gpt2": {
        "attention_type": "softmax",
        "position_embedding": "learned",
        "max_position_embeddings": 64,
        "gated_ffn": False,
        "ffn_bias": True,
        "norm_type": "layernorm",
    },
    "qk-norm": {"qk_norm": True, "unit_gates": True},
    "pruned": {"num_pruned_experts": 2, "num_pruned_attn_experts": [0, 1]},
    "tied": {"tie_word_embeddings": True},
    "selection-bias": {
        "use_selection_bias": True,
        "router_aux_loss_type": "none",
        "router_z_loss_weight": 1.0,
    },
}


def build(**changes) -> ModMoEForCausalLM:
    torch.manual_seed(0)
    return ModMoEForCausalLM(ModMoEConfig(**(TINY | changes)))


@pytest.fixture(params=VARIANTS)
def variant(request) -> dict:
    return VARIANTS[request.param]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
