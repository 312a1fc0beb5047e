"""Rows between processes: uneven all-to-all that overlaps with other work, forward and backward."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Hop(NamedTuple):
    """One all-to-all: how many rows go to and come from each process of a group."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    def reversed(self) -> "Hop":
        """The same rows on their way back."""
        return Hop(self.group, self.received, self.sent)


class Order(NamedTuple):
    """A permutation of rows: new row i is old row `forward[i]`; `backward` is its inverse."""

    forward: Tensor
    backward: Tensor

    @classmethod
    def of(cls, forward: Tensor) -> "Order":
        places = torch.arange(len(forward), device=forward.device)
        return cls(forward, torch.empty_like(forward).scatter_(0, forward, places))

    def reversed(self) -> "Order":
        return Order(self.backward, self.forward)


class Journey:
    """
    Rows on their way over one or two hops.

    Starting and finishing a hop are nodes of their own in the autograd graph. Backward goes through them in the
    opposite order: what finishes a hop in the forward pass starts that of its gradient, so work that is done between
    the two overlaps with it in both directions.

    Args:
        rows: (R, F), in order of the processes of the first hop.
        hops: one after the other.
        orders: how rows are put in order between a hop and the next.
    """

    def __init__(self, rows: Tensor, hops: Sequence[Hop], orders: Sequence[Order] = ()) -> None:
        self._hops = list(hops)
        self._orders = list(orders)
        self._start(rows)

    def _start(self, rows: Tensor) -> None:
        self._transfer = _Transfer(self._hops.pop(0))
        self._rows = _Start.apply(rows, self._transfer)

    def advance(self) -> None:
        """Begin the next hop, if there is one, once the one before is done."""
        if self._hops:
            rows = _Finish.apply(self._rows, self._transfer)
            self._start(_Reorder.apply(rows, self._orders.pop(0)))

    def finish(self) -> Tensor:
        """The rows that have arrived, in order of the processes that they come from."""
        while self._hops:
            self.advance()
        rows: Tensor = _Finish.apply(self._rows, self._transfer)
        return rows


class _Transfer:
    """What both ends of a hop know."""

    def __init__(self, hop: Hop) -> None:
        self.hop = hop
        self._work: Any = None
        # Neither may be freed while it is read or written.
        self._leaving: Tensor | None = None
        self._arriving: Tensor | None = None

    def launch(self, rows: Tensor, hop: Hop) -> Tensor:
        self._leaving = rows.contiguous()
        self._arriving = rows.new_empty(sum(hop.received), *rows.shape[1:])
        self._work = dist.all_to_all_single(
            self._arriving, self._leaving, hop.received, hop.sent, group=hop.group, async_op=True
        )
        return self._arriving

    def wait(self) -> Tensor:
        self._work.wait()
        assert self._arriving is not None
        arrived, self._work, self._leaving, self._arriving = self._arriving, None, None, None
        return arrived


class _Start(torch.autograd.Function):
    """Returns its input, so that shapes are right on both sides of the graph; what arrives is in the transfer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.launch(rows, transfer.hop)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.wait()
        return grad, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # On its way until _Start.backward, the only reader, waits for it.
        return ctx.transfer.launch(grad, ctx.transfer.hop.reversed()), None


class _Reorder(torch.autograd.Function):
    """A permutation whose gradient is one too, where that of `index_select` would add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order) -> Tensor:
        ctx.order = order
        return rows.index_select(0, order.forward)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.order.backward), None
