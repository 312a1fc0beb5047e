"""Rows travel to the processes that hold their experts, and back: uneven all-to-all, nothing dropped.

Letters: N tokens, K experts per token, S = N * K (token, slot) pairs, E experts in all, P processes in the group,
R rows received from all of them, F features of a row.
"""

from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from modmoe.layers.grouped_experts import weighted_sum
from modmoe.ops import DispatchPlan, dispatch_plan
from modmoe.ops.backend import autocast_dtype


class Exchange:
    """
    Where the pairs of one routing decision go.

    The first process of the group holds the first E / P experts, and so on: rows in order of their experts are in
    order of their processes as well. Pairs without an expert stay at home.

    Args:
        top_k_index: (N, K) integer expert ids, E for none; each process has its own N, K and E are the same.
        num_experts: E, a multiple of P.
        group: the processes.

    Attributes:
        local_index: (R, 1) int64, which of this process's experts each received row is for.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int, group: dist.ProcessGroup) -> None:
        self._group = group
        self._top_k = top_k_index.shape[1]
        self._plan: DispatchPlan = dispatch_plan(top_k_index, num_experts)
        size = group.size()
        sent = self._plan.tokens_per_expert
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        # The only time the host waits for the device: the sizes of what follows depend on it.
        per_process = torch.stack([sent, received]).view(2, size, -1).sum(2)
        self._sent, self._received = per_process.tolist()
        self._num_local = num_experts // size
        local = torch.arange(self._num_local, device=sent.device).repeat(size)
        self.local_index = local.repeat_interleave(received, output_size=sum(self._received))[:, None]
        self._local_plan: DispatchPlan | None = None

    @property
    def local_plan(self) -> DispatchPlan:
        """Of the received rows over the experts of this process."""
        if self._local_plan is None:
            self._local_plan = dispatch_plan(self.local_index, self._num_local)
        return self._local_plan

    def send_tokens(self, tokens: Tensor) -> "Transfer":
        """(N, F), one row per token, each to all of its experts -> (R, F)."""
        return self._send(_ToExperts.apply(tokens, self._plan, sum(self._sent), self._top_k))

    def send_pairs(self, pairs: Tensor) -> "Transfer":
        """(S, F), one row per pair in token order -> (R, F)."""
        return self._send(_ToExperts.apply(pairs, self._plan, sum(self._sent), 1))

    def _send(self, rows: Tensor) -> "Transfer":
        # The experts would cast them anyway.
        rows = rows.to(autocast_dtype(rows))
        return Transfer.start(rows, self._sent, self._received, self._group)

    def send_back(self, rows: Tensor) -> "Transfer":
        """(R, F), results for the received rows, to where they came from -> (at most S, F), for `to_pairs`."""
        return Transfer.start(rows, self._received, self._sent, self._group)

    def to_pairs(self, returned: Tensor) -> Tensor:
        """What came back -> (S, F) in token order; zeros for pairs without an expert."""
        return _ToPairs.apply(returned, self._plan)

    def combine(self, returned: Tensor, gates: Tensor) -> Tensor:
        """What came back and gates (N, K) -> (N, F), same dtype: gate-weighted sum over slots, taken in float32."""
        return weighted_sum(self.to_pairs(returned).unflatten(0, gates.shape), gates).to(returned.dtype)


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


class Transfer:
    """
    One all-to-all on its way, forward and backward.

    Starting and finishing are nodes of their own in the autograd graph. Backward goes through them in the opposite
    order: what finishes a transfer in the forward pass starts that of its gradient, so work between the two overlaps
    with it in both directions.
    """

    def __init__(self, rows: Tensor, state: "_State") -> None:
        self._rows = rows
        self._state = state

    @classmethod
    def start(cls, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Self:
        """
        Args:
            rows: (sum(sent), F), in order of the processes they go to.
            sent: rows for each process.
            received: rows from each process.
            group: the processes.
        """
        state = _State(sent, received, group)
        return cls(_Start.apply(rows, state), state)

    def finish(self) -> Tensor:
        """(sum(received), F), in order of the processes they come from."""
        return _Finish.apply(self._rows, self._state)


class _State:
    """What both nodes of a transfer know."""

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self.sent = sent
        self.received = received
        self.group = group
        self.work: Any = None
        # Neither may be freed while it is read or written.
        self.leaving: Tensor | None = None
        self.arriving: Tensor | None = None

    def launch(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        self.leaving = rows.contiguous()
        self.arriving = rows.new_empty(sum(received), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            self.arriving, self.leaving, received, sent, group=self.group, async_op=True
        )
        return self.arriving

    def wait(self) -> Tensor:
        self.work.wait()
        assert self.arriving is not None
        arrived, self.work, self.leaving, self.arriving = self.arriving, None, None, None
        return arrived


class _Start(torch.autograd.Function):
    """Returns its input, so that shapes are right on both sides of the graph; what arrives is in the state."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, state: _State) -> Tensor:
        ctx.state = state
        state.launch(rows, state.sent, state.received)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.state.wait()
        return grad, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, state: _State) -> Tensor:
        ctx.state = state
        return state.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # On its way until _Start.backward, the only reader, waits for it.
        return ctx.state.launch(grad, ctx.state.received, ctx.state.sent), None
