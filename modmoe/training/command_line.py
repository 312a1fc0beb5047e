"""What the entry points of training share: command line, errors, exit codes."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from modmoe.training.errors import ConfigError, RunError, SharedError, exit_code
from modmoe.training.ranks.bootstrap import is_main_process, prepare_process
from modmoe.training.run_config import RunConfig, describe_keys, load_run_config

Run = TypeVar("Run", bound=RunConfig)


def run_command(
    description: str, kind: type[Run], carry_out: Callable[[Run], int], arguments: Sequence[str] | None = None
) -> int:
    """
    Parse the command line, carry the run out and return the exit code.

    Args:
        description: for --help.
        kind: of the configuration.
        carry_out: gets the run; imports what imports DeepSpeed no sooner than it is called, for DeepSpeed reads its
            environment then.
        arguments: of the command line; those of this process if None.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"keys of the config [default]:\n{describe_keys(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the DeepSpeed launcher
    known, overrides = parser.parse_known_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_main_process() else logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # It warns that DeepSpeed's accumulation steps differ from its own, which the Trainer leaves unused.
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # It warns that intervals differ from those of the checkpoint; callbacks.Intervals takes the new ones.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    disable_progress_bar()  # of loading and saving; training has its own
    try:
        run = load_run_config(known.config, overrides, kind)
        prepare_process(use_deepspeed=run.deepspeed is not None)
        code = carry_out(run)
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except (ConfigError, RunError) as error:
        return fail(error, exit_code(error))
    except KeyboardInterrupt as error:  # while the trainer was not there to save
        return exit_code(error)


def fail(error: Exception, code: int) -> int:
    """Print an error, unless another rank does, and return the exit code."""
    # All ranks find the same mistakes, but a disk may be full for one of them.
    if is_main_process() or not isinstance(error, ConfigError | SharedError):
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    return code
