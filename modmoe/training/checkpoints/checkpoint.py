"""Which checkpoints are complete, and which one a run resumes from.

A checkpoint counts only once its manifest is there, which is written last and atomically. So whatever interrupts
a save, or copies half of a checkpoint, the one before stays the newest that counts.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from modmoe.training.errors import RunError, SharedError

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
# The directory, in a checkpoint, of what the processes saved in pieces.
STATE = "state"
# Among the values of that state: the experts that are there and out of use.
RETIRED = "retired_experts"
_MANIFEST_KEYS = {"world_size", "blocks_per_step", "seconds", "files"}
_PREFIX = "checkpoint-"


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of one step lives."""
    return output_dir / f"{_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was written at."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a directory, oldest first, complete or not."""
    found = [p for p in output_dir.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal() and p.is_dir()]
    return sorted(found, key=step_of)


def mark_complete(checkpoint: Path, world_size: int, blocks_per_step: int, seconds: float) -> None:
    """
    Write the manifest: every file with its size, and what resuming must know.

    Args:
        checkpoint: with all its files written.
        world_size: how many processes wrote it.
        blocks_per_step: of training data on all processes together.
        seconds: that the run has trained.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        _sync(path)  # else a power cut could leave the manifest and lose what it speaks for
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    temporary = checkpoint / f"{MANIFEST}.tmp"
    content = {"world_size": world_size, "blocks_per_step": blocks_per_step, "seconds": seconds, "files": sizes}
    temporary.write_text(json.dumps(content, indent=1))
    _sync(temporary)
    os.replace(temporary, checkpoint / MANIFEST)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """
    What `mark_complete` wrote.

    Raises:
        FileNotFoundError: if the save was interrupted.
        ValueError: if the file is damaged.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.keys() != _MANIFEST_KEYS:
        raise ValueError(f"{checkpoint / MANIFEST} is not a manifest")
    return manifest


def defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is complete."""
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return "its save was interrupted"
    except ValueError:
        return f"its {MANIFEST} is damaged"
    for name, size in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def latest_complete(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; newer incomplete ones are skipped with a warning."""
    for checkpoint in reversed(checkpoints(output_dir)):
        problem = defect(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("skipping checkpoint %s: %s", checkpoint, problem)
    return None


def check_batch(checkpoint: Path, world_size: int, micro_batch_size: int, gradient_accumulation: int) -> None:
    """
    Check that the steps of this launch are as large as those before.

    The order of the data goes by blocks: with as many blocks per step, any number of processes goes on where others
    stopped, without repeating or losing a block, and with the same learning rates.

    Raises:
        SharedError: if they are not; says what to do.
    """
    before = read_manifest(checkpoint)["blocks_per_step"]
    now = micro_batch_size * gradient_accumulation * world_size
    if now != before:
        raise SharedError(
            f"{checkpoint} was written with {before} blocks per step, and micro_batch_size={micro_batch_size} x "
            f"gradient_accumulation={gradient_accumulation} x {world_size} processes are {now}: "
            f"{_batch_remedy(before, world_size, micro_batch_size)}"
        )


def _batch_remedy(blocks: int, world_size: int, micro_batch_size: int) -> str:
    per_process, rest = divmod(blocks, world_size)
    if rest:
        return f"start a number of processes that divides {blocks}"
    fits = max(size for size in range(1, min(per_process, micro_batch_size) + 1) if per_process % size == 0)
    accumulation = f"set optimization.gradient_accumulation to {per_process // fits}"
    return accumulation if fits == micro_batch_size else f"{accumulation} and optimization.micro_batch_size to {fits}"


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and incomplete ones older than those."""
    complete = _complete(output_dir)
    if not complete:
        return
    oldest_kept = step_of(complete[-keep:][0])
    for checkpoint in checkpoints(output_dir):
        if step_of(checkpoint) < oldest_kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path, output_dir: Path) -> Iterator[None]:
    """
    The context in which something of a run is written.

    Args:
        path: what is written.
        output_dir: of the run.

    Raises:
        RunError: where writing fails; says how much space is left and from where the run can go on.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        previous = _complete(output_dir)[-1:]
        kept = f"; {previous[0]} is untouched: run the same command again to resume" if previous else ""
        raise RunError(f"could not write {path}: {error} ({_free_space(output_dir)}){kept}") from error


def together(action: Callable[[], None]) -> None:
    """
    Do something on all processes; if one of them fails, all do, so that none waits for it.

    Raises:
        OSError: on processes that did not fail themselves; names the one that did.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        action()
        return
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise OSError(f"rank {rank}: {message}")


def _complete(output_dir: Path) -> list[Path]:
    return [checkpoint for checkpoint in checkpoints(output_dir) if defect(checkpoint) is None]


def _free_space(path: Path) -> str:
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f} MB of its disk are free"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
