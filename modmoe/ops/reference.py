"""Slow, obviously right PyTorch versions of the ops: the oracle for every other implementation.

They follow the formulas term by term and leave the gradients to autograd. Letters: B batch, T queries, S keys,
D head dim, N tokens, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import without_autocast


@without_autocast
def stickbreaking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    attend_current: bool,
    key_mask: Tensor | None,
    document_start: Tensor | None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, remainder, weights) from the whole (B, Hq, T, S) matrix of weights.

    `A = exp(logsigmoid(z) + suffix sum of logsigmoid(-z))`, arXiv:2410.17980. Shapes: `ops.stickbreaking_attention`.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    ends = torch.full((1, 1, 1, 1), num_keys, device=q.device) if lengths is None else lengths[:, None, None, None]
    query_index = ends - num_queries + torch.arange(num_queries, device=q.device)[:, None]
    key_index = torch.arange(num_keys, device=q.device)
    # Behind the end there may be anything, and 0 * nan is nan.
    keys, values = (x.to(work).repeat_interleave(groups, 1).masked_fill((key_index >= ends).mT, 0) for x in (k, v))
    z = q.to(work) @ keys.mT * scale

    visible = key_index <= query_index if attend_current else key_index < query_index
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if document_start is not None:
        visible = visible & (key_index >= document_start[:, None, :, None])

    log_rest = F.logsigmoid(-z).masked_fill(~visible, 0.0)
    suffix = log_rest.flip(-1).cumsum(-1).flip(-1)
    after = F.pad(suffix, (0, 1))[..., 1:]  # sum over l > j
    weights = torch.where(visible, (F.logsigmoid(z) + after).exp(), 0.0)
    remainder = log_rest.sum(-1).exp()
    return (weights @ values).to(q.dtype), remainder, weights


@without_autocast
def grouped_linear(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    gates: Tensor | None,
    top_k: int,
    source: str,
    target: str,
) -> Tensor:
    """Apply each expert to all rows and keep the rows that are its own. See `ops.grouped_linear`."""
    num_pairs, num_experts = order.numel(), weight.shape[0]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = {"token": order // top_k, "pair": order, "sorted": torch.arange(num_pairs, device=x.device)}[source]
    expert = torch.searchsorted(offsets, torch.arange(num_pairs, device=x.device), right=True)
    owned = F.one_hot(expert, num_experts + 1)[:, :num_experts].bool()  # rows past the last offset are nobody's

    every = torch.einsum("sh,eoh->seo", x[rows].to(work), weight.to(work))
    y = torch.where(owned[..., None], every, 0.0).sum(1)
    if gates is not None:
        y = y * gates.flatten()[order].to(work)[:, None]
    if target != "sorted":
        y = y[inverse]
    if target == "token":
        y = y.unflatten(0, (-1, top_k)).sum(1)
    return y.to(x.dtype)
