"""Experts on several processes compute what one process computes: loss, gradients, generation."""

import pytest
import torch
import torch.distributed as dist

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.parallel.expert_parallel import parallelize
from modmoe.parallel.layout import expert_slice
from modmoe.parallel.loading import fresh_model, saved_model
from tests.launching import run_ranks

TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_attn_experts": 4,
    "num_attn_experts_per_tok": 2,
    "intermediate_size": 12,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "router_hidden_size": 8,
    "router_aux_loss_coef": 0.1,
    "initializer_range": 0.3,
}


def build(fields, crowded=False):
    torch.manual_seed(0)
    model = ModMoEForCausalLM(ModMoEConfig(**(TINY | fields))).double()
    if crowded:
        for router, _ in model.routed_pools():
            favour_first_experts(router)
    return model


@torch.no_grad()
def favour_first_experts(router):
    """All tokens to the first experts, which are on the first process: the others receive nothing."""
    router.weight.zero_()
    router.weight[: router.top_k] = torch.randn(router.top_k, router.weight.shape[1], dtype=router.weight.dtype) * 0.01
    router.selection_bias[: router.top_k] = 10.0


def batch(padded):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, TINY["vocab_size"], (8, 13), generator=generator)
    mask = torch.ones_like(ids)
    if padded:  # differently on each rank, one row of padding alone included
        for row, length in enumerate([13, 5, 0, 12, 1, 13, 9, 2]):
            mask[row, length:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def share_of_step(model, part, whole):
    return model(
        **part,
        use_cache=False,
        num_items_in_batch=(whole["labels"][:, 1:] != -100).sum(),
        num_tokens_in_batch=whole["attention_mask"].sum(),
    ).loss


def step_alone(fields, padded, crowded):
    model, data = build(fields, crowded), batch(padded)
    loss = share_of_step(model, data, data)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def step_in_parallel(fields, padded, crowded, size, chunks):
    """On each rank: the step's loss, and the whole step's gradient of the parameters that it holds."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group, replicas = expert_groups(size)
    model, data = build(fields, crowded), batch(padded)
    parallelize(model, group, chunks=chunks)
    loss = share_of_step(model, {key: value.chunk(world)[rank] for key, value in data.items()}, data)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {}
    for name, parameter in model.named_parameters():
        grad, part = parameter.grad, expert_slice(parameter)
        dist.all_reduce(grad, group=None if part is None else replicas)
        gradients[name] = (grad, part)
    return total.item(), gradients


def expert_groups(size):
    rank, world = dist.get_rank(), dist.get_world_size()
    blocks = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    replicas = [dist.new_group(range(place, world, size)) for place in range(size)]
    return blocks[rank // size], replicas[rank % size]


CASES = {
    "plain": ({}, False, False),
    "padded": ({}, True, False),
    "one rank gets all": ({"use_selection_bias": True}, False, True),
    "shared expert, gated": ({"num_shared_experts": 1, "gated_ffn": True, "hidden_act": "silu"}, True, False),
    "softmax, linear router": ({"attention_type": "softmax", "router_type": "linear"}, True, False),
    "eager experts": ({"experts_implementation": "eager"}, True, False),
    "other counts per layer": ({"num_experts": [4, 8], "num_attn_experts": [1, 4]}, False, False),
}


def all_steps_in_parallel(cases, size, chunks):
    return [step_in_parallel(*case, size, chunks) for case in cases]


@pytest.mark.parametrize(("world", "size", "chunks"), [(2, 2, 1), (4, 2, 1), (4, 4, 1), (2, 2, 3)])
def test_loss_and_gradients_are_those_of_one_process(world, size, chunks):
    ranks = run_ranks(all_steps_in_parallel, world, list(CASES.values()), size, chunks)
    for case, arguments in enumerate(CASES.values()):
        loss, gradients = step_alone(*arguments)
        for rank in ranks:
            found_loss, found = rank[case]
            assert found_loss == pytest.approx(loss, rel=1e-6)  # transformers takes the cross entropy in float32
            assert found.keys() == gradients.keys()
            for name, (grad, part) in found.items():
                expected = gradients[name] if part is None else gradients[name][part.start : part.stop]
                torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


def models_in_parts(fields, directory):
    """On each rank: whether a fresh and a loaded model in parts hold what the whole ones hold."""
    group = dist.group.WORLD
    config = ModMoEConfig(**(TINY | fields))
    torch.manual_seed(3)
    whole = fresh_model(config)
    torch.manual_seed(3)
    fresh = fresh_model(config, group)
    if dist.get_rank() == 0:
        whole.save_pretrained(directory, max_shard_size="10KB")
    dist.barrier()
    torch.manual_seed(4)
    loaded = saved_model(directory, config, group)
    return [_same(model, whole) for model in (fresh, loaded)]


def _same(model, whole):
    expected = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        part = expert_slice(tensor)
        value = expected[name] if part is None else expected[name][part.start : part.stop]
        torch.testing.assert_close(tensor, value, rtol=0, atol=0, msg=name)
    return sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in whole.parameters())


def test_parts_are_made_and_read_without_the_whole(tmp_path):
    for number, fields in enumerate(
        ({}, {"attention_type": "softmax", "tie_word_embeddings": True, "gated_ffn": True})
    ):
        for shares in run_ranks(models_in_parts, 2, fields, tmp_path / str(number)):
            assert max(shares) < 0.75
