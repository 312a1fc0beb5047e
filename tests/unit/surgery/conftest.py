"""Tiny dense models of each family, and how to compare with them in float64; tiny modular ones on the disk."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from modmoe import ModMoEForCausalLM

from ..models.conftest import build

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DENSE = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama, tied, RoPE of llama3": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama, biases, yarn": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters=YARN),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=64, head_dim=6),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=10, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, initializer_range=0.3
    ),
}


def dense_model(kind: str) -> PreTrainedModel:
    """Random, with biases and norms that are not the usual zeros and ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DENSE[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=DENSE)
def kind(request) -> str:
    return request.param


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def wide_norms(monkeypatch) -> None:
    """transformers' RMSNorms compute in float32 whatever their input, which would hide the last nine digits."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture
def saved(tmp_path):
    """Save a small model, with files that other programs keep beside it; returns the directory."""

    def save(name="base", dtype=torch.float32, **changes):
        build(**changes).to(dtype).save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "optimizer.pt").write_text("")
        return tmp_path / name

    return save


@torch.no_grad()
def logits(directory, ids, **options):
    return ModMoEForCausalLM.from_pretrained(directory, dtype="auto", **options).eval()(ids).logits
