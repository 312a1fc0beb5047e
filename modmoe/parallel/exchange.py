"""The rows of one routing decision travel to the processes that hold their experts, and back; nothing is dropped.

Letters: N tokens, K experts per token, S = N * K (token, slot) pairs, E experts in all, P processes in the group,
R rows received from all of them, F features of a row.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from modmoe.layers.grouped_experts import weighted_sum
from modmoe.ops import DispatchPlan, dispatch_plan
from modmoe.ops.backend import autocast_dtype
from modmoe.parallel.topology import Topology
from modmoe.parallel.transfer import Hop, Journey, Order


class Exchange:
    """
    Where the pairs of one routing decision go.

    The first process of the group holds the first E / P experts, and so on: rows in order of their experts are in
    order of their processes as well. Pairs without an expert stay at home.

    Args:
        top_k_index: (N, K) integer expert ids, E for none; each process has its own N, K and E are the same.
        num_experts: E, a multiple of P.
        topology: of the processes.

    Attributes:
        local_index: (R, 1) int64, which of this process's experts each received row is for.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int, topology: Topology) -> None:
        self._top_k = top_k_index.shape[1]
        self._num_local = num_experts // topology.size
        self._plan: DispatchPlan = dispatch_plan(top_k_index, num_experts)
        counts = self._plan.tokens_per_expert.view(topology.size, self._num_local)
        plan_hops = _one_hop if topology.across is None else _two_hops
        self._hops, self._orders, received = plan_hops(counts, topology)
        local = torch.arange(self._num_local, device=counts.device).repeat(received.numel() // self._num_local)
        num_received = sum(self._hops[-1].received)
        self.local_index = local.repeat_interleave(received.flatten(), output_size=num_received)[:, None]
        self._local_plan: DispatchPlan | None = None

    @property
    def local_plan(self) -> DispatchPlan:
        """Of the received rows over the experts of this process."""
        if self._local_plan is None:
            self._local_plan = dispatch_plan(self.local_index, self._num_local)
        return self._local_plan

    def send_tokens(self, tokens: Tensor) -> Journey:
        """(N, F), one row per token, each to all of its experts -> (R, F)."""
        return self._send(_ToExperts.apply(tokens, self._plan, sum(self._hops[0].sent), self._top_k))

    def send_pairs(self, pairs: Tensor) -> Journey:
        """(S, F), one row per pair in token order -> (R, F)."""
        return self._send(_ToExperts.apply(pairs, self._plan, sum(self._hops[0].sent), 1))

    def _send(self, rows: Tensor) -> Journey:
        # The experts would cast them anyway.
        return Journey(rows.to(autocast_dtype(rows)), self._hops, self._orders)

    def send_back(self, rows: Tensor) -> Journey:
        """(R, F), results for the received rows, to where they came from -> (at most S, F), for `to_pairs`."""
        hops, orders = reversed(self._hops), reversed(self._orders)
        return Journey(rows, [hop.reversed() for hop in hops], [order.reversed() for order in orders])

    def to_pairs(self, returned: Tensor) -> Tensor:
        """What came back -> (S, F) in token order; zeros for pairs without an expert."""
        return _ToPairs.apply(returned, self._plan)

    def combine(self, returned: Tensor, gates: Tensor) -> Tensor:
        """What came back and gates (N, K) -> (N, F), same dtype: gate-weighted sum over slots, taken in float32."""
        return weighted_sum(self.to_pairs(returned).unflatten(0, gates.shape), gates).to(returned.dtype)


def _one_hop(counts: Tensor, topology: Topology) -> tuple[list[Hop], list[Order], Tensor]:
    """
    Every row straight to its process.

    Args:
        counts: (P, E / P) int32, rows for each expert of each process.
        topology: of the processes.

    Returns:
        the hops, the orders between them, and the rows for each of this process's experts, block after block as they
        arrive, (blocks, E / P).
    """
    received = _exchange_counts(counts, topology.group)
    # The only time the host waits for the device: the sizes of what follows depend on it.
    sent_rows, received_rows = torch.stack([counts.sum(1), received.sum(1)]).tolist()
    return [Hop(topology.group, sent_rows, received_rows)], [], received


def _two_hops(counts: Tensor, topology: Topology) -> tuple[list[Hop], list[Order], Tensor]:
    """As `_one_hop`: to the right node, to this process's own place there, and on to the right process."""
    across, within = topology.across, topology.within
    assert across is not None
    assert within is not None
    nodes, places = across.size(), within.size()
    first = _exchange_counts(counts.view(nodes, -1), across).view(nodes, places, -1)
    # Rows have come by the node of their sender, and within that by their own place here: the second hop wants them
    # by place first.
    second = first.transpose(0, 1).contiguous()
    received = _exchange_counts(second.view(places, -1), within)
    sums = [counts.view(nodes, -1).sum(1), first.flatten(1).sum(1), second.flatten(1).sum(1), received.sum(1)]
    sent, between, onward, arrived = (
        part.tolist() for part in torch.cat(sums).cpu().split([nodes, nodes, places, places])
    )
    place = torch.arange(places, device=counts.device).repeat(nodes)
    place = place.repeat_interleave(first.sum(2).flatten(), output_size=sum(between))
    order = Order.of(place.argsort(stable=True))
    return [Hop(across, sent, between), Hop(within, onward, arrived)], [order], received


def _exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received


def _pairs_of(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows in order of their experts -> one per pair in token order; pairs without an expert come last in the plan."""
    missing = len(plan.inverse) - len(rows)
    rows = F.pad(rows, (0, 0, 0, missing)) if missing else rows
    return rows.index_select(0, plan.inverse)


class _ToExperts(torch.autograd.Function):
    """Rows in token order, one for `fan` neighbouring pairs, to the order of experts; its gradient gathers, so it is
    the same in every run, where that of `index_select` would add in any order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: DispatchPlan, num_routed: int, fan: int) -> Tensor:
        ctx.plan, ctx.fan = plan, fan
        source = plan.order[:num_routed]
        return rows.index_select(0, source // fan if fan > 1 else source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        pairs = _pairs_of(grad, ctx.plan)
        return pairs.unflatten(0, (-1, ctx.fan)).sum(1) if ctx.fan > 1 else pairs, None, None, None


class _ToPairs(torch.autograd.Function):
    """The way back: rows in the order of experts to one per pair in token order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan, ctx.num_routed = plan, len(rows)
        return _pairs_of(rows, plan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.order[: ctx.num_routed]), None
