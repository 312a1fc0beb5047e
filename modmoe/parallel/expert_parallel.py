"""Expert parallelism: every process of a group holds a part of each pool's experts, and everything else in full.

Applied to a built model from outside, as PyTorch's `fully_shard` is: modules and parameters keep their names, a
pool's class becomes a subclass that sends rows to the processes of their experts. DeepSpeed learns of it in `engine`.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modmoe.layers.experts import AttentionExperts
from modmoe.models import ModMoEPreTrainedModel
from modmoe.parallel.exchange import Exchange
from modmoe.parallel.layout import ExpertSlice, expert_slice, set_expert_slice


def parallelize(model: ModMoEPreTrainedModel, group: dist.ProcessGroup, *, chunks: int = 1) -> None:
    """
    Keep this process's experts of every pool, in place, and route rows to the others.

    Dropless: each row reaches its experts, however unevenly they are chosen. Gradients of the experts that a process
    keeps come from the tokens of the whole group: they are sums, where data parallelism averages over processes.

    Args:
        model: with all experts, or with those of this process by `keep_own_experts`.
        group: processes that share each pool; the first has the first experts. They must run the model equally often.
        chunks: parts of a batch whose transfers overlap with the expert computation of others.

    Raises:
        ValueError: if a pool's experts cannot be shared out evenly; names the layer.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if group.size() == 1 and chunks == 1:
        return
    check_divisible(model, group.size())
    for _, pool in model.routed_pools():
        for module in pool.modules():
            keep_own_experts(module, group)
        experts: Any = pool
        mixin = _ParallelAttentionExperts if isinstance(experts, AttentionExperts) else _ParallelFFN
        kind = type(experts)
        experts.__class__ = type(f"Parallel{kind.__name__}", (mixin, kind), {"__module__": __name__})
        experts.num_experts = experts.num_experts // group.size()
        experts.group = group
        experts.chunks = chunks
    # Processes that have finished their text go on with the others: these need their experts.
    model.generate = _generate_together(model)  # type: ignore[method-assign]


def check_divisible(model: ModMoEPreTrainedModel, size: int) -> None:
    """
    Raises:
        ValueError: if `size` processes cannot share every pool evenly.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for router, experts in model.routed_pools():
        if router.num_experts % size:
            raise ValueError(
                f"expert_parallel_size={size} does not divide the {router.num_experts} experts of "
                f"{names[id(experts)]}: choose a divisor"
            )


def keep_own_experts(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace the module's own stacked weights (E, out, in) by this process's part of them, once."""
    rank, size = group.rank(), group.size()
    for name, parameter in list(module.named_parameters(recurse=False)):
        if expert_slice(parameter) is not None:
            continue
        total = parameter.shape[0]
        part = ExpertSlice(rank * total // size, (rank + 1) * total // size, total)
        kept = nn.Parameter(parameter.detach()[part.start : part.stop].clone(), parameter.requires_grad)
        set_expert_slice(kept, part)
        setattr(module, name, kept)


def _generate_together(model: Any) -> Any:
    generate = model.generate

    def generate_together(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **{"synced_gpus": True, **kwargs})

    return generate_together


class _Parallel:
    """What both kinds of pools share; `super()` of the subclasses is the pool's own class."""

    num_experts: int
    group: dist.ProcessGroup
    chunks: int

    def _exchanges(self, top_k_index: Tensor) -> list[Exchange]:
        """One per chunk of tokens."""
        total = self.num_experts * self.group.size()
        return [Exchange(part, total, self.group) for part in top_k_index.tensor_split(self.chunks)]


class _ParallelFFN(_Parallel):
    """A pool of FFN experts, of which the module holds a part."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, H), (N, K), (N, K) -> (N, H), as without parallelism; index E means none."""
        exchanges = self._exchanges(top_k_index)
        parts = hidden_states.tensor_split(self.chunks)
        arriving = [exchange.send_tokens(part) for exchange, part in zip(exchanges, parts, strict=True)]
        leaving = []
        for exchange, transfer in zip(exchanges, arriving, strict=True):
            rows = transfer.finish()
            gates = rows.new_ones(exchange.local_index.shape)
            rows = cast(Any, super()).forward(rows, exchange.local_index, gates)
            leaving.append(exchange.send_back(rows))
        outputs = [
            exchange.combine(transfer.finish(), gates)
            for exchange, transfer, gates in zip(
                exchanges, leaving, top_k_weights.tensor_split(self.chunks), strict=True
            )
        ]
        return torch.cat(outputs).to(hidden_states.dtype)


class _ParallelAttentionExperts(_Parallel):
    """A pool of attention experts, of which the module holds a part; keys, values and attention stay at home."""

    q_proj: nn.Module
    o_proj: nn.Module

    def plan(self, top_k_index: Tensor) -> list[Exchange]:
        return self._exchanges(top_k_index)

    def map(self, hidden_states: Tensor, plan: list[Exchange] | None, top_k: int) -> Tensor:
        """(N, H) -> queries (N * K, A), in token order; of pairs without an expert 0."""
        assert plan is not None, "dense layers have no pool to share"
        parts = hidden_states.tensor_split(self.chunks)
        arriving = [exchange.send_tokens(part) for exchange, part in zip(plan, parts, strict=True)]
        leaving = self._project(self.q_proj, plan, arriving)
        return torch.cat([exchange.to_pairs(t.finish()) for exchange, t in zip(plan, leaving, strict=True)])

    def reduce(self, heads: Tensor, plan: list[Exchange] | None, top_k: int, gates: Tensor | None) -> Tensor:
        """(N * K, A) -> (N, H): output projections, weighted by gates (N, K) and summed over the chosen experts."""
        assert plan is not None, "dense layers have no pool to share"
        assert gates is not None
        parts = [part.flatten(0, 1) for part in heads.unflatten(0, gates.shape).tensor_split(self.chunks)]
        arriving = [exchange.send_pairs(part) for exchange, part in zip(plan, parts, strict=True)]
        leaving = self._project(self.o_proj, plan, arriving)
        outputs = [
            exchange.combine(transfer.finish(), part)
            for exchange, transfer, part in zip(plan, leaving, gates.tensor_split(self.chunks), strict=True)
        ]
        return torch.cat(outputs)

    def _project(self, projection: nn.Module, plan: list[Exchange], arriving: list[Any]) -> list[Any]:
        return [
            exchange.send_back(
                projection(transfer.finish(), exchange.local_plan, top_k=1, source="token", target="pair")
            )
            for exchange, transfer in zip(plan, arriving, strict=True)
        ]
