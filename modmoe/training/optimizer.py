"""The optimizer, its parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from modmoe.parallel.layout import expert_slice
from modmoe.training.clock import Clock
from modmoe.training.run_config import OptimizationConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    Trainable parameters by weight decay, which matrices have, and norms, biases and other vectors have not.

    Experts that are distributed over processes have separate groups, with the keys by which DeepSpeed recognises them.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter is a flat shard, and ds_shape its true shape.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    shared = {p: str(p.group_name) for p in trainable if expert_slice(p) is not None}  # type: ignore[attr-defined]
    groups: list[dict] = []
    for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
        groups.append({"params": [p for p in parameters if p not in shared], "weight_decay": decay})
        experts = [p for p in parameters if p in shared]
        groups += (
            [{"params": experts, "weight_decay": decay, "moe": True, "name": shared[experts[0]]}] if experts else []
        )
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimizationConfig, steps: int, clock: Clock
) -> LambdaLR:
    """
    The schedule as a multiplier on each group's learning rate.

    It runs by the clock where the clock is ahead of the steps, so that a slow machine, which will be stopped before
    its last step, still ends at the lowest rate.
    """

    def ratio(step: int) -> float:
        # The warm-up goes by steps alone: it is there for the optimizer's moments.
        ahead = round(clock.share * steps) if step >= config.warmup_steps else 0
        return lr_ratio(max(step, ahead), steps, config)

    return LambdaLR(optimizer, ratio)


def lr_ratio(step: int, steps: int, config: OptimizationConfig) -> float:
    """
    Learning rate of one step relative to the peak.

    Args:
        step: counted from 0.
        steps: of the whole run; the rate would reach `min_lr_ratio` at step `steps`, one after the last.
        config: schedule, warm-up and minimum.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - round(config.decay_fraction * steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    fall = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * fall
