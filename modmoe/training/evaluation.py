"""Validation loss and expert use of each domain."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from modmoe.data import DomainStatistics, collate_packed
from modmoe.training.monitoring.router_load import RouterLoads


@dataclass
class DomainScore:
    """Result of one domain."""

    nats_per_token: float
    """Mean cross entropy over the predicted tokens."""
    bits_per_byte: float
    """The same per byte of the domain's text."""
    loads: RouterLoads = field(default_factory=RouterLoads)
    """Tokens per expert over the evaluated blocks, on all ranks."""


@torch.no_grad()
def evaluate_domains(
    model: nn.Module,
    validation: Mapping[str, Dataset],
    statistics: Mapping[str, DomainStatistics],
    *,
    max_blocks: int,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], Any],
) -> dict[str, DomainScore]:
    """
    Score a causal LM on validation blocks of each domain. Ranks share the work; all get the result.

    Where `max_blocks` leaves some out, those that are taken lie evenly over the whole split, whose bytes per token
    and compressed sizes the statistics hold.

    Args:
        model: as wrapped for training; left in the mode it was in.
        validation: blocks of each domain.
        statistics: of each domain, for bytes per token.
        max_blocks: per domain.
        batch_size: blocks per forward pass.
        device: of the model.
        autocast: makes the context that the model runs in.
    """
    was_training = model.training
    model.eval()
    scores = {}
    for name, blocks in validation.items():
        total = len(blocks)  # type: ignore[arg-type]
        count = min(max_blocks, total)
        loads, sums = RouterLoads(), torch.zeros(2, dtype=torch.float64, device=device)
        for start, is_mine in _share(count, batch_size):
            batch = collate_packed([blocks[i * total // count] for i in range(start, min(start + batch_size, count))])
            batch = {key: value.to(device) for key, value in batch.items()}
            with autocast():
                outputs = model(**batch, use_cache=False)
            own = RouterLoads()
            own.add(outputs)
            own.scale(is_mine)
            loads.merge(own)  # zeros too: a rank without a batch of its own must know how many experts there are
            if is_mine:
                predicted = (batch["labels"][:, 1:] != -100).sum()
                # Of a batch in which nothing is to be predicted, the mean is not a number.
                total_loss = torch.where(predicted > 0, outputs.cross_entropy.double() * predicted, 0.0)
                sums += torch.stack([total_loss, predicted.double()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        loads.all_reduce()
        nats = float(sums[0] / sums[1].clamp_min(1))
        scores[name] = DomainScore(nats, statistics[name].bits_per_byte(nats), loads)
    model.train(was_training)
    return scores


def _share(count: int, batch_size: int) -> list[tuple[int, bool]]:
    """
    First block of each of this rank's batches, and whether the batch counts.

    All ranks run equally often, as collectives inside a model need; a rank without work left repeats a batch.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = list(range(0, count, batch_size))
    rounds = -(-len(starts) // world)
    turns = [round_ * world + rank for round_ in range(rounds)]
    return [(starts[min(turn, len(starts) - 1)], turn < len(starts)) for turn in turns]
