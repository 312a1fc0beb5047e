"""What a document has been about so far, for routers that have to know: those of extensions.

Letters: B batch, T new tokens, S keys (cached ones included), N = B * T, D head size.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from modmoe.layers.stickbreaking import StickbreakingMask
from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.context import AttentionInputs
from modmoe.ops.stickbreaking_torch import ending_together

_EPSILON = 1e-12  # of mean squares: the mean over a long document is small, and must not be taken for zero


class DocumentContext(nn.Module):
    """
    The mean of an attention layer's values over the keys that a token sees, scaled to a root mean square of 1.

    A token alone seldom tells which domain it is from, least of all in the first layers; its document does. The values
    are in the cache already, so that decoding keeps nothing more, and whatever becomes of the cache becomes of this.
    """

    def __init__(self, config: ModMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.is_causal
        self.num_key_value_groups = 1

    def forward(
        self, keys: torch.Tensor, values: torch.Tensor, length: int, inputs: AttentionInputs, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            keys, values: (B, kv heads, S, D).
            length: T; the new tokens are the last of S, but in caches with unused slots.
            inputs: of the attention layer.
            kwargs: further arguments of the attention function.

        Returns:
            (N, kv heads * D) fp32 or wider.
        """
        if self.config.attention_type == "stickbreaking":
            mean = running_mean(values, length, cast(StickbreakingMask, inputs.attention_mask))
        else:
            mean = self._uniform_attention(keys, values, length, inputs, **kwargs)
        mean = mean.flatten(0, 1).flatten(1)
        return F.rms_norm(mean.to(_wide(mean)), mean.shape[1:], eps=_EPSILON)

    def _uniform_attention(
        self, keys: torch.Tensor, values: torch.Tensor, length: int, inputs: AttentionInputs, **kwargs: Any
    ) -> torch.Tensor:
        """(B, T, kv heads, D): softmax attention of queries that are zero. It knows each implementation's masks."""
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        batch, heads, _, size = values.shape
        queries = values.new_zeros(batch, heads, length, size)
        arguments = {"scaling": 1.0, "dropout": 0.0} | inputs.arguments | kwargs
        return attend(self, queries, keys, values, inputs.attention_mask, **arguments)[0]


def running_mean(values: torch.Tensor, length: int, mask: StickbreakingMask) -> torch.Tensor:
    """
    Args:
        values: (B, heads, S, D).
        length: T, of the last keys.
        mask: keys that exist, where documents start, and where sequences end.

    Returns:
        (B, T, heads, D) fp32 or wider: the mean over the keys from each token's document start to the token itself;
        0 where there are none.
    """
    exists = mask.key_mask
    if exists is None and mask.lengths is None:
        exists = values.new_ones((), dtype=torch.bool).expand(len(values), values.shape[2])
    else:
        if mask.lengths is not None:
            (values,), exists = ending_together((values,), exists, mask.lengths)
        assert exists is not None
        values = values * exists[:, None, :, None].to(values.dtype)
    sums = _running_sum(values.transpose(1, 2), length)
    counts = _running_sum(exists[:, :, None, None].to(sums.dtype), length)
    if mask.document_start is not None:
        # Documents are packed only where nothing is cached: token t is key t.
        sums, counts = (x - _before(x, mask.document_start) for x in (sums, counts))
    return sums / counts.clamp(min=1)


def _running_sum(x: torch.Tensor, length: int) -> torch.Tensor:
    """(B, S, ...) -> (B, T, ...) fp32 or wider, for the last T. Cached values are not copied to be summed."""
    old, new = x.split([x.shape[1] - length, length], dim=1)
    return old.sum(1, keepdim=True, dtype=_wide(x)) + new.cumsum(1, dtype=_wide(x))


def _before(sums: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Running sums (B, T, ...) -> those just before `start` (B, T)."""
    shifted = F.pad(sums, (0, 0, 0, 0, 1, 0))
    return shifted.take_along_dim(start[:, :, None, None], dim=1)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
