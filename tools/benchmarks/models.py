"""Whole models: ModMoE with MoLM's architecture beside HF JetMoE and HF Llama of the same active size, on the CPU.

Their float64 references are the models themselves in float64, as far as their own code stays in it: HF's norms and
rotary embeddings compute in float32 whatever the model is in. In bf16 their errors are those of routers that choose
otherwise, more than those of products.
"""

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from benchmarks.workload import Contender, Run, Workload
from modmoe import ModMoEConfig, ModMoEForCausalLM

PRESET = Path(__file__).parents[2] / "configs" / "model" / "molm_tiny.yaml"
OURS = "ModMoE"
NAMES = (OURS, "HF JetMoE, eager", "HF JetMoE, sdpa", "HF Llama")
COMPILED = (OURS, "HF Llama")  # also decode with compiled steps
DECODE_STEPS = 16
VOCABULARY, LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4096, 4, 8, 4, 64, 256


@functools.cache
def build_models() -> dict[str, PreTrainedModel]:
    """Per block and token, all of them multiply by 0.39 M attention and 0.52 M FFN weights."""
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
    }
    jetmoe = {
        **common,
        "kv_channels": HEAD_DIM,
        "num_local_experts": 24,  # one number for both sides; 24 + 24 is as many experts as our 16 + 32
        "num_experts_per_tok": 2,
        "intermediate_size": 344,  # three matrices where MoLM has two
        "output_router_logits": True,
        "tie_word_embeddings": False,
    }
    llama = LlamaConfig(**common, num_attention_heads=QUERY_HEADS, head_dim=HEAD_DIM, intermediate_size=688)
    models = (
        ModMoEForCausalLM(ModMoEConfig(**yaml.safe_load(PRESET.read_text()))),
        JetMoeForCausalLM(JetMoeConfig(**jetmoe, attn_implementation="eager")),
        JetMoeForCausalLM(JetMoeConfig(**jetmoe, attn_implementation="sdpa")),
        LlamaForCausalLM(llama),
    )
    return dict(zip(NAMES, models, strict=True))


def training(length: int, bf16: bool) -> Workload:
    """Forward and backward of one row of `length` tokens; `bf16` is autocast."""
    return Workload(
        name=f"model training, T {length}",
        draw=lambda: torch.randint(VOCABULARY, (1, length)),
        contenders=[_contender(name, _training_step(name, bf16), _exact_training_step(name)) for name in NAMES],
        tokens=length,
        flops=length * _flops_per_token(length / 2) * 3,
        bytes=3 * _ours_parameters() * _itemsize(bf16),
        whole_model=True,
    )


def decoding(cache: int, bf16: bool) -> Workload:
    """`DECODE_STEPS` steps of one token on a cache of `cache` tokens, which is the same in all rounds."""
    prompt = torch.randint(VOCABULARY, (1, cache), generator=torch.Generator().manual_seed(0))
    cached = LAYERS * 2 * KV_HEADS * HEAD_DIM * cache
    contenders = [_contender(name, _Decoding(name, prompt, bf16), _exact_decoding(name, prompt)) for name in NAMES]
    contenders += [
        _contender(f"{name}, compiled", _CompiledDecoding(name, prompt, bf16), _exact_decoding(name, prompt))
        for name in COMPILED
    ]
    return Workload(
        name=f"model decoding, cache {cache}",
        draw=lambda: torch.randint(VOCABULARY, (1, DECODE_STEPS)),
        contenders=contenders,
        tokens=DECODE_STEPS,
        flops=DECODE_STEPS * _flops_per_token(cache),
        bytes=DECODE_STEPS * (_active_weights() + cached) * _itemsize(bf16),
        whole_model=True,
    )


def _contender(name: str, run: Run, reference: Run) -> Contender:
    return Contender(name, run, reference, "ours" if name.startswith(OURS) else "peer")


def _training_step(name: str, bf16: bool) -> Run:
    return lambda ids: train_step(build_models()[name].train(), ids, bf16)


def _exact_training_step(name: str) -> Run:
    return lambda ids: train_step(_in_float64(name).train(), ids, bf16=False)


def train_step(model: PreTrainedModel, ids: Tensor, bf16: bool) -> dict[str, Tensor]:
    """The loss, and the gradient that has come through the whole model."""
    with _autocast(bf16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "embedding gradient": gradient}


class _Decoding:
    """Keeps the cache of the prompt between runs; it is filled by the first."""

    def __init__(self, name: str, prompt: Tensor, bf16: bool) -> None:
        self.name = name
        self.prompt = prompt
        self.bf16 = bf16

    @functools.cached_property
    def cache(self) -> DynamicCache:
        return fill_cache(build_models()[self.name].eval(), self.prompt, self.bf16)

    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        return decode(build_models()[self.name].eval(), self.cache, ids, self.bf16)


class _CompiledDecoding(_Decoding):
    """With a static cache, into which the steps just fit, and with steps compiled as one graph."""

    @functools.cached_property
    def cache(self) -> StaticCache:
        model = build_models()[self.name].eval()
        cache = StaticCache(config=model.config, max_cache_len=self.prompt.shape[1] + DECODE_STEPS)
        prefill(model, cache, self.prompt, self.bf16)
        return cache

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        return torch.compile(build_models()[self.name].eval().forward, fullgraph=True)

    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        logits = steps(self.step, self.cache, ids, self.bf16)
        for layer in self.cache.layers:  # a static cache cannot be cropped
            layer.cumulative_length.sub_(ids.shape[1])
        return {"logits": logits}


def _exact_decoding(name: str, prompt: Tensor) -> Run:
    def run(ids: Tensor) -> dict[str, Tensor]:
        model = _in_float64(name).eval()
        return decode(model, fill_cache(model, prompt, bf16=False), ids, bf16=False)

    return run


def fill_cache(model: PreTrainedModel, prompt: Tensor, bf16: bool) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    prefill(model, cache, prompt, bf16)
    return cache


def prefill(model: PreTrainedModel, cache: Cache, prompt: Tensor, bf16: bool) -> None:
    with torch.no_grad(), _autocast(bf16):
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)


def decode(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, bf16: bool) -> dict[str, Tensor]:
    """One step for each column of `ids`; the cache is as before afterwards."""
    logits = steps(model, cache, ids, bf16)
    cache.crop(-ids.shape[1])
    return {"logits": logits}


def steps(forward: Callable[..., Any], cache: Cache, ids: Tensor, bf16: bool) -> Tensor:
    """The logits of the last one."""
    with torch.no_grad(), _autocast(bf16):
        for i in range(ids.shape[1]):
            logits: Tensor = forward(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
    return logits


def _in_float64(name: str) -> PreTrainedModel:
    return copy.deepcopy(build_models()[name]).double()


def _autocast(bf16: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


# Work, as it is for ModMoE.


def _ours_parameters() -> int:
    return sum(p.numel() for p in _ours_on_meta().parameters())


@functools.cache
def _ours_on_meta() -> ModMoEForCausalLM:
    with torch.device("meta"):
        return ModMoEForCausalLM(ModMoEConfig(**yaml.safe_load(PRESET.read_text())))


def _active_weights() -> int:
    """Of blocks and output layer, those that one token is multiplied by."""
    return _ours_on_meta().num_active_parameters() + VOCABULARY * HIDDEN


def _flops_per_token(keys: float) -> float:
    """Of forward, for a token that sees so many keys."""
    return 2 * _active_weights() + LAYERS * 2 * 2 * QUERY_HEADS * HEAD_DIM * keys


def _itemsize(bf16: bool) -> int:
    return 2 if bf16 else 4
