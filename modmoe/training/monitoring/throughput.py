"""How much arithmetic a token costs, and what share of a device training uses."""

import re
from typing import cast

import torch

from modmoe.models import ModMoEConfig, ModMoEForCausalLM
from modmoe.parallel.layout import expert_slice

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "H200 NVL": 835.5,
    "H200": 989.5,
    "B200": 2250.0,
}
"""Part of a CUDA device's name -> dense bf16 TFLOP/s of its data sheet, half of the figure for sparse matrices."""


def parameter_counts(model: ModMoEForCausalLM) -> tuple[int, int]:
    """Parameters in all, and those that one token uses."""
    total = sum(_size(p) for p in model.parameters())
    idle = 0
    for experts, num_experts, active in model.pool_sizes():
        pool = sum(_size(p) for p in experts.parameters())
        idle += pool * (num_experts - active) // num_experts
    return total, total - idle


def trained_parameters(model: ModMoEForCausalLM) -> int:
    """Parameters that have a gradient."""
    return sum(_size(p) for p in model.parameters() if p.requires_grad)


def flops_per_token(model: ModMoEForCausalLM, sequence_length: int) -> float:
    """
    Floating-point operations of training on one token: the products with weights, forward and backward, and attention.

    6 per active parameter: a multiplication and an addition, forwards once and backwards twice. The embedding is
    looked up, so that only an output layer of its own or the tied one counts. Recomputation, norms and softmaxes do
    not count, as usual for MFU (arXiv:2204.02311, appendix B).
    """
    _, active = parameter_counts(model)
    if not model.config.tie_word_embeddings:
        active -= _size(model.get_input_embeddings().weight)
    return 6.0 * active + attention_flops_per_token(model.config, sequence_length)


def attention_flops_per_token(config: ModMoEConfig, sequence_length: int) -> float:
    """
    Of the products QK and AV, forward and backward, averaged over the positions of one causal sequence.

    Each of k experts' heads is a query head of its own over shared keys, and sees half of the sequence on average.
    Stick-breaking takes the same products as softmax; that it may stop early, and that packed documents are shorter
    than the sequence, is not deducted. In a softmax model extensions read documents by one more head for each kv head.
    """
    slots = sum(config.attn_experts_at(layer)[1] for layer in range(config.num_hidden_layers))
    groups = [e for e in config.extension_list() if e.num_attn_experts and e.mode == "group"]
    slots += config.num_hidden_layers * sum(extension.num_attn_experts_per_tok for extension in groups)
    heads = slots * config.num_attention_heads
    if config.attention_type == "softmax" and any(e.mode == "group" for e in config.extension_list()):
        heads += config.num_hidden_layers * cast(int, config.num_key_value_heads)
    assert config.head_dim is not None
    forward = 2 * 2 * heads * config.head_dim * (sequence_length / 2 if config.is_causal else sequence_length)
    return 3.0 * forward


def peak_tflops(device_name: str) -> float | None:
    """Of a CUDA device in bf16, None if its name is not in the table."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def _size(parameter: torch.nn.Parameter) -> int:
    # Under ZeRO-3 a parameter is a shard that knows its true size; a shard of experts knows how many there are.
    size = int(getattr(parameter, "ds_numel", parameter.numel()))
    part = expert_slice(parameter)
    return size if part is None else size // (part.stop - part.start) * part.num_experts
