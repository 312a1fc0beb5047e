"""The models: a stack of blocks without a head, and with those of language models and classifiers.

Letters: B batch, T new tokens, S keys (cached ones included), N = B * T, H hidden size, K experts per token,
E experts, D head size.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from modmoe.layers import grouped_experts, megablocks, stickbreaking
from modmoe.layers.added_experts import RouterRows
from modmoe.layers.experts import ExpertLinear, GatedFFN, PlainFFN
from modmoe.layers.router import Router
from modmoe.losses.cross_entropy import causal_lm_loss
from modmoe.losses.router import RouterLosses, RouterStatistics, router_losses
from modmoe.models.blocks import LayerOutput, ModMoEAttention, ModMoEDecoderLayer, norm
from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.context import (
    attention_inputs,
    check_positions,
    check_token_ids,
    next_positions,
    slot_mask,
)
from modmoe.models.loading import StrictPreTrainedModel
from modmoe.models.outputs import ModMoECausalLMOutputWithPast, ModMoEModelOutputWithPast


class ModMoEPreTrainedModel(StrictPreTrainedModel):
    """Initialisation, validation, and which implementations of attention and experts may be chosen."""

    config: ModMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModMoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # These concern the softmax attention type; see `_check_attention` for the other.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Of a router everything but `expert_rows`, which are integers.
    _keep_in_fp32_modules_strict = [
        "gate.weight",
        "gate.context_weight",
        "gate.in_proj",
        "gate.log_temperature",
        "gate.selection_bias",
    ]
    _can_record_outputs = {
        "hidden_states": ModMoEDecoderLayer,
        "attentions": OutputRecorder(ModMoEAttention, index=1),
    }

    def __init__(self, config: ModMoEConfig) -> None:
        # Again, because fields may have been set since the config was made.
        config.validate_architecture()
        super().__init__(config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # The decorated classes live in modmoe/layers/experts.py, where transformers does not look for them.
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our own ops unless another implementation is asked for by name; "eager" is one expert after another."""
        if requested_experts == megablocks.NAME:
            megablocks.grouped_gemm()  # here it raises while the model is built, not in its first step
        return super().get_correct_experts_implementation(requested_experts or grouped_experts.NAME)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """
        "stickbreaking" for a stick-breaking model, also in place of "eager": that is what older configs say, and what
        transformers sets for `output_attentions`. The slow reference is chosen as a backend of the op.
        """
        self._check_attention(requested_attention)
        if self.config.attention_type == "stickbreaking":
            return stickbreaking.NAME
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # transformers takes names of kernels on the hub without asking `get_correct_attn_implementation`.
        self._check_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def _check_attention(self, requested: str | None) -> None:
        """
        Raises:
            ValueError: if the kernel asked for computes the other type of attention: it would be another model.
        """
        if self.config.attention_type == "softmax":
            if requested == stickbreaking.NAME:
                stickbreaking.check_declared(self.config)
        elif requested not in (None, "eager", stickbreaking.NAME):
            raise ValueError(
                f"attn_implementation={requested!r} computes softmax attention, but this model's config says "
                "attention_type='stickbreaking'; leave attn_implementation unset"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            for started_at_zero in (module.selection_bias, module.context_weight):
                if started_at_zero is not None:
                    init.zeros_(started_at_zero)
            if module.expert_rows is not None:
                init.copy_(module.expert_rows, torch.arange(module.num_experts))
            if hasattr(module, "log_temperature"):
                init.zeros_(module.log_temperature)
        elif isinstance(module, ModMoEAttention):
            for bias in module.parameters(recurse=False):
                init.zeros_(bias)
        elif isinstance(module, ExpertLinear | GatedFFN | PlainFFN | RouterRows):
            for name, weight in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(weight)
                else:
                    init.normal_(weight, mean=0.0, std=std)

    def routed_pools(self) -> list[tuple[Router, nn.Module]]:
        """Every router of the model's own with its experts: FFN routers layer by layer, then attention routers."""
        return [(side.gate, side.experts) for side in self._sides() if side.gate is not None]

    def extension_pools(self, name: str) -> list[tuple[nn.Module, nn.Module]]:
        """What holds the rows of an extension's router, with its experts, in the order of `routed_pools`."""
        parts = [side.extensions[name] for side in self._sides() if name in side.extensions]
        return [(part.gate, part.experts) for part in parts]

    def _sides(self) -> list[Any]:
        layers = self.base_model.layers
        return [layer.mlp for layer in layers] + [layer.self_attn for layer in layers]

    def num_active_parameters(self) -> int:
        """Parameters that one token passes through: all but embedding, output layer and unused experts."""
        vocabulary = [self.get_input_embeddings(), self.get_output_embeddings(), self.base_model.embed_positions]
        total = sum(p.numel() for p in self.parameters())
        # Patches of images have no table to be looked up in.
        total -= sum(p.numel() for p in {m.weight for m in vocabulary if hasattr(m, "weight")})
        for experts, num_experts, active in self.pool_sizes():
            total -= sum(p.numel() // num_experts * (num_experts - active) for p in experts.parameters())
        return total

    def pool_sizes(self) -> list[tuple[nn.Module, int, int]]:
        """Every pool of experts, extensions included, how many it has in all, and how many a token uses at most."""
        pools = [(experts, router.num_experts, router.top_k) for router, experts in self.routed_pools()]
        for extension in self.config.extension_list():
            for gate, experts in self.extension_pools(extension.name):
                # Common experts have no slots of their own: one of them is used in place of an old one.
                active = gate.top_k if isinstance(gate, Router) else 0
                pools.append((experts, cast(int, experts.num_experts), active))
        return pools


class ModMoEModel(ModMoEPreTrainedModel):
    """The stack of blocks without a head."""

    def __init__(self, config: ModMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = self._input_embedding(config)
        self.layers = nn.ModuleList([ModMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = norm(config)
        softmax, learned = config.attention_type == "softmax", config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.rotary_emb = LlamaRotaryEmbedding(config) if softmax and not learned else None
        groups = [extension for extension in config.extension_list() if extension.mode == "group"]
        # In the order of `LayerOutput.extensions`; one for each side that has new experts.
        self._extension_routers = [e.name for e in groups if e.num_experts]
        self._extension_routers += [e.name for e in groups if e.num_attn_experts]
        self.gradient_checkpointing = False
        self.post_init()

    def _input_embedding(self, config: ModMoEConfig) -> nn.Module:
        return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModMoEModelOutputWithPast:
        """
        Args:
            input_ids: (B, T) int64; or `inputs_embeds` (B, T, H).
            attention_mask: (B, S), 0 for padding on either side. Padding is not routed, attended or counted.
            position_ids: (B, T). Where they do not increase a new document begins, which attention does not cross
                (packing; only while the cache is empty).
            past_key_values: cache of the tokens before these.
            use_cache: whether to return a cache.
            output_router_logits: whether to return logits and choices of every router.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            check_token_ids(cast(torch.Tensor, input_ids), self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        given_cache = past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        inputs = attention_inputs(
            self.config, inputs_embeds, attention_mask, position_ids, given_cache, self.rotary_emb
        )
        token_mask = self.token_mask(attention_mask, inputs_embeds.shape[1])
        if self.embed_positions is not None:
            positions = next_positions(inputs_embeds, given_cache) if position_ids is None else position_ids
            check_positions(positions, self.embed_positions.num_embeddings)
            inputs_embeds = inputs_embeds + self.embed_positions(positions)

        hidden_states = inputs_embeds
        routing: list[LayerOutput] = []
        for layer in self.layers:
            output = LayerOutput.of(
                layer(hidden_states, inputs, token_mask=token_mask, past_key_values=past_key_values, **kwargs)
            )
            hidden_states = output.hidden_states
            routing.append(output)
        result = ModMoEModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        if wanted:
            result.router_logits = _present(o.router_logits for o in routing)
            result.router_indices = _present(o.router_index for o in routing)
            result.attn_router_logits = _present(o.attn_router_logits for o in routing)
            result.attn_router_indices = _present(o.attn_router_index for o in routing)
            if self._extension_routers:
                result.extension_router_logits = self._by_extension([o.extensions[0::2] for o in routing])
                result.extension_router_indices = self._by_extension([o.extensions[1::2] for o in routing])
        return result

    def _by_extension(self, layers: list[tuple[torch.Tensor, ...]]) -> dict[str, tuple[torch.Tensor, ...]]:
        """Tensors of each layer in the order of `LayerOutput.extensions` -> those of each extension, FFN first."""
        columns = list(zip(self._extension_routers, zip(*layers, strict=True), strict=True))
        names = dict.fromkeys(self._extension_routers)
        return {name: tuple(t for other, column in columns if other == name for t in column) for name in names}

    def token_mask(self, attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """(N,) bool, the tokens that routers see; None is all."""
        if attention_mask is None or attention_mask.ndim != 2 or self.config.route_padding:
            return None
        return attention_mask[:, -length:].reshape(-1).bool()


def _present(tensors: Any) -> tuple[torch.Tensor, ...]:
    return tuple(t for t in tensors if t is not None)


def _at_least_one(count: torch.Tensor | int) -> torch.Tensor | int:
    """A denominator: of a step without tokens the sum is 0, and so must be the mean."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


class WithRouterLosses(ModMoEPreTrainedModel):
    """What heads share: losses and statistics of the routers of `self.model`."""

    model: ModMoEModel

    def _statistics(
        self, outputs: ModMoEModelOutputWithPast, attention_mask: torch.Tensor | None
    ) -> RouterStatistics | None:
        """
        Sums over this forward's tokens: FFN routers, attention routers, extensions; None if there is no router.

        The null choice of an extension is not an expert, and a token that makes it counts for no expert: losses
        balance the tokens that use the extension among its experts, and leave it to the cross entropy how many these
        are.
        """
        logits = (*(outputs.router_logits or ()), *(outputs.attn_router_logits or ()))
        if not logits:
            return None
        indices = (*(outputs.router_indices or ()), *(outputs.attn_router_indices or ()))
        mask = self.model.token_mask(attention_mask, outputs.last_hidden_state.shape[1])
        vectors = RouterStatistics.of(logits, indices, mask).vectors
        for name, added in (outputs.extension_router_logits or {}).items():
            for scores, index in zip(added, cast(dict, outputs.extension_router_indices)[name], strict=True):
                of_experts = scores[:, 1:]
                uses = (index < of_experts.shape[-1]).any(-1)
                vectors += RouterStatistics.of([of_experts], [index], uses).vectors
        # The layers of one model may be spread over several devices.
        return RouterStatistics([v.to(outputs.last_hidden_state.device) for v in vectors])

    @torch.no_grad()
    def router_statistics(self, attention_mask: torch.Tensor | None = None, **inputs: Any) -> RouterStatistics:
        """
        First pass of `aux_scope="global_batch"`: sums of one micro-batch on this rank, without gradient.

        Add those of all micro-batches, `all_reduce()` them when distributed, and give the total to each forward of
        the step as `router_statistics`, along with `num_items_in_batch`.

        Args:
            attention_mask, inputs: as for `forward`; `labels` are ignored.
        """
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        inputs |= {"use_cache": False, "output_router_logits": True}
        outputs = self.model(attention_mask=attention_mask, **inputs)
        statistics = self._statistics(outputs, attention_mask)
        if statistics is None:
            raise ValueError("this model has no router, so there are no router statistics: use aux_scope='micro_step'")
        return statistics

    def _router_losses(
        self,
        local: RouterStatistics,
        targets: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        num_tokens_in_batch: torch.Tensor | int | None,
        step: RouterStatistics | None,
    ) -> RouterLosses:
        config = self.config
        shared = num_items_in_batch is not None or num_tokens_in_batch is not None
        if config.aux_scope == "global_batch" and self.training and shared and step is None:
            raise ValueError(
                "aux_scope='global_batch' needs router_statistics of the whole step: add up "
                "model.router_statistics(...) over its micro-batches, or set aux_scope='micro_step'"
            )
        world = dist.get_world_size() if self.training and dist.is_available() and dist.is_initialized() else 1
        reference = step or (local.all_reduce() if world > 1 else local.detach())
        weight: torch.Tensor | float | None = None
        if step is not None:
            weight = None  # the reference already holds the tokens of the whole step
        elif num_tokens_in_batch is not None:
            weight = 1.0 / _at_least_one(num_tokens_in_batch)
        elif num_items_in_batch is not None and targets is not None:
            share = (targets != -100).sum() / num_items_in_batch
            weight = share.to(local.num_tokens.device) / local.num_tokens.clamp_min(1)
        elif world > 1:  # the caller averages losses over ranks, so each rank counts `world` times
            weight = world / reference.num_tokens.clamp_min(1)
        return router_losses(
            local,
            reference,
            balance=config.router_aux_loss_type,
            z_weight=config.router_z_loss_weight,
            reduction=config.router_aux_loss_reduction,
            weight=weight,
        )

    def _result(
        self, logits: torch.Tensor, outputs: ModMoEModelOutputWithPast, with_routing: bool
    ) -> ModMoECausalLMOutputWithPast:
        keys = ["past_key_values", "hidden_states", "attentions"]
        if with_routing:
            keys += ["router_logits", "attn_router_logits", "router_indices", "attn_router_indices"]
            keys += ["extension_router_logits", "extension_router_indices"]
        return ModMoECausalLMOutputWithPast(logits=logits, **{k: outputs.get(k) for k in keys})

    def _add_losses(
        self,
        result: ModMoECausalLMOutputWithPast,
        outputs: ModMoEModelOutputWithPast,
        task_loss: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *shares: Any,
    ) -> None:
        result.loss = result.cross_entropy = task_loss
        statistics = self._statistics(outputs, attention_mask)
        if statistics is None:
            return
        losses = self._router_losses(statistics, *shares)
        result.loss = task_loss + self.config.router_aux_loss_coef * losses.contribution.to(task_loss.device)
        result.aux_loss, result.aux_losses = losses.aux_loss, losses.parts
        loads = iter(statistics.tokens_per_expert())
        result.tokens_per_expert = tuple(next(loads) for _ in outputs.router_logits or ())
        result.attn_tokens_per_expert = tuple(next(loads) for _ in outputs.attn_router_logits or ())
        if outputs.extension_router_logits is not None:
            added = outputs.extension_router_logits
            seen = statistics.num_tokens
            users = iter(statistics.tokens_per_router()[-sum(map(len, added.values())) :])
            result.extension_tokens_per_expert = {name: tuple(next(loads) for _ in added[name]) for name in added}
            result.extension_users = {
                name: tuple(torch.stack([next(users), seen]) for _ in added[name]) for name in added
            }

    @torch.no_grad()
    def update_selection_bias(
        self,
        tokens_per_expert: tuple[torch.Tensor, ...],
        attn_tokens_per_expert: tuple[torch.Tensor, ...],
    ) -> None:
        """
        b <- b + rate * sign(mean load - load), once per optimizer step (arXiv:2408.15664, algorithm 1).

        Routers whose weights are frozen keep theirs: it is as much a part of what they know.

        Args:
            tokens_per_expert, attn_tokens_per_expert: as in the outputs, summed over micro-steps and ranks.
        """
        if not self.config.use_selection_bias:
            raise ValueError("use_selection_bias=False: set it in the config to balance by selection bias")
        loads = (*tokens_per_expert, *attn_tokens_per_expert)
        for (router, _), load in zip(self.routed_pools(), loads, strict=True):
            assert router.selection_bias is not None
            if not router.weight.requires_grad:
                continue
            load = load.to(router.selection_bias)
            mean = load.sum() / router.selection_bias.isfinite().sum()  # over experts that are in use
            router.selection_bias += self.config.selection_bias_update_rate * (mean - load).sign()


class ModMoEForCausalLM(WithRouterLosses, GenerationMixin):
    """The model with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # Proven by tests/unit/models/test_compile.py without a cache, and by test_static_cache.py with one.
    _can_compile_fullgraph = True

    def __init__(self, config: ModMoEConfig) -> None:
        super().__init__(config)
        self.model = ModMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config: ModMoEConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache,
        **kwargs: Any,
    ) -> Any:
        """What `generate` passes as attention mask where there is a static cache; it calls this."""
        if config.attention_type == "stickbreaking":
            return slot_mask(attention_mask, inputs_embeds, past_key_values)
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_tokens_in_batch: torch.Tensor | int | None = None,
        router_statistics: RouterStatistics | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModMoECausalLMOutputWithPast:
        """
        Args (the rest as for `ModMoEModel.forward`):
            labels: (B, T); -100 is ignored in the cross entropy. They change nothing for the routers.
            logits_to_keep: how many last positions get logits, 0 for all, or their indices.
            num_items_in_batch: labels of the whole optimizer step on all ranks; the loss is then a share of the
                step's sum, to be added over micro-steps and ranks. A step without labels (0) has loss 0.
            num_tokens_in_batch: routed tokens of the whole step on all ranks, likewise for the router losses;
                without it they are weighted by this micro-batch's share of the labels.
            router_statistics: of the whole step, for `aux_scope="global_batch"`; see `router_statistics()`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=labels is not None or output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        result = self._result(logits, outputs, output_router_logits)
        if labels is None:
            return result
        if num_items_in_batch is not None:
            num_items_in_batch = _at_least_one(num_items_in_batch)
        loss = self.loss_function(
            logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
        )
        targets = kwargs.get("shift_labels")
        if targets is None:
            targets = labels[..., 1:]
        self._add_losses(
            result,
            outputs,
            loss,
            attention_mask,
            targets,
            num_items_in_batch,
            num_tokens_in_batch,
            router_statistics,
        )
        return result


class ModMoEForSequenceClassification(WithRouterLosses):
    """The model with a linear classifier on the last token that is not padding."""

    # The loss is a mean over this batch; the Trainer divides it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: ModMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ModMoEModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        router_statistics: RouterStatistics | None = None,
        num_tokens_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModMoECausalLMOutputWithPast:
        """
        Args (the rest as for `ModMoEForCausalLM.forward`):
            attention_mask: (B, T); says which token is the last real one. Without it `pad_token_id` does.
            labels: (B,) classes, (B,) values, or (B, labels) for several at once.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=labels is not None or output_router_logits,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last_token(input_ids, attention_mask, hidden.shape[:2])
        pooled = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        result = self._result(pooled, outputs, output_router_logits)
        if labels is None:
            return result
        loss = self.loss_function(logits=pooled, labels=labels, pooled_logits=pooled, config=self.config)
        self._add_losses(result, outputs, loss, attention_mask, None, None, num_tokens_in_batch, router_statistics)
        return result

    def _last_token(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, shape: torch.Size
    ) -> torch.Tensor | int:
        if attention_mask is not None:
            real = attention_mask[:, -shape[1] :].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif shape[0] == 1:
            return -1
        else:
            raise ValueError(f"a batch of {shape[0]} needs attention_mask or config.pad_token_id to find last tokens")
        index = torch.arange(shape[1], device=real.device)
        return (index * real).argmax(-1)


__all__ = [
    "ModMoEForCausalLM",
    "ModMoEForSequenceClassification",
    "ModMoEModel",
    "ModMoEPreTrainedModel",
]
