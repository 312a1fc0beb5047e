"""What a run's configuration is in the terms of the Hugging Face Trainer and of DeepSpeed."""

from typing import Any

from transformers import TrainingArguments

from modmoe.training.precision import Precision, device_type, resolve_precision
from modmoe.training.ranks.bootstrap import world_size
from modmoe.training.run_config import RunConfig


def training_arguments(run: RunConfig) -> TrainingArguments:
    """Settings of the Hugging Face Trainer; making them also sets up the process group."""
    optimization = run.optimization
    on_gpu = device_type() == "cuda"
    args = TrainingArguments(
        output_dir=str(run.output_dir),
        max_steps=run.steps(world_size()),
        per_device_train_batch_size=optimization.micro_batch_size,
        gradient_accumulation_steps=optimization.gradient_accumulation,
        learning_rate=optimization.learning_rate,
        max_grad_norm=0.0 if clips_in_optimizer(run) else optimization.max_grad_norm,
        bf16=stores_bf16(run),
        deepspeed=deepspeed_config(run),
        use_cpu=not on_gpu,
        seed=run.seed,
        train_sampling_strategy="sequential",  # the data set is shuffled already
        remove_unused_columns=False,
        dataloader_num_workers=run.data.workers,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},  # else the host waits for the device at every batch
        ddp_find_unused_parameters=False,
        ddp_timeout=round(60 * run.health.stuck_minutes),
        logging_steps=run.logging.interval,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # would hide a diverged run, and wait for the device at every step
        eval_strategy="steps" if run.evaluation.interval else "no",
        eval_steps=run.evaluation.interval or None,
        eval_on_start=run.evaluation.at_start,
        save_strategy="steps",
        save_steps=run.checkpoint.interval,
        use_cache=True,  # of the saved config; the trainer itself turns the cache off per call
        report_to=[],
        log_level="warning",
    )
    # A process uses one GPU; without a launcher the Trainer would split each batch, enlarged, over all that it sees.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def deepspeed_config(run: RunConfig) -> dict[str, Any] | None:
    """
    The DeepSpeed configuration of the run: its own section, completed by what other sections decide.

    bf16 means autocast over fp32 weights unless the section enables "bf16", which stores weights in bf16 and keeps
    fp32 ones in the optimizer: less memory on GPUs, but router weights are rounded too.
    """
    if run.deepspeed is None:
        return None
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        # Else accelerate replaces an offloaded optimizer by one that is compiled at the start.
        "zero_force_ds_cpu_optimizer": False,
        **run.deepspeed,
    }
    if run_precision(run) == "bf16" and not stores_bf16(run):
        config.setdefault("torch_autocast", {"enabled": True, "dtype": "bfloat16"})
    if clips_in_optimizer(run):
        config["gradient_clipping"] = 0.0
    return config


def run_precision(run: RunConfig) -> Precision:
    """The precision that the run's setting means on this machine."""
    return resolve_precision(run.optimization.precision, device_type())


def stores_bf16(run: RunConfig) -> bool:
    """Whether DeepSpeed keeps the model's weights in bf16."""
    return bool((run.deepspeed or {}).get("bf16", {}).get("enabled")) and run_precision(run) == "bf16"


def clips_in_optimizer(run: RunConfig) -> bool:
    """DeepSpeed without ZeRO clips but does not tell the norm, so that is done here."""
    return run.zero_stage == 0
