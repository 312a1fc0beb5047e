"""DeepSpeed with expert parallelism trains as one plain PyTorch process does: losses, gradient norms, parameters."""

import itertools

import pytest
import torch
import torch.distributed as dist

from modmoe.models import ModMoEConfig
from modmoe.parallel.layout import expert_slice
from modmoe.parallel.loading import fresh_model
from modmoe.training.optimizer import parameter_groups
from modmoe.training.ranks.bootstrap import prepare_process
from modmoe.training.trainer import gradient_norm
from tests.distributed.test_expert_parallel import TINY
from tests.launching import run_ranks

STEPS = 4
BLOCKS = 16
MAX_NORM = 0.5
# Of losses and gradient norms, relative, and of parameters. Storing weights in bf16 changes the norm by 6 % in one
# process already.
BOUNDS = {"fp32": (1e-5, 1e-5, 1e-5), "bf16": (1e-2, 1e-1, 2e-2)}
OPTIMIZERS = {
    # Adam hides a wrong scale of the gradient, SGD does not.
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.9),
    # Where a gradient is rounding noise, Adam divides it by itself; a larger epsilon keeps that out of the comparison.
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-6),
}


def config(scope):
    return ModMoEConfig(**TINY, aux_scope=scope)


def blocks(step):
    """(B, T) of one optimizer step on all ranks; every other block ends in padding."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, TINY["vocab_size"], (BLOCKS, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    return ids, mask


def loss_share(model, ids, mask, whole_mask):
    labels = ids.masked_fill(mask == 0, -100)
    return model(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        use_cache=False,
        num_items_in_batch=whole_mask[:, 1:].sum(),
        num_tokens_in_batch=whole_mask.sum(),
    ).loss


def train_alone(optimizer_name, accumulation, world):
    """Losses, gradient norms and final parameters of one process without an engine."""
    torch.manual_seed(0)
    model = fresh_model(config("micro_step"))
    optimizer = OPTIMIZERS[optimizer_name](parameter_groups(model, 0.1))
    losses, norms = [], []
    for step in range(STEPS):
        ids, mask = blocks(step)
        total = 0.0
        # Micro-step m of W ranks takes the blocks that they take together.
        for micro in torch.arange(BLOCKS).view(accumulation, -1):
            loss = loss_share(model, ids[micro], mask[micro], mask)
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def train_in_parallel(cases, size):
    """The same on each rank of a world, for several (ZeRO stage, optimizer, accumulation, dtype)."""
    prepare_process(use_deepspeed=True)
    return [_train(*case, size) for case in cases]


def _train(stage, optimizer_name, accumulation, dtype, chunks, size):
    import deepspeed

    from modmoe.parallel.engine import announce, expert_parallel_topology

    rank, world = dist.get_rank(), dist.get_world_size()
    topology = expert_parallel_topology(size) if size > 1 else None
    torch.manual_seed(0)
    model = fresh_model(config("micro_step"), topology, chunks=chunks)
    if topology is not None:
        announce(model, size, stage)
    optimizer = OPTIMIZERS[optimizer_name](parameter_groups(model, 0.1))
    norms = []
    if stage == 0:
        optimizer.register_step_pre_hook(lambda *_: norms.append(clip(model, topology)))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": BLOCKS // world // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": MAX_NORM if stage else 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == "bf16"},
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    losses = []
    for step in range(STEPS):
        ids, mask = blocks(step)
        total = torch.zeros(())
        for micro in torch.arange(BLOCKS).view(accumulation, world, -1):
            loss = loss_share(engine, ids[micro[rank]], mask[micro[rank]], mask)
            total += loss.detach().float()
            engine.backward(loss * world * accumulation)
            engine.step()
        dist.all_reduce(total)
        losses.append(total.item())
        if stage:
            norms.append(float(engine.get_global_grad_norm()))
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        parameters = {n: (p.detach().clone(), expert_slice(p)) for n, p in model.named_parameters()}
    engine.destroy()
    return losses, norms, parameters


def clip(model, topology):
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(parameters, None if topology is None else topology.group)
    torch.nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
    return norm.item()


def differences(found, expected):
    """Largest relative difference of losses, of gradient norms, and largest absolute one of parameters."""
    losses, norms, parameters = found
    assert parameters.keys() == expected[2].keys()
    worst = 0.0
    for name, (value, part) in parameters.items():
        target = expected[2][name] if part is None else expected[2][name][part.start : part.stop]
        worst = max(worst, (value.float() - target).abs().max().item())
    return [
        max(abs(a / b - 1) for a, b in zip(losses, expected[0], strict=True)),
        max(abs(a / b - 1) for a, b in zip(norms, expected[1], strict=True)),
        worst,
    ]


def check(world, size, cases):
    rows = []
    ranks = run_ranks(train_in_parallel, world, cases, size, timeout=600)
    for number, case in enumerate(cases):
        stage, optimizer, accumulation, dtype, chunks = case
        expected = train_alone(optimizer, accumulation, world)
        worst = [max(column) for column in zip(*(differences(r[number], expected) for r in ranks), strict=True)]
        rows.append(
            f"| {world} | {size} | {stage} | {optimizer} | {accumulation} | {dtype} | {chunks} | "
            + " | ".join(f"{value:.1e}" for value in worst)
            + " |"
        )
        print(rows[-1])
        assert all(value < bound for value, bound in zip(worst, BOUNDS[dtype], strict=True)), rows[-1]


def test_training_equals_one_process_at_every_stage():
    check(2, 2, [(stage, optimizer, 2, "fp32", 1) for stage, optimizer in itertools.product(range(4), OPTIMIZERS)])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_matrix(world, size):
    cases = [
        (stage, optimizer, accumulation, "fp32", 1)
        for stage, optimizer, accumulation in itertools.product(range(4), OPTIMIZERS, (1, 4))
    ]
    cases += [(stage, "adamw", 1, "bf16", 1) for stage in (1, 2, 3)]
    cases += [(1, "sgd", 1, "fp32", 3)]
    check(world, size, cases)
