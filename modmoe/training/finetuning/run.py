"""A fine-tuning run: that of any training run, with what its section `finetuning` adds."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from modmoe.data import MixtureDataset, PreparedData, collate_packed
from modmoe.models import ModMoEForCausalLM
from modmoe.surgery.usage import UsageReport, measure_usage
from modmoe.training.arguments import run_precision
from modmoe.training.checkpoints.checkpoint import RETIRED
from modmoe.training.checkpoints.consolidation import write_all_but_weights, write_model
from modmoe.training.checkpoints.sharded_state import ShardedState
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import FinetuningRun, TeacherSection
from modmoe.training.finetuning.domain import INSIDE, DomainLoss
from modmoe.training.finetuning.lora import ADAPTER, add_adapters, write_adapter, write_merged
from modmoe.training.finetuning.recovery import Recovery
from modmoe.training.finetuning.router_schedule import RouterLossSchedule
from modmoe.training.finetuning.teacher import Teacher, load_teacher, without_sharding
from modmoe.training.finetuning.trained_part import choose_parameters
from modmoe.training.initialization import build_model
from modmoe.training.monitoring.events import Events
from modmoe.training.pretraining import carry_out
from modmoe.training.trainer import Batch, ModMoETrainer


def finetune(run: FinetuningRun) -> int:
    """Fine-tune a saved model; see `carry_out`."""
    return carry_out(run, build_tuned_model, FinetuningTrainer)


def build_tuned_model(run: FinetuningRun, tokenizer: PreTrainedTokenizerFast) -> ModMoEForCausalLM:
    """
    The model of `init`, of which only that requires a gradient which the run trains.

    Raises:
        ConfigError: as `build_model`, and if there is not what the section `finetuning` speaks of.
    """
    model = build_model(run, tokenizer)
    tuning = run.finetuning
    choose_parameters(model, tuning)
    if tuning.method == "lora":
        add_adapters(model, tuning.lora_section, run.init, run.seed)
    if tuning.router_loss is not None:
        model.config.router_aux_loss_type = tuning.router_loss.type
        model.config.router_aux_loss_coef = tuning.router_loss.coefficient
    return model


class FinetuningTrainer(ModMoETrainer):
    """Trains what `build_tuned_model` gave, with schedule, teacher and pruning."""

    run: FinetuningRun

    def __init__(
        self,
        model: ModMoEForCausalLM,
        args: Any,
        run: FinetuningRun,
        data: PreparedData,
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, args, run, data, facts)
        self._events = Events(run.output_dir / "events.jsonl")
        self._schedule = None
        if run.finetuning.router_loss is not None:
            self._schedule = RouterLossSchedule(run.finetuning.router_loss)
            self.add_callback(self._schedule)
        self._recovery = self._make_recovery()
        if self._recovery is not None:
            self.add_callback(self._recovery)
        self._teacher = self._load_teacher()
        self._domain_loss = self._make_domain_loss()
        self._inside: list[torch.Tensor] = []

    def _load_teacher(self) -> Teacher | None:
        section = self.run.finetuning.teacher
        if section is None and self._recovery is not None:
            section = TeacherSection()
        if section is None or not (section.weight or section.hidden_weight):
            return None
        if section.hidden_weight:
            self._model_options["output_hidden_states"] = True
        precision = run_precision(self.run)
        return load_teacher(section, self.run.init, self.model, self.data.tokenizer, precision, self.args)

    def _make_domain_loss(self) -> DomainLoss | None:
        tuning = self.run.finetuning
        if tuning.domain_loss is None:
            return None
        loss = DomainLoss(tuning.domain_loss, self.model, tuning.extensions, self.run.data.sources)
        self.data.train.fields = loss.fields
        self._model_options["output_router_logits"] = True
        return loss

    def get_batch_samples(self, *args: Any) -> Any:
        samples = super().get_batch_samples(*args)
        if self._domain_loss is not None:
            self._inside = [batch.pop(INSIDE) for batch in samples[0]]  # not for the model
        return samples

    def _add_to_loss(self, outputs: Any, inputs: Batch, num_labels: torch.Tensor | int | None) -> Batch:
        parts: Batch = {}
        if self._domain_loss is not None:
            parts |= self._domain_loss.add(outputs, self._inside.pop(0), self._step_tokens)
        if self._teacher is not None:
            assert num_labels is not None
            parts |= self._teacher.teach(outputs, inputs, num_labels, self._step_tokens)
        return parts

    def _figures(self) -> dict[str, float]:
        figures = {} if self._schedule is None else {"router_loss_coefficient": self._schedule.coefficient}
        return figures if self._recovery is None else figures | {"experts_left": self._recovery.share}

    # ---- Pruning ----

    def _make_recovery(self) -> Recovery | None:
        section = self.run.finetuning.pruning
        if section is None:
            return None
        steps = self.run.steps(self.args.world_size)
        last = section.every * math.ceil(section.steps / section.every)
        if last >= steps:
            raise ConfigError(
                f"finetuning.pruning: the last pruning is before step {last + 1}, and the run ends after {steps}: "
                "lower finetuning.pruning.steps or raise optimization.steps"
            )
        report = None
        if section.usage is not None:
            try:
                report = UsageReport.load(section.usage)
                report.check_model(self.run.init)
            except (OSError, ValueError) as error:
                raise ConfigError(f"finetuning.pruning.usage: {error}") from None
        elif not isinstance(self.data.train, MixtureDataset):
            raise ConfigError(
                "finetuning.pruning cannot measure on streamed sources, which are read in order: give a usage report "
                "with finetuning.pruning.usage"
            )
        return Recovery(section, self.model, report, self._measure_usage, self._events)

    def _measure_usage(self, step: int) -> UsageReport:
        """On the blocks that come from a step on, the same on all ranks."""
        data, section = self.data.train, self.run.finetuning.pruning
        assert isinstance(data, MixtureDataset)
        assert section is not None
        first = step * self.run.blocks_per_step(self.args.world_size)
        blocks = range(first, min(first + section.blocks, len(data)))
        size = self.run.optimization.micro_batch_size
        batches = (collate_packed([data[i] for i in blocks[at : at + size]]) for at in range(0, len(blocks), size))
        with self._untimed(), self._autocast():
            return measure_usage(self.model, {"train": batches})

    def _values(self) -> dict[str, Any]:
        return {} if self._recovery is None else {RETIRED: self._recovery.values()}

    def _load_values(self, values: dict[str, Any]) -> None:
        if self._recovery is not None:
            self._recovery.load(values[RETIRED])

    # ---- What is written ----

    def _write_plain(self, state: ShardedState, directory: Path) -> None:
        if self.run.finetuning.method == "lora":
            write_all_but_weights(directory, self.model, self.data.tokenizer)
            write_adapter(state, directory / ADAPTER, self.model)
        elif self._recovery is not None:
            # A plain model would use experts again that are out of use.
            write_all_but_weights(directory, self.model, self.data.tokenizer)
        else:
            super()._write_plain(state, directory)

    def _write_final(self, state: ShardedState, directory: Path) -> None:
        if self._recovery is not None:
            unpruned = directory / "unpruned"
            unpruned.mkdir()
            write_model(state, unpruned, self.model, self.data.tokenizer)
            self._recovery.write_pruned(unpruned, directory)
            shutil.rmtree(unpruned)
            return
        self._write_plain(state, directory)
        if self.run.finetuning.method == "lora":
            with without_sharding(self.args):
                write_merged(self.run.init, directory / ADAPTER, directory, self.model.config)
