"""Outputs of the models: those of transformers, and what routers add."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


@dataclass
class ModMoEModelOutputWithPast(MoeModelOutputWithPast):
    """
    Output of `ModMoEModel`; the fields of `MoeModelOutputWithPast` and what follows.

    `attentions` are (B, heads, T, S) with heads key/value-major, then expert slot. Router tensors come one per layer
    that has such a router, if asked for; `router_logits` (N, E) fp32 are those of the FFN routers.

    Args:
        attn_router_logits: of the attention routers, (N, E) fp32.
        router_indices: choices of the FFN routers, (N, K) int64; E for a token that is not routed.
        attn_router_indices: choices of the attention routers.
        extension_router_logits: of each extension with routers of its own, by name, (N, 1 + E) fp32: its FFN routers,
            then its attention routers, layer by layer. The null choice is the first.
        extension_router_indices: their choices, (N, K) int64; E for a slot that has no expert. "common" extensions
            come after the model's own experts in the tensors above.
    """

    attn_router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None
    attn_router_indices: tuple[torch.Tensor, ...] | None = None
    extension_router_logits: dict[str, tuple[torch.Tensor, ...]] | None = None
    extension_router_indices: dict[str, tuple[torch.Tensor, ...]] | None = None


@dataclass
class ModMoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """
    Output of the models with a head; the fields of `MoeCausalLMOutputWithPast`, the router tensors of
    `ModMoEModelOutputWithPast` and what follows.

    `loss` is cross entropy + `router_aux_loss_coef` * router losses: this forward's share of the step's loss.
    `aux_loss` is the unscaled router loss over the tokens of this micro-step, in training on all ranks (or of
    the whole step, with `router_statistics`), reduced over routers.

    Args:
        cross_entropy: the first term of `loss`, with its gradient: who trains on something else too can weigh it anew.
        aux_losses: the losses that `aux_loss` is made of by name, detached.
        tokens_per_expert: per FFN router (E,) fp32, how many local tokens chose each expert.
        attn_tokens_per_expert: the same for attention routers.
        extension_tokens_per_expert: the same by name for the routers of extensions, in the order of their logits.
        extension_users: of these routers, each (2,) fp32: how many local tokens use one of its experts at least, and
            how many there are.
    """

    attn_router_logits: tuple[torch.Tensor, ...] | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None
    attn_router_indices: tuple[torch.Tensor, ...] | None = None
    extension_router_logits: dict[str, tuple[torch.Tensor, ...]] | None = None
    extension_router_indices: dict[str, tuple[torch.Tensor, ...]] | None = None
    cross_entropy: torch.Tensor | None = None
    aux_losses: dict[str, torch.Tensor] | None = None
    tokens_per_expert: tuple[torch.Tensor, ...] | None = None
    attn_tokens_per_expert: tuple[torch.Tensor, ...] | None = None
    extension_tokens_per_expert: dict[str, tuple[torch.Tensor, ...]] | None = None
    extension_users: dict[str, tuple[torch.Tensor, ...]] | None = None
