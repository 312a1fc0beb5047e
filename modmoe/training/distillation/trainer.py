"""Training of one phase: the trainer of whole models, with what a job writes and shows."""

import dataclasses
from pathlib import Path
from typing import Any

from modmoe.data import PreparedData
from modmoe.training.checkpoints.sharded_state import ShardedState
from modmoe.training.distillation.job import Job
from modmoe.training.run_config import RunConfig
from modmoe.training.trainer import Batch, ModMoETrainer


class JobTrainer(ModMoETrainer):
    """Trains a `Job`; its result is what its task saves."""

    model: Job  # type: ignore[assignment]

    def __init__(
        self, model: Job, args: Any, run: RunConfig, data: PreparedData, facts: dict[str, Any] | None = None
    ) -> None:
        model.to(args.device)
        if model.signals is not None:
            train: Any = model.signals.attach(data.train, run, args.world_size)
            data = dataclasses.replace(data, train=train)
        super().__init__(model, args, run, data, facts)  # type: ignore[arg-type]

    @staticmethod
    def describe(model: Job) -> dict[str, str]:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return {"job": model.what, "model": f"{trained:,} parameters are trained"}

    def show(self, directory: Path) -> None:
        print(f"{self.model.what}: saved {directory}")

    def _count_flops(self, model: Any) -> None:
        """Not counted: tasks differ in what runs beside the part that is trained."""

    def _add_to_loss(self, outputs: Any, inputs: Batch, num_labels: Any) -> Batch:
        return {f"distillation/{name}": value for name, value in outputs.parts.items()}

    def _write_plain(self, state: ShardedState, directory: Path) -> None:
        # Who resumes looks at config and tokenizer; the weights are in the state.
        self.model.config.save_pretrained(directory)
        self.data.tokenizer.save_pretrained(directory)

    def _write_final(self, state: ShardedState, directory: Path) -> None:
        self.model.task.save(directory)
