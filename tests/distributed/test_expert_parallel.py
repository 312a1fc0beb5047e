"""Experts on several processes compute what one process computes: loss, gradients, generation."""

import pytest
import torch
import torch.distributed as dist

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.parallel.expert_parallel import parallelize
from modmoe.parallel.layout import expert_slice
from modmoe.parallel.loading import fresh_model, saved_model
from modmoe.parallel.topology import Topology, topology
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


def step_in_parallel(fields, padded, crowded, size, node_size, chunks):
    """On each rank: the step's loss, and the whole step's gradient of the parameters that it holds."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group, replicas = expert_groups(size)
    model, data = build(fields, crowded), batch(padded)
    parallelize(model, topology(group, node_size), chunks=chunks)
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
    "extensions": (
        {
            "extensions": [
                {"name": "group", "num_experts": 3, "num_experts_per_tok": 2, "num_attn_experts": 1},
                {"name": "common", "num_experts": 1, "num_attn_experts": 3, "mode": "common"},
            ]
        },
        True,
        False,
    ),
    "other counts per layer": ({"num_experts": [4, 8], "num_attn_experts": [1, 4]}, False, False),
}


def all_steps_in_parallel(cases, *layout):
    return [step_in_parallel(*case, *layout) for case in cases]


@pytest.mark.parametrize(
    ("world", "size", "node_size", "chunks"), [(2, 2, 2, 1), (4, 2, 4, 1), (4, 4, 4, 1), (2, 2, 2, 3), (4, 4, 2, 2)]
)
def test_loss_and_gradients_are_those_of_one_process(world, size, node_size, chunks):
    ranks = run_ranks(all_steps_in_parallel, world, list(CASES.values()), size, node_size, chunks)
    for case, arguments in enumerate(CASES.values()):
        loss, gradients = step_alone(*arguments)
        for rank in ranks:
            found_loss, found = rank[case]
            assert found_loss == pytest.approx(loss, rel=1e-6)  # transformers takes the cross entropy in float32
            assert found.keys() == gradients.keys()
            for name, (grad, part) in found.items():
                expected = gradients[name] if part is None else gradients[name][part.start : part.stop]
                torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


def goes_straight(node_sizes):
    return topology(dist.group.WORLD, node_sizes[dist.get_rank()]).across is None


def test_nodes_of_different_sizes_are_not_two_stages():
    assert run_ranks(goes_straight, 4, [2, 2, 1, 1], timeout=30) == [True] * 4


def models_in_parts(fields, directory):
    """On each rank: whether a fresh and a loaded model in parts hold what the whole ones hold."""
    topology = Topology(dist.group.WORLD)
    config = ModMoEConfig(**(TINY | fields))
    torch.manual_seed(3)
    whole = fresh_model(config)
    torch.manual_seed(3)
    fresh = fresh_model(config, topology)
    if dist.get_rank() == 0:
        whole.save_pretrained(directory, max_shard_size="10KB")
    dist.barrier()
    torch.manual_seed(4)
    loaded = saved_model(directory, config, topology)
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


def texts(fields, size):
    group, _ = expert_groups(size)
    model = build(fields).eval()
    parallelize(model, Topology(group))
    # Every rank has a prompt of its own, and some are done much sooner.
    rank = dist.get_rank()
    ids = torch.arange(1, 4 + 2 * rank)[None]
    return model.generate(ids, max_new_tokens=3 + 5 * rank, do_sample=False, pad_token_id=0)[0].tolist()


def test_generation_goes_on_until_the_last_rank_is_done():
    model = build({}).eval()
    for rank, found in enumerate(run_ranks(texts, 2, {}, 2)):
        ids = torch.arange(1, 4 + 2 * rank)[None]
        expected = model.generate(ids, max_new_tokens=3 + 5 * rank, do_sample=False, pad_token_id=0)
        assert found == expected[0].tolist()


def bytes_sent(tokens):
    """Bytes that leave this rank in one step, and what docs/distributed.md says of them."""
    sent = 0
    original = dist.all_to_all_single

    def counted(output, rows, received=None, to_send=None, **kwargs):
        nonlocal sent
        if to_send is not None:  # rows; the counts of rows are a few bytes per layer
            home = to_send[dist.get_rank()]
            sent += (len(rows) - home) * rows[:1].numel() * rows.element_size()
        return original(output, rows, received, to_send, **kwargs)

    model = build({}).float()
    parallelize(model, Topology(dist.group.WORLD))
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(1, 50, (1, tokens), generator=generator)
    dist.all_to_all_single = counted
    try:
        model(ids, labels=ids, use_cache=False).loss.backward()
    finally:
        dist.all_to_all_single = original
    return sent


def test_bytes_sent_are_those_of_the_formula():
    world, tokens = 2, 400
    sent = sum(run_ranks(bytes_sent, world, tokens))
    hidden, heads = TINY["hidden_size"], TINY["num_attention_heads"] * TINY["head_dim"]
    ffn = 4 * TINY["num_experts_per_tok"] * hidden
    attention = 4 * TINY["num_attn_experts_per_tok"] * (hidden + heads)
    expected = world * tokens * TINY["num_hidden_layers"] * (ffn + attention) * 4 * (world - 1) / world
    # The share that stays at home is 1 / P on average; these routers are random.
    assert sent == pytest.approx(expected, rel=0.1)


def refusals():
    messages = []
    for fields, chunks in (({"num_experts": 3}, 1), ({}, 0)):
        try:
            parallelize(build(fields), Topology(dist.group.WORLD), chunks=chunks)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_experts_that_cannot_be_shared_out_are_refused():
    for messages in run_ranks(refusals, 2):
        assert messages == [
            "expert_parallel_size=2 does not divide the 3 experts of model.layers.0.mlp.experts: choose a divisor",
            "chunks must be at least 1, got 0",
        ]
