"""Router losses: closed forms, masks, and the rules of accumulation and ranks on unlike micro-batches."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from modmoe import ModMoEForCausalLM
from modmoe.losses import RouterStatistics, router_losses
from tests.operations import Operations

from ..models.conftest import build

E = 8
ALL = ("mi", "concentration", "switch", "none")


def loss(logits: torch.Tensor, kind: str, mask: torch.Tensor | None = None, top_k: int = 2, **options) -> torch.Tensor:
    statistics = RouterStatistics.of([logits], [logits.topk(top_k).indices], mask)
    return router_losses(statistics, statistics, balance=kind, **options).aux_loss


def brute_force(logits: torch.Tensor, kind: str, top_k: int = 2) -> torch.Tensor:
    g = logits.softmax(-1)
    p = g.mean(0)
    if kind == "mi":
        return (p * p.log()).sum() - (g * g.log()).sum(-1).mean()
    if kind == "concentration":
        return -(p * p.log()).sum()
    f = torch.zeros_like(p)
    for choice in logits.topk(top_k).indices.flatten():
        f[choice] += 1 / (top_k * len(logits))
    return E * (f * p).sum()


@pytest.mark.parametrize("kind", ALL[:3])
def test_values_and_gradients_by_the_definition(kind):
    torch.manual_seed(0)
    logits = (2 * torch.randn(50, E, dtype=torch.float64)).requires_grad_()
    ours, theirs = loss(logits, kind), brute_force(logits, kind)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ALL[:3])
def test_autocast_changes_nothing(kind):
    """In bf16 a sum over thousands of tokens and the log of a probability lose what balancing looks at."""
    torch.manual_seed(0)
    logits = torch.randn(500, E, requires_grad=True)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = loss(logits, kind, z_weight=0.1)
        results.append((value, *torch.autograd.grad(value, logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_waits_for_the_device():
    logits = torch.randn(50, E, requires_grad=True)
    with Operations() as operations:
        loss(logits, "mi", z_weight=0.1).backward()
    operations.assert_nothing_waits()


def test_closed_forms():
    uniform = torch.zeros(40, E, dtype=torch.float64)
    collapsed = torch.full((40, E), -1e4, dtype=torch.float64)
    collapsed[:, 3] = 0
    sharp_and_even = torch.full((40, E), -1e4, dtype=torch.float64)
    sharp_and_even[torch.arange(40), torch.arange(40) % E] = 0
    expected = {
        "mi": (0.0, 0.0, -math.log(E)),
        "concentration": (math.log(E), 0.0, math.log(E)),
        "switch": (1.0, float(E), 1.0),
    }
    for kind, values in expected.items():
        for logits, value in zip((uniform, collapsed, sharp_and_even), values, strict=True):
            assert loss(logits, kind, top_k=1).item() == pytest.approx(value, abs=1e-6), kind
    z = loss(torch.full((5, E), 100.0), "none", z_weight=0.5)
    assert z.item() == pytest.approx(0.5 * (100 + math.log(E)) ** 2, rel=1e-6)


def test_z_loss_does_not_overflow():
    logits = torch.full((4, E), 3e4).requires_grad_()
    value = loss(logits, "none", z_weight=1.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", ALL[:3])
def test_masked_tokens_do_not_count(kind):
    torch.manual_seed(0)
    logits = torch.randn(30, E, dtype=torch.float64)
    mask = torch.rand(30) > 0.4
    statistics = RouterStatistics.of([logits], [logits.topk(2).indices.masked_fill(~mask[:, None], E)], mask)
    masked = router_losses(statistics, statistics, balance=kind, z_weight=0.1).aux_loss
    torch.testing.assert_close(masked, loss(logits[mask], kind, z_weight=0.1))


def test_reduction_over_routers():
    torch.manual_seed(0)
    logits = [torch.randn(20, E), torch.randn(20, 5)]
    statistics = RouterStatistics.of(logits, [x.topk(2).indices for x in logits])
    each = [loss(x, "mi") for x in logits]
    for reduction, value in (("sum", sum(each)), ("mean", sum(each) / 2)):
        result = router_losses(statistics, statistics, reduction=reduction)
        torch.testing.assert_close(result.aux_loss, value)
        torch.testing.assert_close(result.parts["mi"], value)


def test_an_unknown_balance_loss_is_named():
    statistics = RouterStatistics.of([torch.randn(4, E)], [torch.zeros(4, 1).long()])
    with pytest.raises(ValueError, match="balance='swtich' is not one of"):
        router_losses(statistics, statistics, balance="swtich")


def test_routers_of_several_sizes():
    """They are computed in groups of a size."""
    torch.manual_seed(0)
    logits = [torch.randn(20, size) for size in (3, 5, 3, 4, 5)]
    statistics = [RouterStatistics.of([scores], [scores.topk(2).indices]) for scores in logits]
    whole = RouterStatistics([vector for one in statistics for vector in one.vectors])
    for balance in ("mi", "concentration", "switch"):
        alone = [router_losses(one, one, balance=balance, z_weight=0.1).aux_loss for one in statistics]
        together = router_losses(whole, whole, balance=balance, z_weight=0.1).aux_loss
        torch.testing.assert_close(together, torch.stack(alone).mean())
    turned = RouterStatistics([*whole.vectors[1:], whole.vectors[0]])
    with pytest.raises(ValueError, match="the same routers, in the same order"):
        router_losses(whole, turned)


def test_no_loss_is_zero():
    result = router_losses(*[RouterStatistics.of([torch.randn(4, E)], [torch.zeros(4, 1).long()])] * 2, balance="none")
    assert result.aux_loss == result.contribution == 0
    assert result.parts == {}


# Micro-batches of unlike length and content, as real ones are.
LENGTHS = (20, 3, 11, 7)


def micro_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(24 * i, 24 * (i + 1), (2, 20), generator=generator)
        mask = (torch.arange(20) < length).long().expand(2, -1)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def step_sizes(batches: list[dict]) -> dict[str, torch.Tensor]:
    return {
        # HF's Trainer counts the labels that remain after the shift.
        "num_items_in_batch": sum((b["labels"][:, 1:] != -100).sum() for b in batches),
        "num_tokens_in_batch": sum(b["attention_mask"].sum() for b in batches),
    }


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def accumulate(model: ModMoEForCausalLM, batches: list[dict], **extra) -> tuple[float, dict[str, torch.Tensor]]:
    total, sizes = 0.0, step_sizes(batches)
    for batch in batches:
        out = model(**batch, **sizes, **extra)
        out.loss.backward()
        total += out.loss.item()
    return total, gradients_of(model)


def merged(batches: list[dict]) -> list[dict]:
    return [{k: torch.cat([b[k] for b in batches]) for k in batches[0]}]


def exact(**changes) -> ModMoEForCausalLM:
    return build(router_aux_loss_coef=1.0, **changes).double().train()


LINEAR = {"router_aux_loss_type": "none", "router_z_loss_weight": 0.3}


def assert_same(a: tuple[float, dict], b: tuple[float, dict]) -> None:
    """To fp32 rounding: transformers computes the cross entropy in fp32 even for a float64 model."""
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_linear_losses_do_not_depend_on_accumulation():
    batches = micro_batches()
    assert_same(accumulate(exact(**LINEAR), batches), accumulate(exact(**LINEAR), merged(batches)))


@pytest.mark.parametrize("kind", ALL[:3])
def test_global_batch_does_not_depend_on_accumulation(kind):
    options = {"router_aux_loss_type": kind, "router_z_loss_weight": 0.3, "aux_scope": "global_batch"}
    results = []
    for batches in (micro_batches(), merged(micro_batches())):
        model = exact(**options)
        parts = [model.router_statistics(**batch) for batch in batches]
        statistics = parts[0]
        for part in parts[1:]:
            statistics = statistics + part
        results.append(accumulate(model, batches, router_statistics=statistics))
    assert_same(*results)
    plain = exact(router_aux_loss_type=kind, router_z_loss_weight=0.3)
    assert_same(results[1], accumulate(plain, merged(micro_batches())))


@pytest.mark.parametrize("kind", ALL[:3])
def test_micro_step_is_the_token_weighted_mean_of_the_micro_batches(kind):
    model, batches = exact(router_aux_loss_type=kind), micro_batches()
    sizes = step_sizes(batches)
    outputs = [model(**b, **sizes) for b in batches]
    total = sum(out.loss - out.cross_entropy for out in outputs)
    weights = [b["attention_mask"].sum() / sizes["num_tokens_in_batch"] for b in batches]
    torch.testing.assert_close(total, sum(w * o.aux_loss for w, o in zip(weights, outputs, strict=True)))


def test_without_step_sizes_a_forward_is_its_own_step():
    model, batch = exact(), micro_batches()[0]
    out = model(**batch)
    torch.testing.assert_close(out.loss, out.cross_entropy + out.aux_loss)


def test_with_labels_counted_alone_the_share_of_labels_weighs():
    model, batches = exact(**LINEAR), micro_batches()
    sizes = {"num_items_in_batch": step_sizes(batches)["num_items_in_batch"]}
    outputs = [model(**b, **sizes) for b in batches]
    total = sum(out.loss - out.cross_entropy for out in outputs)
    shares = [(b["labels"][:, 1:] != -100).sum() / sizes["num_items_in_batch"] for b in batches]
    torch.testing.assert_close(total, sum(s * out.aux_loss for s, out in zip(shares, outputs, strict=True)))


def _rank_step(rank: int, world: int, port: int, options: dict, with_sizes: bool, queue: mp.Queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, batches = exact(**options), micro_batches()
    mine = {k: torch.cat([b[k] for b in batches[2 * rank : 2 * rank + 2]]) for k in batches[0]}
    sizes = step_sizes(batches) if with_sizes else {}
    out = model(**mine, **sizes)
    out.loss.backward()
    loss, gradients = (out.loss - out.cross_entropy).detach(), gradients_of(model)
    for tensor in (loss, *gradients.values()):
        torch.distributed.all_reduce(tensor)
    if rank == 0:
        queue.put((loss.item(), out.aux_loss.item(), {n: g.numpy() for n, g in gradients.items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_ranks(options: dict, with_sizes: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(_rank_step, (2, port, options, with_sizes, queue), nprocs=2, join=False)
    value, aux, gradients = queue.get(timeout=120)
    context.join()
    return value, aux, {n: torch.from_numpy(g) for n, g in gradients.items()}


def test_two_ranks_equal_one_process():
    """Sums over ranks of value and gradient; the MI loss couples the tokens of both ranks."""
    options = {"router_aux_loss_type": "mi", "router_z_loss_weight": 0.3}
    value, aux, gradients = run_ranks(options, with_sizes=True)
    model = exact(**options)
    (batch,) = merged(micro_batches())
    out = model(**batch, **step_sizes([batch]))
    out.loss.backward()
    assert value == pytest.approx((out.loss - out.cross_entropy).item(), rel=1e-6)
    assert aux == pytest.approx(out.aux_loss.item(), rel=1e-6)
    assert_same((0.0, gradients), (0.0, gradients_of(model)))


@pytest.mark.slow
def test_two_ranks_whose_losses_are_averaged():
    """Without step sizes (plain data parallelism) the mean over ranks is the one-process router loss."""
    value, aux, _ = run_ranks({"router_aux_loss_type": "mi"}, with_sizes=False)
    expected = exact(router_aux_loss_type="mi")(**merged(micro_batches())[0]).aux_loss.item()
    assert value / 2 == pytest.approx(expected, rel=1e-6)
    assert aux == pytest.approx(expected, rel=1e-6)
