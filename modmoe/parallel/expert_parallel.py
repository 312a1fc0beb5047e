"""Expert parallelism: every process of a group holds a part of each pool's experts, and everything else in full.

Applied to a built model from outside, as PyTorch's `fully_shard` is: modules and parameters keep their names, a
pool's class becomes a subclass that sends rows to the processes of their experts. DeepSpeed learns of it in `engine`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modmoe.layers.experts import AttentionExperts
from modmoe.models import ModMoEPreTrainedModel
from modmoe.parallel.exchange import Exchange
from modmoe.parallel.layout import ExpertSlice, expert_slice, set_expert_slice
from modmoe.parallel.topology import Topology
from modmoe.parallel.transfer import Journey


def parallelize(model: ModMoEPreTrainedModel, topology: Topology, *, chunks: int = 1) -> None:
    """
    Keep this process's experts of every pool, in place, and route rows to the others.

    Dropless: each row reaches its experts, however unevenly they are chosen. Gradients of the experts that a process
    keeps come from the tokens of the whole group: they are sums, where data parallelism averages over processes.

    Args:
        model: with all experts, or with those of this process by `keep_own_experts`.
        topology: processes that share each pool; the first has the first experts. They must run the model equally
            often.
        chunks: parts of a batch whose transfers overlap with the expert computation of others.

    Raises:
        ValueError: if a pool's experts cannot be distributed evenly; names the layer.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if topology.size == 1:
        return
    check_divisible(model, topology.size)
    for _, pool in model.routed_pools():
        for module in pool.modules():
            keep_own_experts(module, topology)
        experts: Any = pool
        mixin = _ParallelAttentionExperts if isinstance(experts, AttentionExperts) else _ParallelFFN
        kind = type(experts)
        experts.__class__ = type(f"Parallel{kind.__name__}", (mixin, kind), {"__module__": __name__})
        experts.num_experts = experts.num_experts // topology.size
        experts.topology = topology
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


def keep_own_experts(module: nn.Module, topology: Topology) -> None:
    """Replace the module's own stacked weights (E, out, in) by this process's part of them, once."""
    rank, size = topology.rank, topology.size
    if size == 1:
        return
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
    topology: Topology
    chunks: int

    def _exchanges(self, top_k_index: Tensor) -> list[Exchange]:
        """One per chunk of tokens."""
        total = self.num_experts * self.topology.size
        return [Exchange(part, total, self.topology) for part in top_k_index.tensor_split(self.chunks)]


class _ParallelFFN(_Parallel):
    """A pool of FFN experts, of which the module holds a part."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(N, H), (N, K), (N, K) -> (N, H), as without parallelism; index E means none."""
        own_experts = super().forward  # type: ignore[misc]

        def compute(rows: Tensor, exchange: Exchange) -> Tensor:
            # Each row has one expert here, and its gate is applied at home.
            return own_experts(rows, exchange.local_index, rows.new_ones(exchange.local_index.shape))

        exchanges = self._exchanges(top_k_index)
        parts = zip(exchanges, hidden_states.tensor_split(self.chunks), strict=True)
        leaving = _through_experts(compute, exchanges, [exchange.send_tokens(part) for exchange, part in parts])
        return _combine(exchanges, leaving, top_k_weights).to(hidden_states.dtype)


class _ParallelAttentionExperts(_Parallel):
    """A pool of attention experts, of which the module holds a part; keys, values and attention stay at home."""

    q_proj: nn.Module
    o_proj: nn.Module

    def plan(self, top_k_index: Tensor) -> list[Exchange]:
        """(N, K) expert ids, E for none -> what `map` and `reduce` take."""
        return self._exchanges(top_k_index)

    def map(self, hidden_states: Tensor, plan: list[Exchange] | None, top_k: int) -> Tensor:
        """(N, H) -> queries (N * K, A), in token order; of pairs without an expert 0."""
        assert plan is not None, "dense layers have no pool to share"
        parts = zip(plan, hidden_states.tensor_split(self.chunks), strict=True)
        leaving = self._project(self.q_proj, plan, [exchange.send_tokens(part) for exchange, part in parts])
        return torch.cat([exchange.to_pairs(rows.finish()) for exchange, rows in zip(plan, leaving, strict=True)])

    def reduce(self, heads: Tensor, plan: list[Exchange] | None, top_k: int, gates: Tensor | None) -> Tensor:
        """(N * K, A) -> (N, H): output projections, weighted by gates (N, K) and summed over the chosen experts."""
        assert plan is not None, "dense layers have no pool to share"
        assert gates is not None
        parts = zip(plan, heads.unflatten(0, gates.shape).tensor_split(self.chunks), strict=True)
        arriving = [exchange.send_pairs(part.flatten(0, 1)) for exchange, part in parts]
        return _combine(plan, self._project(self.o_proj, plan, arriving), gates)

    def _project(self, projection: nn.Module, plan: list[Exchange], arriving: list[Journey]) -> list[Journey]:
        def compute(rows: Tensor, exchange: Exchange) -> Tensor:
            product: Tensor = projection(rows, exchange.local_plan, top_k=1, source="token", target="pair")
            return product

        return _through_experts(compute, plan, arriving)


def _through_experts(
    compute: Callable[[Tensor, Exchange], Tensor], exchanges: list[Exchange], arriving: list[Journey]
) -> list[Journey]:
    """Chunk after chunk: while the rows of one are with the experts, those of its neighbours travel."""
    leaving: list[Journey] = []
    for number, exchange in enumerate(exchanges):
        if number + 1 < len(arriving):
            arriving[number + 1].advance()
        leaving.append(exchange.send_back(compute(arriving[number].finish(), exchange)))
        if number:
            leaving[number - 1].advance()
    return leaving


def _combine(exchanges: list[Exchange], leaving: list[Journey], gates: Tensor) -> Tensor:
    """Rows on their way home and gates (N, K) of all chunks -> (N, F)."""
    parts = zip(exchanges, leaving, gates.tensor_split(len(exchanges)), strict=True)
    return torch.cat([exchange.combine(rows.finish(), part) for exchange, rows, part in parts])
