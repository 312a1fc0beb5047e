"""Which checkpoints are complete, and which one a run resumes from.

A checkpoint counts only once its manifest is there, which is written last and atomically. So whatever interrupts
a save, or copies half of a checkpoint, the one before stays the newest that counts.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from modmoe.training.errors import RunError

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
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


def mark_complete(checkpoint: Path, world_size: int, seconds: float) -> None:
    """
    Write the manifest: every file with its size, and what resuming must know.

    Args:
        checkpoint: with all its files written.
        world_size: how many processes wrote it.
        seconds: that the run has trained.
    """
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        _sync(path)  # else a power cut could leave the manifest and lose what it speaks for
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    temporary = checkpoint / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"world_size": world_size, "seconds": seconds, "files": sizes}, indent=1))
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
    if not isinstance(manifest, dict) or manifest.keys() != {"world_size", "seconds", "files"}:
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


def check_world_size(checkpoint: Path, world_size: int) -> None:
    """
    Raises:
        RunError: if another number of processes wrote the checkpoint: optimizer shards, random states
            and the order of the data would not fit.
    """
    written_by = read_manifest(checkpoint)["world_size"]
    if written_by != world_size:
        raise RunError(
            f"{checkpoint} was written by {written_by} processes and cannot be resumed by {world_size}: "
            f"start {written_by} processes, or begin a new run from its weights with --init {checkpoint}"
        )


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
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as a RuntimeError
        previous = _complete(output_dir)[-1:]
        kept = f"; {previous[0]} is untouched: run the same command again to resume" if previous else ""
        raise RunError(f"could not write {path}: {error} ({_free_space(output_dir)}){kept}") from error


def _complete(output_dir: Path) -> list[Path]:
    return [checkpoint for checkpoint in checkpoints(output_dir) if defect(checkpoint) is None]


def _free_space(path: Path) -> str:
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:.1f} MB of its disk are free"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
