"""Stick-breaking attention to a cache with room for tokens to come: as to one that grows, and compiled once."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from .conftest import build

ROOM = 32
EXTENSIONS = [
    {"name": "group", "num_experts": 3, "num_experts_per_tok": 2, "num_attn_experts": 2},
    {"name": "common", "num_experts": 1, "num_attn_experts": 2, "mode": "common"},
]
CASES = {"plain": {}, "strict": {"attend_current": False}, "extended": {"extensions": EXTENSIONS}}


def make(changes: dict):
    """A model whose routers of extensions read the document, which fresh ones do not."""
    model = build(**changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "context_weight" in name:
                parameter.normal_()
    return model


def padding(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return mask


def use_up(cache: StaticCache) -> None:
    """Leave other tokens in the slots that are free."""
    for layer in cache.layers:
        seen = int(layer.cumulative_length)
        layer.keys[:, :, seen:] = layer.values[:, :, seen:] = 100.0


def steps(model, ids: torch.Tensor, mask: torch.Tensor | None, cache, widths: list[int]) -> list[torch.Tensor]:
    logits, seen = [], 0
    for width in widths:
        end = seen + width
        step_mask = None if mask is None else mask[:, :end]
        output = model(ids[:, seen:end], attention_mask=step_mask, past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        if isinstance(cache, StaticCache):
            use_up(cache)
        seen = end
    return logits


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gives_the_logits_of_a_growing_cache(ids, case, padded):
    model = make(CASES[case])
    mask = padding(ids) if padded else None
    widths = [9, 1, 1, 5, 1, 3]
    growing = steps(model, ids, mask, DynamicCache(config=model.config), widths)
    static = steps(model, ids, mask, StaticCache(config=model.config, max_cache_len=ROOM), widths)
    for a, b in zip(static, growing, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_generates_the_same(ids, case, num_beams):
    model = make(CASES[case])
    options = {"attention_mask": padding(ids), "max_new_tokens": 6, "do_sample": False, "num_beams": num_beams}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(ids, **options)
    actual = model.generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert actual.sequences.equal(expected.sequences)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [*CASES.values(), {"attention_type": "softmax"}], ids=[*CASES, "softmax"])
def test_steps_are_compiled_once(ids, changes):
    """As one graph, which serves every step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(changes)
    options = {"attention_mask": padding(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = model.generate(ids, **options, cache_implementation="static", compile_config=compiling)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled.equal(expected)


@torch.no_grad()
def test_padded_and_other_texts_share_the_compiled_step(ids):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build().eval()
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "compile_config": compiling}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in (padding(ids), torch.ones_like(ids)):
            model.generate(ids, attention_mask=mask, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_packed_documents_fill_an_empty_cache(ids, case, compiled):
    torch._dynamo.reset()
    model = make(CASES[case])
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(3, -1)
    expected = model(ids, position_ids=positions).logits
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    model(ids, past_key_values=cache, use_cache=True)
    cache.reset()
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if compiled else model.forward
    packed = forward(ids, position_ids=positions, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(packed.logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_masks_that_do_not_fit_are_refused(ids):
    model = build().eval()
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    model(ids, past_key_values=cache, use_cache=True)
    step = {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True}
    with pytest.raises(TypeError, match="mask of a static cache's slots must be bool, got torch.float32"):
        model(attention_mask=torch.zeros(3, 1, 1, ROOM), **step)
    compiled = torch.compile(model.forward, backend="aot_eager")
    for shape in ((3, 1, 1, 20), (3, 40), (1, 21)):
        for forward in (model.forward, compiled):
            with pytest.raises(ValueError, match="attention_mask has shape"):
                forward(attention_mask=torch.ones(shape), **step)


def test_gradients_are_refused_before_the_cache_is_filled(ids):
    model = build().eval()
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with pytest.raises(RuntimeError, match="attention to a StaticCache has no gradient"):
        model(ids, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_room_is_checked(ids):
    model = build().eval()
    cache = StaticCache(config=model.config, max_cache_len=21)
    model(ids, past_key_values=cache, use_cache=True)
    model(ids[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="StaticCache has room for 21 tokens, and is given 1 after 21"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_a_mask_has_a_column_for_each_token(ids):
    model = build().eval()
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 32\) and must have \(3, 20\)"):
        model(ids, attention_mask=torch.ones(3, ROOM), past_key_values=cache, use_cache=True)
