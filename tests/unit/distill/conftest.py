"""Tiny teachers of every family, with random weights large enough to matter."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from modmoe import ModMoEConfig, ModMoEForCausalLM, ModMoEVisionConfig
from modmoe.distill.stages import CutModel, cut

VOCABULARY = 61
LABELS = 3
BLOCKS = 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 4}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **SLIDING, num_key_value_heads=1)),
    # Blocks of two kinds, which get different masks.
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, **SLIDING, num_key_value_heads=1, use_sliding_window=True, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8)),
    # Blocks that look at their index.
    "gpt2": lambda: gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt-neo": lambda: gpt_neo(),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "modmoe": lambda: ModMoEForCausalLM(ModMoEConfig(**SIZES, num_experts=1, num_attn_experts=1)),
    # Blocks of different numbers of experts.
    "modmoe-per-layer": lambda: ModMoEForCausalLM(
        ModMoEConfig(**SIZES, num_experts=[1, 2, 3, 4, 5], num_attn_experts=1, num_experts_per_tok=1)
    ),
}
STUDENT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_attn_experts": 2,
    "num_attn_experts_per_tok": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "intermediate_size": 8,
    "router_hidden_size": 8,
    "initializer_range": 0.2,
}


def gpt_neo() -> PreTrainedModel:
    """Its blocks attend globally or locally by their index."""
    kinds = [[["global", "local"], 2], [["global"], 1]]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": BLOCKS, "num_heads": 2, "window_size": 4}
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=kinds, initializer_range=0.2))


def gpt2(**changes) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": BLOCKS, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, **changes)).eval()


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def vit() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": LABELS}
    config = ViTConfig(**sizes, initializer_range=0.2)
    return ViTForImageClassification(config).eval()


def student_config(**changes) -> ModMoEConfig:
    return ModMoEConfig(**(STUDENT | changes))


def vision_config(**changes) -> ModMoEVisionConfig:
    """A student of the `vit`."""
    fields = {name: value for name, value in STUDENT.items() if name != "vocab_size"}
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": LABELS}
    return ModMoEVisionConfig(**(fields | sizes | changes))


def pictures(rows: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, (rows,), generator=generator)
    return {"pixel_values": torch.randn(rows, 1, 8, 8, generator=generator), "labels": labels}


def text(rows: int = 2, length: int = 10, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def teacher() -> CutModel:
    return cut(build("llama"), [(0, 1), (1, 4), (4, 5)])
