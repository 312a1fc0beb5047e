"""Which run an output directory belongs to: one run at a time, and never over another run or the user's own files."""

import contextlib
import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml

import modmoe
from modmoe.training.checkpoints.checkpoint import checkpoints, latest_complete, writing
from modmoe.training.errors import ConfigError, RunError
from modmoe.training.run_config import RunConfig
from modmoe.training.yaml_config import flatten, load_yaml

FINAL = "final"
# The last file that a run writes.
RESULTS = "results.json"
RUN_FILE = "run.yaml"
_LOCK_FILE = ".lock"
_RUN_FILE_BEGINS = "# modmoe: "
# Settings that make two runs different; the rest may change when a run resumes. How a step's batch is cut up may too,
# as long as it stays as large: `checkpoint.check_batch`.
_IDENTITY = ("model", "data", "tokenizer", "optimization", "init", "seed", "finetuning", "distillation")
_NOT_IDENTITY = (
    "data.cache_dir",
    "data.workers",
    "optimization.micro_batch_size",
    "optimization.gradient_accumulation",
)
_PRODUCTS = (
    RUN_FILE,
    "metrics.jsonl",
    "events.jsonl",
    "status.json",
    "tensorboard",
    FINAL,
    "loss.png",
    RESULTS,
    "expert_use.png",
    "expert_use.json",
    "costs.json",
)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """
    Make the directory and keep other runs out of it, for as long as this process lives at most.

    Raises:
        ConfigError: if a file is in the way.
        RunError: if another run is at work there, or nothing can be written.
    """
    with _open_lock(directory) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another run is at work in output_dir {directory}, perhaps still saving after an interruption: wait "
                "for its end, or choose another output_dir"
            ) from None
        except OSError:
            pass  # some network file systems cannot lock
        yield


def _open_lock(directory: Path) -> TextIO:
    try:
        with writing(directory, directory):
            directory.mkdir(parents=True, exist_ok=True)
            return (directory / _LOCK_FILE).open("w")
    except RunError as error:
        if isinstance(error.__cause__, FileExistsError | NotADirectoryError):
            raise ConfigError(f"output_dir {directory} cannot be made: a file is in the way") from None
        raise


def claim_output_dir(run: RunConfig) -> Path | None:
    """
    Decide whether this run may use its output directory, and where it resumes.

    Returns:
        the checkpoint to resume from, None to start.

    Raises:
        ConfigError: if the directory holds a different run and `overwrite_output` is not set, or a file that would be
            overwritten and is not ours.
    """
    directory = run.output_dir
    run_file = directory / RUN_FILE
    if run_file.is_file() and not run_file.read_text(errors="replace").startswith(_RUN_FILE_BEGINS):
        raise ConfigError(
            f"{run_file} was not written by a run and would be overwritten: rename it, or choose another output_dir"
        )
    if not _holds_run(directory):
        return None
    differing = _differing_keys(run_file, run)
    if not differing:
        return latest_complete(directory)
    if not run.overwrite_output:
        raise ConfigError(
            f"output_dir {directory} holds checkpoints or the final model of another run ({_listing(differing)}); "
            "choose another output_dir, undo the change to resume, or pass --overwrite_output true to delete that run"
        )
    return None


def is_finished(run: RunConfig) -> bool:
    """
    Whether the output directory holds the result of this very run.

    Raises:
        ConfigError: as `claim_output_dir`.
    """
    claim_output_dir(run)
    if not (run.output_dir / FINAL).is_dir() or not (run.output_dir / RESULTS).is_file():
        return False
    return not _differing_keys(run.output_dir / RUN_FILE, run)


def clear_foreign_run(run: RunConfig) -> None:
    """Delete what a different run left in the output directory, once `claim_output_dir` has allowed it."""
    if not _holds_run(run.output_dir) or not _differing_keys(run.output_dir / RUN_FILE, run):
        return
    for path in [*checkpoints(run.output_dir), *(run.output_dir / name for name in _PRODUCTS)]:
        if path.is_dir() and not path.is_symlink():
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
    temporary = directory / f".{RUN_FILE}.tmp"
    temporary.write_text("\n".join([*header, body]))
    os.replace(temporary, directory / RUN_FILE)


def versions() -> dict[str, str]:
    """Versions of what training runs on, our own first."""
    found = {"modmoe": modmoe.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _holds_run(directory: Path) -> bool:
    return bool(checkpoints(directory)) or (directory / FINAL).exists()


def _differing_keys(run_file: Path, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Identity key -> (value there, value here)."""
    if not run_file.is_file():
        return {RUN_FILE: ("missing", "expected")}
    there, here = (_identity(content, run) for content in (load_yaml(run_file), run.model_dump(mode="json")))
    pairs = {key: (there.get(key), here.get(key)) for key in {**there, **here}}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new}


def _identity(content: dict[str, Any], run: RunConfig) -> dict[str, Any]:
    flat = flatten({section: content.get(section) for section in _IDENTITY})
    return {key: value for key, value in flat.items() if key not in (*_NOT_IDENTITY, *run.follows_from_place)}


def _listing(differing: dict[str, tuple[Any, Any]]) -> str:
    shown = [f"{key} is {there!r} there and {here!r} here" for key, (there, here) in list(differing.items())[:3]]
    rest = len(differing) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest else "")
