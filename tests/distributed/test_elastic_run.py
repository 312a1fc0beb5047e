"""A whole run that changes its cluster twice: same data, same losses, same model as one that never stopped."""

import dataclasses
import itertools
import json
from zlib import crc32

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.checkpoint import together
from modmoe.training.errors import RunError
from modmoe.training.ranks.bootstrap import prepare_process
from modmoe.training.run_config import load_run_config
from tests.launching import CONFIG, run_ranks

STEPS = 6
COMMON = ["--optimization.steps", str(STEPS), "--evaluation.interval", "0", "--checkpoint.interval", "100"]


@dataclasses.dataclass
class Part:
    """What a rank saw of one launch."""

    blocks: list[list[int]]
    """Per step, a checksum of each training block that it trained on."""
    error: str | None = None


def launch(arguments, stop_after):
    """One launch of a run on this rank, interrupted after a step."""
    run = load_run_config(CONFIG, [*COMMON, *arguments])
    prepare_process(use_deepspeed=run.deepspeed is not None)
    from modmoe.training import pretraining

    part = Part([])

    class Recording(pretraining.ModMoETrainer):
        def get_batch_samples(self, *args):
            batches, count = super().get_batch_samples(*args)
            rows = [row for batch in batches for row in batch["input_ids"]]
            part.blocks.append([crc32(row.numpy().tobytes()) for row in rows])
            if self.state.global_step + 1 == stop_after:
                self.stop._requested = 143
            return batches, count

    pretraining.ModMoETrainer = Recording
    try:
        pretraining.pretrain(run)
    except RunError as error:
        part.error = str(error)
    return part


def steps_of(parts):
    """Per step, the blocks of all ranks."""
    return [sorted(itertools.chain(*own)) for own in zip(*(part.blocks for part in parts), strict=True)]


def options(directory, name, accumulation, deepspeed, size=1):
    paths = ["--output_dir", str(directory / name), "--data.cache_dir", str(directory / "cache")]
    batch = ["--optimization.gradient_accumulation", str(accumulation), "--expert_parallel_size", str(size)]
    return [*paths, *batch, "--deepspeed", json.dumps(deepspeed) if deepspeed else "null"]


def stage(number, **section):
    return {"zero_optimization": {"stage": number, **section}}


def check_moved_run(directory, *common, sharded):
    """One process, two of them with other experts each, and one again: as if nothing had happened."""
    straight = run_ranks(launch, 1, [*options(directory, "straight", 2, None), *common], None, joined=False)
    moved = [
        run_ranks(launch, 1, [*options(directory, "moved", 2, stage(1)), *common], 2, joined=False),
        run_ranks(launch, 2, [*options(directory, "moved", 1, sharded, size=2), *common], 4, joined=False),
        run_ranks(launch, 1, [*options(directory, "moved", 2, None), *common], None, joined=False),
    ]
    assert [[p.error for p in parts] for parts in moved] == [[None], [None, None], [None]]
    blocks = steps_of(straight)
    assert len(set(itertools.chain(*blocks))) == 4 * STEPS
    assert [step for parts in moved for step in steps_of(parts)] == blocks
    one, other = (read_metrics(directory / name / "metrics.jsonl") for name in ("straight", "moved"))
    for name, tolerance in {"loss": 2e-6, "learning_rate": 0, "grad_norm": 1e-5}.items():
        assert [r[name] for r in other] == pytest.approx([r[name] for r in one], rel=tolerance, abs=0), name
    weights = [load_file(directory / name / "final" / "model.safetensors") for name in ("straight", "moved")]
    assert weights[0].keys() == weights[1].keys()
    # Adam makes whole steps of rounding errors where a gradient is nearly zero.
    assert all(weights[1][name].allclose(weights[0][name], atol=2e-4) for name in weights[0])


def test_a_run_that_changes_its_cluster_twice_is_the_same_run(tmp_path):
    check_moved_run(tmp_path, sharded=stage(3))


@pytest.mark.slow
def test_a_run_that_offloads_the_optimizer_is_too(tmp_path):
    check_moved_run(tmp_path, sharded=stage(3, offload_optimizer={"device": "cpu"}))


@pytest.mark.slow
def test_a_streamed_run_is_too(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i} of {i * i} words " * 10}) + "\n" for i in range(300)))
    source = [{"name": "text", "files": [str(text)], "streaming": True, "validation_fraction": 0.1}]
    check_moved_run(tmp_path, "--data.sources", json.dumps(source), sharded=stage(3))


def test_a_disk_that_is_full_for_one_rank_ends_all(tmp_path):
    parts = run_ranks(fail_on_rank_one, 2, tmp_path)
    assert parts == ["disk full", "rank 1: disk full"][::-1]


def fail_on_rank_one(directory):
    def write():
        if dist.get_rank() == 1:
            raise OSError("disk full")

    try:
        together(write)
    except OSError as error:
        return str(error)
