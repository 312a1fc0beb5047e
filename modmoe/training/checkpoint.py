"""Which checkpoints are complete, which one a run resumes from, and whose output directory this is.

A checkpoint counts only once its manifest is there, which is written last and atomically. So whatever interrupts
a save, or copies half of a checkpoint, the one before stays the newest that counts.
"""

import json
import logging
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import modmoe
from modmoe.training.run_config import RunConfig
from modmoe.training.yaml_config import ConfigError, flatten, load_yaml

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
RUN_FILE = "run.yaml"
_PREFIX = "checkpoint-"
# Settings that make two runs different; the rest may change when a run resumes.
_IDENTITY = ("model", "data", "tokenizer", "optimization", "deepspeed", "init", "seed")
_NOT_IDENTITY = ("data.cache_dir", "data.workers")
_PRODUCTS = (
    RUN_FILE,
    "metrics.jsonl",
    "tensorboard",
    "final",
    "loss.png",
    "results.json",
    "expert_use.png",
    "expert_use.json",
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or cannot be used; the message says which and what to do."""


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of one step lives."""
    return output_dir / f"{_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was written at."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a directory, oldest first, complete or not."""
    found = [p for p in output_dir.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit() and p.is_dir()]
    return sorted(found, key=step_of)


def mark_complete(checkpoint: Path, world_size: int) -> None:
    """Write the manifest: every file with its size, and how many processes wrote the checkpoint."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    temporary = checkpoint / f"{MANIFEST}.tmp"
    with temporary.open("w") as file:
        json.dump({"world_size": world_size, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MANIFEST)


def defect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is complete."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
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
        CheckpointError: if another number of processes wrote the checkpoint: optimizer shards, random states
            and the order of the data would not fit.
    """
    written_by = json.loads((checkpoint / MANIFEST).read_text())["world_size"]
    if written_by != world_size:
        raise CheckpointError(
            f"{checkpoint} was written by {written_by} processes and cannot be resumed by {world_size}: "
            f"start {written_by} processes, or begin a new run from its weights with --init {checkpoint}"
        )


def prune_checkpoints(output_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and incomplete ones older than those."""
    complete = [checkpoint for checkpoint in checkpoints(output_dir) if defect(checkpoint) is None]
    if not complete:
        return
    oldest_kept = step_of(complete[-keep:][0])
    for checkpoint in checkpoints(output_dir):
        if step_of(checkpoint) < oldest_kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def claim_output_dir(run: RunConfig) -> Path | None:
    """
    Decide whether this run may use its output directory, and where it resumes.

    Returns:
        the checkpoint to resume from, None to start.

    Raises:
        ConfigError: if the directory holds a different run and `overwrite_output` is not set.
    """
    directory = run.output_dir
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output_dir {directory} is a file")
    found = checkpoints(directory)
    if not found:
        return None
    differing = _differing_keys(directory / RUN_FILE, run)
    if not differing:
        return latest_complete(directory)
    if not run.overwrite_output:
        raise ConfigError(
            f"output_dir {directory} holds checkpoints of another run ({_listing(differing)}); choose "
            "another output_dir, undo the change to resume, or pass --overwrite_output true to delete that run"
        )
    return None


def clear_foreign_run(run: RunConfig) -> None:
    """Delete what a different run left in the output directory, once `claim_output_dir` has allowed it."""
    if not checkpoints(run.output_dir) or not _differing_keys(run.output_dir / RUN_FILE, run):
        return
    for path in [*checkpoints(run.output_dir), *(run.output_dir / name for name in _PRODUCTS)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_run_file(run: RunConfig, directory: Path, facts: dict[str, Any]) -> None:
    """
    Write the resolved configuration, usable as a config file, with versions and other facts in comments.

    Args:
        run: the configuration.
        directory: gets `run.yaml`.
        facts: what the configuration leaves open, such as the number of processes.
    """
    header = [f"# {name}: {value}" for name, value in (versions() | facts).items()]
    body = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{RUN_FILE}.tmp"
    temporary.write_text("\n".join([*header, body]))
    os.replace(temporary, directory / RUN_FILE)


def versions() -> dict[str, str]:
    """Versions of what training runs on."""
    found = {"modmoe": modmoe.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _differing_keys(run_file: Path, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Identity key -> (value there, value here)."""
    if not run_file.is_file():
        return {RUN_FILE: ("missing", "expected")}
    there, here = _identity(load_yaml(run_file)), _identity(run.model_dump(mode="json"))
    pairs = {key: (there.get(key), here.get(key)) for key in {**there, **here}}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _identity(content: dict[str, Any]) -> dict[str, Any]:
    flat = flatten({section: content.get(section) for section in _IDENTITY})
    return {key: value for key, value in flat.items() if key not in _NOT_IDENTITY}


def _listing(differing: dict[str, tuple[Any, Any]]) -> str:
    shown = [f"{key} is {there!r} there and {here!r} here" for key, (there, here) in list(differing.items())[:3]]
    rest = len(differing) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest else "")
