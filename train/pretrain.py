"""
Pretrain a modular language model.

    deepspeed train/pretrain.py --config configs/train/quickstart.yaml [--section.key VALUE ...]

Any key of the config can be given on the command line: --optimization.learning_rate 3e-4 --init DIR. Running the same
command again resumes. `python train/pretrain.py` works too, as a single process. Exit codes: 0 finished; 2 mistake in
the configuration or the data; 129, 130 and 143 interrupted by a closed terminal, Ctrl-C or SIGTERM, after saving; 1
anything else.
"""

import argparse
import logging
import sys
from pathlib import Path

import threads  # noqa: F401  (before torch)
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from modmoe.training.bootstrap import is_main_process, prepare_process
from modmoe.training.errors import ConfigError, RunError, SharedError, exit_code
from modmoe.training.run_config import RunConfig, describe_keys, load_run_config


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"keys of the config [default]:\n{describe_keys()}",
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
        run = load_run_config(known.config, overrides)
        prepare_process(use_deepspeed=run.deepspeed is not None)
        return train(run)
    except (ConfigError, RunError) as error:
        return _fail(error, exit_code(error))
    except KeyboardInterrupt as error:  # while the trainer was not there to save
        return exit_code(error)


def train(run: RunConfig) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    # DeepSpeed reads its environment when these import it, after prepare_process.
    from modmoe.training.pretraining import pretrain

    code = pretrain(run)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _fail(error: Exception, code: int) -> int:
    # All ranks find the same mistakes, but a disk may be full for one of them.
    if is_main_process() or not isinstance(error, ConfigError | SharedError):
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
