"""What one cluster saves, another resumes: other numbers of processes, other ZeRO stages, experts shared or not."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from modmoe.parallel.loading import fresh_model
from modmoe.training.checkpoints.engine_state import EngineState
from modmoe.training.checkpoints.sharded_state import ShardedState, write_index, write_pieces
from modmoe.training.optimizer import parameter_groups
from modmoe.training.ranks.bootstrap import prepare_process
from tests.distributed.test_engine import BLOCKS, MAX_NORM, OPTIMIZERS, blocks, clip, config, loss_share
from tests.launching import run_ranks

STEPS = 2  # before the save, and again after it


class Cluster(NamedTuple):
    """How a run is spread out; `stage` None is plain PyTorch."""

    world: int
    size: int
    stage: int | None
    dtype: str = "fp32"
    """Of the weights; "bf16+" accumulates gradients in fp32, for which stage 1 has an engine of its own."""

    def __str__(self) -> str:
        engine = "plain" if self.stage is None else f"ZeRO-{self.stage}"
        return f"W={self.world} ep={self.size} {engine} {self.dtype}"


class Run:
    """A model in training on this rank."""

    def __init__(self, cluster, optimizer_name):
        from modmoe.parallel.engine import announce, expert_parallel_topology

        self.stage = cluster.stage
        self.topology = expert_parallel_topology(cluster.size) if cluster.size > 1 else None
        torch.manual_seed(0)
        self.model = fresh_model(config("micro_step"), self.topology)
        if self.topology is not None:
            announce(self.model, cluster.size, cluster.stage)
        self.optimizer = OPTIMIZERS[optimizer_name](parameter_groups(self.model, 0.1))
        self.engine = self._engine(cluster)
        self.state = EngineState(self.model, self.optimizer if self.stage is None else self.engine.optimizer)

    def _engine(self, cluster):
        import deepspeed

        if not self.stage:
            self.optimizer.register_step_pre_hook(self._clip)
        if self.stage is None:
            return self.model if cluster.world == 1 else torch.nn.parallel.DistributedDataParallel(self.model)
        settings = {
            "train_micro_batch_size_per_gpu": BLOCKS // cluster.world,
            "gradient_clipping": MAX_NORM if self.stage else 0.0,
            # So small that some parameters stay gathered and some do not.
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 100},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": cluster.dtype != "fp32"},
            "data_types": {"grad_accum_dtype": "fp32" if cluster.dtype == "bf16+" else None},
            "steps_per_print": 10**9,
        }
        return deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
        )[0]

    def _clip(self, *_):
        clip(self.model, self.topology)

    def step(self, number):
        """Loss of the whole step."""
        rank, world = dist.get_rank(), dist.get_world_size()
        ids, mask = blocks(number)
        own = torch.arange(BLOCKS).view(world, -1)[rank]
        loss = loss_share(self.engine, ids[own], mask[own], mask)
        total = loss.detach().float()
        if self.stage is None:
            (loss * world).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            self.engine.backward(loss * world)
            self.engine.step()
        dist.all_reduce(total)
        return total.item()

    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_pieces(directory, dist.get_rank(), self.state.pieces(), self.state.values())
        dist.barrier()
        if dist.get_rank() == 0:
            write_index(directory, dist.get_world_size())
        dist.barrier()

    def close(self):
        if self.stage is not None:
            self.engine.destroy()


def start(optimizer_name, clusters, directory):
    """Train each, save, and go on; returns the losses after the save."""
    _prepare()
    losses = []
    for cluster in clusters:
        run = Run(cluster, optimizer_name)
        for number in range(STEPS):
            run.step(number)
        run.save(directory / str(cluster))
        losses.append([run.step(STEPS + number) for number in range(STEPS)])
        run.close()
    return losses


def resume(optimizer_name, pairs, directory):
    """Load each checkpoint into its new cluster, save it again, and go on; returns the losses."""
    _prepare()
    losses = []
    for source, target in pairs:
        run = Run(target, optimizer_name)
        run.state.load(ShardedState(directory / str(source)))
        run.save(directory / f"{source} to {target}")
        losses.append([run.step(STEPS + number) for number in range(STEPS)])
        run.close()
    return losses


def _prepare():
    prepare_process(use_deepspeed=True)
    import deepspeed

    deepspeed.init_distributed()


def same_state(one, other):
    """Whether two saved states agree in every bit."""
    a, b = ShardedState(one), ShardedState(other)
    return (
        a.specs == b.specs
        and a.values == b.values
        and all(torch.cat(list(a.pieces(name))).equal(torch.cat(list(b.pieces(name)))) for name in a.specs)
    )


def check(directory, optimizer_name, sources, pairs, limit):
    """Rows of the matrix: from, to, whether the state is the same in every bit, largest difference of the losses."""
    expected = {}
    for world, group in itertools.groupby(sorted(sources, key=lambda c: c.world), key=lambda c: c.world):
        clusters = list(group)
        (losses, *_) = run_ranks(start, world, optimizer_name, clusters, directory, timeout=600)
        expected |= dict(zip(clusters, losses, strict=True))
    for world, group in itertools.groupby(sorted(pairs, key=lambda p: p[1].world), key=lambda p: p[1].world):
        own = list(group)
        (losses, *_) = run_ranks(resume, world, optimizer_name, own, directory, timeout=600)
        for (source, target), found in zip(own, losses, strict=True):
            exact = same_state(directory / str(source), directory / f"{source} to {target}")
            worst = max(abs(a - b) for a, b in zip(found, expected[source], strict=True))
            row = f"| {source} | {target} | {optimizer_name} | {'yes' if exact else 'NO'} | {worst:.1e} |"
            print(row)
            assert exact, row
            assert worst <= (0 if source == target else limit), row


PLAIN = Cluster(1, 1, None)


def test_optimizer_state_survives_a_change_of_cluster(tmp_path):
    ring = [PLAIN, Cluster(2, 2, 3), Cluster(2, 1, 1), PLAIN]
    check(tmp_path, "adamw", ring[:-1], [*itertools.pairwise(ring), (ring[1], ring[1])], 1e-5)
    state = ShardedState(tmp_path / f"{ring[1]} to {ring[2]}")
    kinds = {name.partition("/")[0] for name in state.specs}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
    assert state.values["weight/lm_head.weight"] == {"lr": 1e-3, "step": float(STEPS)}


CLUSTERS = [
    PLAIN,
    Cluster(4, 2, 3),
    Cluster(2, 1, 0),
    Cluster(4, 4, 2),
    Cluster(1, 1, 1),
    Cluster(2, 2, 3),
    Cluster(2, 1, None),
    Cluster(4, 1, 3),
    Cluster(2, 2, 1),
    Cluster(4, 4, 0),
    Cluster(1, 1, 3),
    Cluster(4, 2, 1),
    Cluster(2, 1, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_matrix(tmp_path, optimizer_name):
    pairs = [(CLUSTERS[i], CLUSTERS[(i + hop) % len(CLUSTERS)]) for hop in (0, 1, 5) for i in range(len(CLUSTERS))]
    check(tmp_path, optimizer_name, CLUSTERS, pairs, 1e-5)


@pytest.mark.slow
def test_bf16_weights_are_those_of_their_fp32_masters(tmp_path):
    """Between fp32 and bf16 too: a run goes on in the other arithmetic, from the same masters."""
    low = [Cluster(1, 1, 1, "bf16"), Cluster(2, 2, 1, "bf16"), Cluster(2, 1, 2, "bf16"), Cluster(2, 2, 3, "bf16")]
    low.append(Cluster(2, 2, 1, "bf16+"))
    ring = [PLAIN, *low, Cluster(4, 2, 1, "bf16"), PLAIN]
    pairs = [*itertools.pairwise(ring), *zip(low, low, strict=True), (low[3], low[0]), (low[1], low[3])]
    # The losses are near 4: two per cent, as between fp32 and bf16 without a save.
    check(tmp_path, "adamw", ring[:-1], pairs, 8e-2)
