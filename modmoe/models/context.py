"""What all layers of a forward pass share: which keys exist, where documents begin, and checks of the inputs.

Letters: B batch, T new tokens, S keys (cached ones included), H hidden size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from modmoe.layers.stickbreaking import StickbreakingMask
from modmoe.models.configuration_modmoe import ModMoEConfig


def document_starts(position_ids: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """
    Index of the first token of each token's own document, from positions that restart in packed documents.

    Args:
        position_ids: (B, T); a document begins wherever a position does not exceed that of the real token before it.
        real: (B, T) bool, False for padding, whose positions mean nothing; None is all real.

    Returns:
        (B, T) int64.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    if real is None:
        before = index - 1
    else:
        last_real = torch.where(real, index, -1).cummax(-1).values
        before = nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    begins = (before < 0) | (position_ids <= position_ids.gather(1, before.clamp(min=0)))
    if real is not None:
        begins &= real
    return torch.where(begins, index, 0).cummax(-1).values


class AttentionInputs(NamedTuple):
    """What every attention layer of one forward pass shares."""

    attention_mask: Any = None
    """`StickbreakingMask`, or what the chosen softmax implementation takes."""
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    """cos and sin of RoPE; None without."""
    arguments: dict[str, Any] = {}
    """Further keyword arguments of the attention function, softmax."""


def attention_inputs(
    config: ModMoEConfig,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    rotary_emb: nn.Module | None,
) -> AttentionInputs:
    """
    Args:
        embeds: (B, T, H).
        attention_mask: (B, S), 0 for padding; softmax also takes a prepared 4-D mask, and so does stick-breaking
            attention of one token to a static cache (`slot_mask`).
        position_ids: (B, T) or (1, T).
        cache: of the tokens before these.
        rotary_emb: RoPE, softmax without learned positions.

    Raises:
        ValueError: inputs that contradict each other or the config.
        RuntimeError: a gradient wanted of stick-breaking attention to a static cache.
    """
    batch, length = embeds.shape[:2]
    seen = tokens_seen(cache)
    check_context(config, attention_mask, batch, length, seen, cache)
    room = slots(cache)
    if (
        room is not None
        and config.attention_type == "stickbreaking"
        and torch.is_grad_enabled()
        and embeds.requires_grad
    ):
        raise RuntimeError(
            f"attention to a {type(cache).__name__} has no gradient: call the model under torch.no_grad()"
        )
    starts = None
    if position_ids is not None and length > 1 and _may_be_empty(seen, config):
        real = attention_mask.bool() if attention_mask is not None and attention_mask.ndim == 2 else None
        starts = document_starts(position_ids.expand(batch, -1), real)
        if isinstance(seen, torch.Tensor):
            starts = torch.where(seen == 0, starts, 0)
    if config.attention_type == "stickbreaking":
        mask = StickbreakingMask(None if attention_mask is None else attention_mask.bool(), starts)
        return AttentionInputs(mask if room is None else _of_slots(mask, room, embeds, seen))
    if position_ids is None:
        position_ids = next_positions(embeds, cache)
    arguments: dict[str, Any] = {"position_ids": position_ids}
    # Flash attention takes no matrix: it is told the lengths of documents.
    flash = "flash" in str(config._attn_implementation)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        and_mask_function=None if starts is None or flash else same_document(starts),
    )
    if starts is not None and flash:
        arguments |= flash_documents(starts, mask)
    embeddings = None if rotary_emb is None else rotary_emb(embeds, position_ids=position_ids)
    return AttentionInputs(mask, embeddings, arguments)


def slots(cache: Cache | None) -> int | None:
    """How many tokens a static cache has room for; None for a cache that grows, and for none."""
    return cache.get_mask_sizes(1, 0)[0] if cache is not None and cache.is_compileable else None


def tokens_seen(cache: Cache | None) -> int | torch.Tensor:
    """Tokens in the cache; a 0-dim tensor where a static cache is read by code that is being compiled."""
    seen = 0 if cache is None else cache.get_seq_length()
    return seen if torch.compiler.is_compiling() else int(seen)


def _may_be_empty(seen: int | torch.Tensor, config: ModMoEConfig) -> bool:
    """Compiled code asks only for softmax, whose masks for an empty cache are others; its graph breaks there."""
    return bool(seen == 0) if config.attention_type == "softmax" or isinstance(seen, int) else True


def _of_slots(mask: StickbreakingMask, room: int, embeds: torch.Tensor, seen: int | torch.Tensor) -> StickbreakingMask:
    """The mask (B, S) of the tokens so far, or a `slot_mask`, for all slots of a static cache."""
    batch, length = embeds.shape[:2]
    key_mask = mask.key_mask
    if key_mask is not None:
        key_mask = key_mask[:, 0, 0] if key_mask.ndim == 4 else _for_slots(key_mask, room)
    lengths = torch.zeros(batch, dtype=torch.int64, device=embeds.device) + (seen + length)
    return mask._replace(key_mask=key_mask, lengths=lengths)


def slot_mask(attention_mask: torch.Tensor | None, embeds: torch.Tensor, cache: Cache) -> torch.Tensor | None:
    """
    For `generate` with a static cache: the mask of one token in a shape that does not change from token to token.

    Args:
        attention_mask: (B, S), 0 for padding; None is all real.
        embeds: (B, T, any), of which only shape and device count.
        cache: a static one.

    Returns:
        (B, 1, 1, slots) bool for one token; else `attention_mask`.
    """
    room, (batch, length) = slots(cache), embeds.shape[:2]
    if room is None or length > 1:
        return attention_mask
    if attention_mask is None:
        return torch.ones(batch, 1, 1, room, dtype=torch.bool, device=embeds.device)
    return _for_slots(attention_mask.bool(), room)[:, None, None]


def _for_slots(mask: torch.Tensor, room: int) -> torch.Tensor:
    return nn.functional.pad(mask, (0, room - mask.shape[1]), value=False)


def next_positions(embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor:
    """(1, T): positions that go on from the cache, for new tokens (B, T, H)."""
    return (torch.arange(embeds.shape[1], device=embeds.device) + tokens_seen(cache))[None]


def flash_documents(starts: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    """
    Packed documents as flash attention takes them. Reads from the device how many there are.

    transformers finds documents in `position_ids` by itself, but in a batch of one row alone.

    Args:
        starts: (B, T), from `document_starts`.
        mask: (B, T) bool, False for padding; None is all real.

    Raises:
        ValueError: packing and padding at once.
    """
    begins = starts == torch.arange(starts.shape[1], device=starts.device)
    if mask is not None:
        if (begins & mask & (mask.cumsum(-1) > 1)).any():
            raise ValueError(
                "flash attention cannot read packed documents and padding from one batch: leave the padding out, or "
                "set attn_implementation='sdpa'"
            )
        return {}
    bounds = nn.functional.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=begins.numel())
    longest = int(bounds.diff().max())
    bounds = bounds.to(torch.int32)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def same_document(starts: torch.Tensor) -> Callable:
    """Mask function of transformers: a query sees the keys whose document starts where its own does."""
    last = starts.shape[1] - 1

    def same(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        # A static cache has slots for later keys, which causal queries do not see.
        return starts[batch_idx, q_idx] == starts[batch_idx, kv_idx.clamp(max=last)]

    return same


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """On the CPU, where looking is free; elsewhere the embedding's own device assertion stands."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or input_ids.numel() == 0:
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids hold {wrong}, outside the vocabulary 0..{vocab_size - 1}: wrong tokenizer?")


def check_positions(position_ids: torch.Tensor, count: int) -> None:
    """Of learned positions, as `check_token_ids` of tokens."""
    if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    last = int(position_ids.max())
    if last >= count:
        raise ValueError(
            f"position {last} lies beyond the {count} learned positions (max_position_embeddings): shorten the text"
        )


def check_context(
    config: ModMoEConfig,
    attention_mask: torch.Tensor | None,
    batch: int,
    length: int,
    seen: int | torch.Tensor,
    cache: Cache | None,
) -> None:
    if length == 0:
        raise ValueError("input_ids hold no tokens (sequence length 0)")
    room = slots(cache)
    if room is not None:
        if not config.is_causal:
            raise ValueError(
                "a bidirectional model (is_causal=False) would see the unused slots of a "
                f"{type(cache).__name__}: give all tokens at once, without a cache"
            )
        if not isinstance(seen, torch.Tensor) and seen + length > room:
            raise ValueError(
                f"the {type(cache).__name__} has room for {room} tokens, and is given {length} after {seen}: make it "
                "larger (max_cache_len)"
            )
        if config.attention_type == "softmax":
            return  # masks may be as wide as the cache
        if attention_mask is not None and attention_mask.shape == (batch, 1, 1, room) and length == 1:
            if attention_mask.dtype != torch.bool:
                raise TypeError(f"the mask of a static cache's slots must be bool, got {attention_mask.dtype}")
            return
    if not config.is_causal and seen:
        raise ValueError(
            "a bidirectional model (is_causal=False) cannot continue from a cache: give all tokens at once"
        )
    if attention_mask is None or (attention_mask.ndim != 2 and config.attention_type == "softmax"):
        return
    columns: int | str
    if isinstance(seen, torch.Tensor):  # compiled code cannot ask how many there are
        assert room is not None
        fits = attention_mask.ndim == 2 and length <= attention_mask.shape[1] <= room
        columns = attention_mask.shape[1] if fits else f"{length} to {room}"
    else:
        columns = seen + length
    wanted = (batch, columns)
    if attention_mask.shape != wanted:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and must have {wanted}: one entry for each "
            "token, cached ones included"
        )
