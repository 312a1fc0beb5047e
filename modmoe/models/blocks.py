"""Pre-norm blocks whose attention heads and feed-forward networks are pools of experts.

Letters: B batch, T new tokens, S keys (cached ones included), N = B * T, H hidden size, K experts per token,
E experts, D head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, cast

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from modmoe.layers import grouped_experts, megablocks
from modmoe.layers.added_experts import RouterRows, decline, own_choices
from modmoe.layers.experts import AttentionExperts, GatedExperts, GatedFFN, PlainExperts, PlainFFN
from modmoe.layers.router import ROUTERS, Router, RouterOutput
from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.context import (
    AttentionInputs,
)
from modmoe.models.document_context import DocumentContext
from modmoe.models.extension import Extension


class LayerOutput(NamedTuple):
    hidden_states: torch.Tensor
    attn_router_logits: torch.Tensor | None
    attn_router_index: torch.Tensor | None
    router_logits: torch.Tensor | None
    router_index: torch.Tensor | None
    extensions: tuple[torch.Tensor, ...] = ()
    """Logits and choices of the routers of extensions: of the FFN, in the order of the config, then of attention."""

    def flat(self) -> tuple[torch.Tensor | None, ...]:
        """Without nesting, so that every form of activation checkpointing carries the gradient of each tensor."""
        return (*self[:5], *self.extensions)

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> Self:
        """What `flat` made."""
        return cls(*flat[:5])._replace(extensions=flat[5:])


def norm(config: ModMoEConfig) -> nn.Module:
    cls = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return cls(config.hidden_size, eps=config.norm_eps)


def _router(config: ModMoEConfig, num_experts: int, top_k: int, num_rows: int) -> Router | None:
    """None for a dense layer."""
    if num_rows == 0:
        return None
    return ROUTERS[config.router_type](
        config.hidden_size,
        config.router_hidden_size,
        num_experts,
        top_k,
        renormalize=config.norm_topk_prob,
        unit_gates=config.unit_gates,
        sample_top_k=config.sample_topk,
        selection_bias=config.use_selection_bias,
        num_pruned=num_rows - num_experts,
    )


def _router_with_null(config: ModMoEConfig, num_experts: int, top_k: int) -> Router:
    """
    The router of an extension; row 0 is the null choice. It reads the token and what its document is about.

    Its gates are never renormalised: of a single slot that would be a gate of 1, through which nothing is learned. It
    is not balanced by a selection bias, which would pull tokens from null.
    """
    return ROUTERS[config.router_type](
        config.hidden_size,
        config.router_hidden_size,
        1 + num_experts,
        top_k,
        context_size=cast(int, config.num_key_value_heads) * cast(int, config.head_dim),
    )


class AddedExperts(nn.Module):
    """Experts of an extension that share the softmax and the slots of the model's own ("common")."""

    def __init__(self, config: ModMoEConfig, num_experts: int, experts: nn.Module) -> None:
        super().__init__()
        width = config.hidden_size if config.router_type == "linear" else config.router_hidden_size
        self.gate = RouterRows(num_experts, width)
        self.experts = experts


def _routed(
    gate: Router | None, added: list[AddedExperts], flat: torch.Tensor, token_mask: torch.Tensor | None
) -> RouterOutput | None:
    return None if gate is None else gate(flat, token_mask, [part.gate() for part in added])


def _choices(index: torch.Tensor, gate: Router, added: list[AddedExperts]) -> list[torch.Tensor]:
    """Choices (N, K) of the model's own experts and of added ones, each counted in its pool; its size for none."""
    if not added:
        return [index]
    # Of a pool whose experts are distributed over processes, the module holds only some.
    sizes = [gate.num_experts, *(len(part.gate.weight) for part in added)]
    return [own_choices(index, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


class QueryExperts(nn.Module):
    """Attention experts with their router, reading keys and values that they are given."""

    def __init__(
        self, config: ModMoEConfig, layer_idx: int, gate: Router | None, num_experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.is_causal
        self.head_dim = cast(int, config.head_dim)
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = cast(int, config.num_key_value_heads)
        self.top_k = top_k
        self.num_key_value_groups = top_k * self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.gate = gate
        self.experts = AttentionExperts(config.hidden_size, num_experts, self.num_heads * self.head_dim)

    def read(
        self,
        hidden_states: torch.Tensor,
        routing: RouterOutput | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: AttentionInputs,
        added: list[AddedExperts],
        q_bias: torch.Tensor | None,
        q_norm: nn.Module | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Queries of the chosen experts, attention, output projections.

        Args:
            hidden_states: (B, T, H).
            routing: of the tokens; None in a dense layer.
            keys, values: (B, kv heads, S, D), keys with their position embedding.
            added: further experts that `routing` chooses from.
            q_bias, q_norm: of the layer, for the queries of all experts.

        Returns:
            output (B, T, H), and weights (B, heads, T, S) or None.
        """
        batch, length, _ = hidden_states.shape
        flat = hidden_states.flatten(0, 1)
        pools = [self.experts, *(cast(AttentionExperts, part.experts) for part in added)]
        plans: list[Any] = [None]
        if routing is not None:
            choices = _choices(routing.top_k_index, cast(Router, self.gate), added)
            plans = [pool.plan(index) for pool, index in zip(pools, choices, strict=True)]
        # A slot belongs to one pool; in the others its row is zero.
        mapped = [pool.map(flat, plan, self.top_k) for pool, plan in zip(pools, plans, strict=True)]
        queries = sum(mapped[1:], mapped[0])
        if q_bias is not None:
            queries = queries + q_bias
        queries = self._heads_first(queries, batch, length)
        if q_norm is not None:
            queries = q_norm(queries)
        if inputs.position_embeddings is not None:
            queries = _rotated(queries, inputs)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        heads, weights = attend(
            self,
            queries,
            keys,
            values,
            inputs.attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **(inputs.arguments | kwargs),
        )
        heads = self._tokens_first(heads)
        gates = None if routing is None else routing.top_k_weights
        reduced = [pool.reduce(heads, plan, self.top_k, gates) for pool, plan in zip(pools, plans, strict=True)]
        return sum(reduced[1:], reduced[0]).view(batch, length, -1), weights

    def _heads_first(self, queries: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """(N * K, heads * D) -> (B, kv heads * K * group, T, D): query heads of one kv head are neighbours."""
        queries = queries.view(batch, length, self.top_k, self.num_kv_heads, -1, self.head_dim)
        return queries.permute(0, 3, 2, 4, 1, 5).reshape(batch, -1, length, self.head_dim)

    def _tokens_first(self, heads: torch.Tensor) -> torch.Tensor:
        """Back to token order: (B, T, kv heads * K * group, D) -> (N * K, heads * D)."""
        batch, length, _, _ = heads.shape
        heads = heads.view(batch, length, self.num_kv_heads, self.top_k, -1, self.head_dim)
        return heads.transpose(2, 3).reshape(batch * length * self.top_k, -1)


def _rotated(heads: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
    """RoPE of transformers, which wants queries and keys at once, on (B, heads, T, D)."""
    assert inputs.position_embeddings is not None
    return apply_rotary_pos_emb(heads, heads[:, :0], *inputs.position_embeddings)[0]


class AttentionExtension(QueryExperts):
    """
    Query heads of an extension, on the keys and values of the layer.

    They are a call of their own of the attention kernel: how many heads a kernel works on at once decides how it sums,
    so that heads beside the old ones would change the last bits of these.
    """

    def __init__(self, config: ModMoEConfig, layer_idx: int, extension: Extension) -> None:
        num_experts, top_k = extension.num_attn_experts, extension.num_attn_experts_per_tok
        super().__init__(config, layer_idx, _router_with_null(config, num_experts, top_k), num_experts, top_k)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None,
        context: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, RouterOutput]:
        """
        (B, T, H) -> (B, T, H) and what the router says of null and the new experts, see `decline`.

        `context` (N, C) is that of the layer's `DocumentContext`, `kwargs` are for `read`.
        """
        assert self.gate is not None
        routing = decline(self.gate(hidden_states.flatten(0, 1), token_mask, context=context))
        return self.read(hidden_states, routing, added=[], **kwargs)[0], routing


class ModMoEAttention(QueryExperts):
    """A pool of attention experts over keys and values that they share, and its extensions."""

    def __init__(self, config: ModMoEConfig, layer_idx: int) -> None:
        num_experts, top_k = config.attn_experts_at(layer_idx)
        gate = _router(config, num_experts, top_k, config.attn_router_rows_at(layer_idx))
        super().__init__(config, layer_idx, gate, num_experts, top_k)
        kv_size = self.num_kv_heads * self.head_dim
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.key_value_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.key_value_bias)
        query_size = self.num_heads * self.head_dim
        self.q_bias = nn.Parameter(torch.empty(query_size)) if config.query_bias else None
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if config.attention_output_bias else None
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.extensions = nn.ModuleDict()
        groups = any(extension.mode == "group" for extension in config.extension_list())
        self.context = DocumentContext(config, layer_idx) if groups else None
        for extension in config.extension_list():
            count = extension.num_attn_experts
            if count and extension.mode == "common":
                experts = AttentionExperts(config.hidden_size, count, query_size)
                self.extensions[extension.name] = AddedExperts(config, count, experts)
            elif count:
                self.extensions[extension.name] = AttentionExtension(config, layer_idx, extension)

    def forward(
        self,
        hidden_states: torch.Tensor,
        inputs: AttentionInputs,
        token_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, RouterOutput | None, list[RouterOutput], torch.Tensor | None]:
        """
        (B, T, H) -> output (B, T, H); weights of the model's own heads (B, heads, T, S) or None; router output or
        None; router outputs of extensions; (N, C), the context that routers of extensions read, or None.
        """
        batch, length, _ = hidden_states.shape
        added = [part for part in self.extensions.values() if isinstance(part, AddedExperts)]
        routing = _routed(self.gate, added, hidden_states.flatten(0, 1), token_mask)
        keys, values = (
            proj(hidden_states).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        if inputs.position_embeddings is not None:
            keys = _rotated(keys, inputs)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        context = None if self.context is None else self.context(keys, values, length, inputs, **kwargs)
        kwargs |= {"keys": keys, "values": values, "inputs": inputs, "q_bias": self.q_bias, "q_norm": self.q_norm}
        output, weights = self.read(hidden_states, routing, added=added, **kwargs)
        if self.o_bias is not None:
            output = output + self.o_bias
        routings = []
        for part in self.extensions.values():
            if isinstance(part, AttentionExtension):
                more, own_routing = part(hidden_states, token_mask, context, **kwargs)
                output = output + more
                routings.append(own_routing)
        return output, weights, routing, routings, context


class FFNExtension(nn.Module):
    """FFN experts of an extension, with a router that may choose none."""

    def __init__(self, config: ModMoEConfig, extension: Extension) -> None:
        super().__init__()
        self.config = config
        self.gate = _router_with_null(config, extension.num_experts, extension.num_experts_per_tok)
        self.experts = _ffn_pool(config, extension.num_experts)

    def forward(
        self, flat: torch.Tensor, token_mask: torch.Tensor | None, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, RouterOutput]:
        """(N, H), context (N, C) -> (N, H) and what the router says of null and the new experts, see `decline`."""
        routing = decline(self.gate(flat, token_mask, context=context))
        index = _known_index(self.config, routing.top_k_index, self.experts.num_experts)
        return self.experts(flat, index, routing.top_k_weights), routing


def _ffn_pool(config: ModMoEConfig, num_experts: int) -> Any:
    pool: Any = (GatedExperts if config.gated_ffn else PlainExperts)(config, num_experts, config.intermediate_size)
    pool.has_bias = config.ffn_bias  # transformers' contract has it as a fact of the class
    return pool


def _known_index(config: ModMoEConfig, top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Implementations of others index weights with the id "none"; a gate of 0 makes any expert none."""
    ours = config._experts_implementation in (None, "eager", grouped_experts.NAME, megablocks.NAME)
    return top_k_index if ours else top_k_index.clamp(max=num_experts - 1)


class ModMoEMLP(nn.Module):
    """A pool of feed-forward experts, with optional shared ones, and its extensions."""

    def __init__(self, config: ModMoEConfig, layer_idx: int) -> None:
        super().__init__()
        num_experts, top_k = config.experts_at(layer_idx)
        dense = GatedFFN if config.gated_ffn else PlainFFN
        self.config = config
        self.gate = _router(config, num_experts, top_k, config.router_rows_at(layer_idx))
        self.experts = (
            dense(config, 1, config.intermediate_size) if self.gate is None else _ffn_pool(config, num_experts)
        )
        self.shared_expert = None
        if config.num_shared_experts:
            self.shared_expert = dense(config, 1, config.num_shared_experts * config.intermediate_size)
        self.extensions = nn.ModuleDict()
        for extension in config.extension_list():
            count = extension.num_experts
            if count and extension.mode == "common":
                self.extensions[extension.name] = AddedExperts(config, count, _ffn_pool(config, count))
            elif count:
                self.extensions[extension.name] = FFNExtension(config, extension)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterOutput | None, list[RouterOutput]]:
        """
        (B, T, H) -> (B, T, H); the router output, None in a dense layer; router outputs of extensions, which read the
        `context` (N, C) of the layer's attention.
        """
        flat = hidden_states.flatten(0, 1)
        added = [part for part in self.extensions.values() if isinstance(part, AddedExperts)]
        routing = _routed(self.gate, added, flat, token_mask)
        output = self.experts(flat) if routing is None else self._chosen(flat, routing, added)
        if self.shared_expert is not None:
            output = output + self.shared_expert(flat)
        routings = []
        for part in self.extensions.values():
            if isinstance(part, FFNExtension):
                more, own_routing = part(flat, token_mask, context)
                output = output + more
                routings.append(own_routing)
        return output.view_as(hidden_states), routing, routings

    def _chosen(self, flat: torch.Tensor, routing: RouterOutput, added: list[AddedExperts]) -> torch.Tensor:
        gate = cast(Router, self.gate)
        pools: list[Any] = [self.experts, *(part.experts for part in added)]
        sizes = [gate.num_experts, *(pool.num_experts for pool in pools[1:])]
        outputs = []
        for pool, size, index in zip(pools, sizes, _choices(routing.top_k_index, gate, added), strict=True):
            gates = routing.top_k_weights.masked_fill(index == size, 0.0) if added else routing.top_k_weights
            outputs.append(pool(flat, _known_index(self.config, index, size), gates))
        return sum(outputs[1:], outputs[0])


class ModMoEDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + FFN(norm(x))."""

    def __init__(self, config: ModMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = ModMoEAttention(config, layer_idx)
        self.post_attention_layernorm = norm(config)
        self.mlp = ModMoEMLP(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        inputs: AttentionInputs,
        token_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """(B, T, H) -> (B, T, H) and what the routers decided, None for a dense side: `LayerOutput`, flat."""
        attended, _, attn_routing, attn_extensions, context = self.self_attn(
            self.input_layernorm(hidden_states), inputs, token_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        transformed, routing, extensions = self.mlp(self.post_attention_layernorm(hidden_states), token_mask, context)
        return LayerOutput(
            hidden_states + transformed,
            None if attn_routing is None else attn_routing.logits,
            None if attn_routing is None else attn_routing.top_k_index,
            None if routing is None else routing.logits,
            None if routing is None else routing.top_k_index,
            tuple(t for r in (*extensions, *attn_extensions) for t in (r.logits, r.top_k_index)),
        ).flat()
