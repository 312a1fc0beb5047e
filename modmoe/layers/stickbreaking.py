"""Stick-breaking attention behind transformers' attention interface: `attn_implementation="stickbreaking"`.

Letters: B batch, T queries, S keys (cached ones included), D head dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from modmoe.ops import stickbreaking_attention

NAME = "stickbreaking"

# Arguments of other attention functions that change what is computed.
_FOREIGN_ARGUMENTS = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


class StickbreakingMask(NamedTuple):
    """What a stick-breaking attention layer gets as `attention_mask`: never a T x S matrix."""

    key_mask: Tensor | None = None
    """(B, S) bool, keys that exist; None is all."""
    document_start: Tensor | None = None
    """(B, T) int64, first key that each query may see; None is the first of all."""
    lengths: Tensor | None = None
    """(B,) int64, keys of each sequence where the cache has room for more, as `StaticCache` has; None is S."""


def stickbreaking_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StickbreakingMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    `modmoe.ops.stickbreaking_attention` with the signature of transformers' attention functions.

    Args:
        module: the attention layer; its `config` must say `attention_type="stickbreaking"`, and may say
            `attend_current` (default True).
        query: (B, Hq, T, D).
        key, value: (B, Hkv, S, D), Hq a multiple of Hkv.
        attention_mask: from `stickbreaking_mask`, or None.
        scaling: factor of q . k, default D ** -0.5.
        dropout: must be 0.
        kwargs: `output_attentions`; arguments that mean nothing here (such as `position_ids`) are ignored.

    Returns:
        out (B, T, Hq, D), and the weights (B, Hq, T, S) if `output_attentions` asks for them, else None.

    Raises:
        ValueError: a config that does not declare stick-breaking attention, or an argument that cannot be honoured.
    """
    config: Any = module.config
    check_declared(config)
    _check_arguments(module, attention_mask, dropout, kwargs)
    mask = StickbreakingMask() if attention_mask is None else attention_mask
    want_weights = bool(kwargs.get("output_attentions", config.output_attentions))
    out, _, *weights = stickbreaking_attention(
        query,
        key,
        value,
        scale=scaling,
        attend_current=getattr(config, "attend_current", True),
        key_mask=mask.key_mask,
        document_start=mask.document_start,
        lengths=mask.lengths,
        return_weights=want_weights,
        # The only one that has weights, whichever is chosen for the rest.
        backend="reference" if want_weights else None,
    )
    # Contiguous like the results of the other attention functions: some models take a view of it.
    return out.transpose(1, 2).contiguous(), weights[0] if weights else None


def stickbreaking_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    *,
    config: PreTrainedConfig,
    **kwargs: Any,
) -> StickbreakingMask:
    """
    The mask of `stickbreaking_attention_forward`, with the signature of transformers' mask functions.

    Causal masks, padding (`attention_mask` (B, S) bool, False for keys that do not exist) and packed documents are
    honoured.

    Raises:
        ValueError: a config that does not declare stick-breaking attention, a sliding window, a mask function of the
            model's own, a mask that looks ahead, or a cache with slots that hold nothing.
    """
    check_declared(config)
    if local_size is not None:
        raise ValueError(f"stick-breaking attention has no sliding window, got a window of {local_size} keys")
    if use_vmap:
        raise ValueError("stick-breaking attention is causal and cannot honour or_mask_function or and_mask_function")
    if kv_offset or kv_length != q_offset + q_length:
        raise ValueError(
            f"in other models than ModMoE, stick-breaking attention cannot use a cache with unused slots: got "
            f"{kv_length} slots for {q_offset} cached and {q_length} new tokens; use DynamicCache"
        )
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and must have {(batch_size, kv_length)}"
        )
    if mask_function is causal_mask_function:
        return StickbreakingMask(attention_mask)
    if kv_length != q_length:
        raise ValueError("packed documents need an empty cache: stick-breaking attention can continue one document")
    return StickbreakingMask(attention_mask, _document_starts(mask_function, batch_size, q_length, device))


def check_declared(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: unless `config` says that its model was made for stick-breaking attention.
    """
    declared = getattr(config, "attention_type", None)
    if declared != NAME:
        raise ValueError(
            f"attn_implementation={NAME!r} on a {config.model_type!r} model whose config says "
            f"attention_type={declared!r}: weights made for softmax attention would silently be another model. Use "
            f"attn_implementation='sdpa', or set config.attention_type={NAME!r} on a model to be trained from scratch"
        )


def _check_arguments(module: nn.Module, attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None and not isinstance(attention_mask, StickbreakingMask):
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}; stick-breaking attention takes the "
            "StickbreakingMask that create_causal_mask makes of a (B, S) mask, and no prepared 4-D masks"
        )
    if dropout:
        raise ValueError(f"dropout={dropout}: stick-breaking attention has no dropout, set attention_dropout=0")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("is_causal=False: stick-breaking attention is causal by definition")
    for name in _FOREIGN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"stick-breaking attention cannot honour {name}={kwargs[name]!r}")


def _document_starts(mask_function: Callable, batch: int, length: int, device: torch.device | str) -> Tensor:
    """
    The first visible key of each query, (B, T) int64, of a mask that is known only as a function of index tensors.

    It is asked at O(T) places: a document begins where a query does not see the key before it. That every query sees
    its document from the first key to itself, and nothing beyond either end, is checked.
    """
    row = torch.arange(batch, device=device)[:, None]
    query = torch.arange(length, device=device)[None]
    head = torch.zeros((), dtype=torch.int64, device=device)

    def sees(key: Tensor) -> Tensor:
        exists = (key >= 0) & (key < length)
        return mask_function(row, head, query, key.clamp(0, length - 1)) & exists

    start = torch.where(sees(query - 1), 0, query).expand(batch, -1).cummax(-1).values
    as_documents = (sees(query) & sees(start) & ~sees(start - 1) & ~sees(query + 1)).all()
    message = "stick-breaking attention sees a whole document up to the query itself; this mask has another shape"
    if torch.compiler.is_compiling():
        torch._assert_async(as_documents, message)
    elif not as_documents:
        raise ValueError(message)
    return start


AttentionInterface.register(NAME, stickbreaking_attention_forward)
AttentionMaskInterface.register(NAME, stickbreaking_mask)
