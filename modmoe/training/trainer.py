"""The Hugging Face Trainer with what modular models need beyond it.

Loss shares of micro-batches, router losses over whole optimizer steps, expert loads, evaluation per domain, and
checkpoints that are either complete or do not count.
"""

import contextlib
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modmoe.data import PreparedData, StreamingMixture, collate_packed
from modmoe.models import ModMoEForCausalLM
from modmoe.parallel.layout import expert_slice
from modmoe.training.arguments import clips_in_optimizer, run_precision, stores_bf16
from modmoe.training.callbacks import Console, Intervals, MetricsFile, SelectionBias, Stop, TensorBoard
from modmoe.training.checkpoints.checkpoint import (
    STATE,
    checkpoint_dir,
    latest_complete,
    mark_complete,
    prune_checkpoints,
    read_manifest,
    step_of,
    together,
    writing,
)
from modmoe.training.checkpoints.consolidation import check_same_architecture, write_model
from modmoe.training.checkpoints.engine_state import EngineState
from modmoe.training.checkpoints.output_dir import save_run_file
from modmoe.training.checkpoints.sharded_state import Piece, ShardedState, write_index, write_pieces
from modmoe.training.clock import Clock
from modmoe.training.errors import DivergedError, RunError, SharedError
from modmoe.training.evaluation import DomainScore, evaluate_domains
from modmoe.training.monitoring.events import Events
from modmoe.training.monitoring.late import Late
from modmoe.training.monitoring.metric_window import MetricWindow
from modmoe.training.monitoring.nonfinite import Finding, find_nonfinite
from modmoe.training.monitoring.report import sample
from modmoe.training.monitoring.router_load import common_experts, routed_layers
from modmoe.training.monitoring.step_guard import Outcome, StepGuard, poison, skip_if_not_finite
from modmoe.training.monitoring.throughput import (
    flops_per_token,
    parameter_counts,
    peak_tflops,
    trained_parameters,
)
from modmoe.training.optimizer import build_optimizer, build_scheduler
from modmoe.training.precision import autocast
from modmoe.training.ranks.stragglers import Stragglers
from modmoe.training.run_config import RunConfig

Batch = dict[str, torch.Tensor]


def device_peak_tflops(run: RunConfig) -> float | None:
    """What a device of this machine can do in the run's precision, in TFLOP/s; None if that is not known."""
    if run.logging.peak_tflops or not torch.cuda.is_available() or run_precision(run) != "bf16":
        return run.logging.peak_tflops
    return peak_tflops(torch.cuda.get_device_name())


class ModMoETrainer(Trainer):
    """
    Trains a modular causal LM on packed blocks.

    Args:
        model: `ModMoEForCausalLM`.
        args: of `training_arguments`.
        run: the configuration.
        data: datasets and statistics.
        facts: what else to note in the `run.yaml` of each checkpoint.
    """

    model: ModMoEForCausalLM
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None
    control: TrainerControl

    def __init__(
        self,
        model: ModMoEForCausalLM,
        args: TrainingArguments,
        run: RunConfig,
        data: PreparedData,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.data = data
        self.facts = facts or {}
        self.clock = Clock(run.max_minutes)
        self.stop = Stop(self.clock)
        self._layers = routed_layers(model.config)
        self.guard = StepGuard(
            run.health.max_skipped_steps,
            run.health.spike_deviations,
            Events(run.output_dir / "events.jsonl"),
            locate=self._locate_nonfinite,
            contents=self._contents_of_step,
            divergence=self._divergence,
        )
        if isinstance(data.train, StreamingMixture):
            data.train.batch_size = run.optimization.micro_batch_size
        self._stragglers = Stragglers(model.base_model, args.world_size)
        self._peak_tflops = device_peak_tflops(run)
        self._flops_per_token = self._count_flops(model)
        self._window = MetricWindow()
        self._window_start = (0, 0.0)
        self._pauses = 0.0
        self._grad_norm: torch.Tensor | None = None
        self._applied: torch.Tensor | None = None
        self._step_before: Late | None = None
        self._model_options: dict[str, Any] = {}
        self._batches: list[Batch] = []
        self._batches_before: list[Batch] = []
        self._step_tokens = torch.zeros((), dtype=torch.int64)
        self._router_statistics: Any = None
        self._engine_state: Any = None
        self._not_loaded: str | None = None
        callbacks = [Intervals(), MetricsFile(run.output_dir / "metrics.jsonl"), Console(), self.stop]
        if run.logging.tensorboard:
            callbacks.append(TensorBoard(run.output_dir / "tensorboard"))
        if any(self._layers.values()) and model.config.use_selection_bias:
            callbacks.append(SelectionBias(self._window.step_loads))
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_packed,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=data.tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    # ---- For the reader ----

    @staticmethod
    def describe(model: Any) -> dict[str, str]:
        """Name -> a line on the model, before training."""
        config = model.config
        total, active = parameter_counts(model)
        trained = trained_parameters(model)
        frozen = f"; {trained:,} of them are trained" if trained < total else ""
        return {
            "model": f"{total:,} parameters, {active:,} active per token; {config.num_hidden_layers} layers of width "
            f"{config.hidden_size}, {config.num_attn_experts} attention and {config.num_experts} FFN experts{frozen}",
            "aux loss": f"{config.router_aux_loss_type}, coefficient {config.router_aux_loss_coef:g}, z-loss weight "
            f"{config.router_z_loss_weight:g}, over {config.aux_scope}",
        }

    def show(self, directory: Path) -> None:
        """Print what the model writes. It is loaded as any user would load it, whatever engine trained it."""
        unset_hf_deepspeed_config()  # else ZeRO-3 would shard this model as well
        model = AutoModelForCausalLM.from_pretrained(directory).to(self.args.device).eval()
        for domain in self.data.statistics:
            print(f"--- {domain} ---\n{sample(model, self.data.tokenizer, domain)}")
        print(
            f"saved {directory}; load it with: import modmoe; AutoModelForCausalLM.from_pretrained({str(directory)!r})"
        )

    # ---- Optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if self.run.expert_parallel_size > 1:
                from modmoe.parallel.engine import announce  # imports DeepSpeed

                announce(self.model, self.run.expert_parallel_size, self.run.zero_stage)
            optimizer = build_optimizer(model or self.model, self.run.optimization)
            if clips_in_optimizer(self.run):
                optimizer.register_step_pre_hook(self._clip)
            if clips_in_optimizer(self.run) or self.run.deepspeed is None:
                optimizer.register_step_pre_hook(self._skip_if_not_finite)
            self.optimizer = optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            self.lr_scheduler = build_scheduler(optimizer, self.run.optimization, num_training_steps, self.clock)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        self._grad_norm = gradient_norm(gradients, self._expert_group())
        nn.utils.clip_grads_with_norm_(gradients, self.run.optimization.max_grad_norm or float("inf"), self._grad_norm)

    def _expert_group(self) -> dist.ProcessGroup | None:
        if self.run.expert_parallel_size == 1:
            return None
        from modmoe.parallel.engine import expert_parallel_topology  # imports DeepSpeed

        return expert_parallel_topology(self.run.expert_parallel_size).group

    def _skip_if_not_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        assert self._grad_norm is not None
        skip_if_not_finite(optimizer, self._grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm over all ranks. Called once per step: after it in DeepSpeed, which steps in the backward pass."""
        if not clips_in_optimizer(self.run):
            norm = super()._get_grad_norm(model, grad_norm)
            self._grad_norm = torch.as_tensor(norm, device=self.args.device)
        assert self._grad_norm is not None
        self._end_step(self._grad_norm)
        return self._grad_norm

    # ---- One optimizer step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """The micro-batches of one step on this rank, and the number of labels in all of them on all ranks."""
        begun = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        labels = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
        tokens = [_num_tokens(batch) for batch in batches]
        counts = torch.stack([torch.stack(labels).sum(), torch.stack(tokens).sum()]).to(device, torch.float64)
        self._stragglers.add_data_time(time.perf_counter() - begun)
        # How the step before went travels along, in the one collective that each step begins with.
        before = [] if self._applied is None else [self._window.step_loss, ~self._applied]
        sums = torch.stack([*counts, *before])  # float64 holds every count that occurs exactly
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        self._step_before = Late(sums[2:]) if before else None
        self._batches, self._batches_before = batches, self._batches
        self._router_statistics = None
        self._window.begin_step()
        labels_in_step, self._step_tokens = sums[:2].long()
        return batches, labels_in_step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._not_loaded is not None:  # the Trainer's method that is overridden for it is not a public one
            raise SharedError(
                f"cannot resume from {self._not_loaded}: transformers {transformers.__version__} did not ask for it; "
                "install an older version"
            )
        # The Trainer's own sum of losses would never recover from one that is not finite; see MetricWindow.
        return torch.zeros_like(super().training_step(*args, **kwargs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; the sum over micro-batches and ranks is the step's."""
        if self._router_statistics is None:
            self._router_statistics = self._statistics_of_step(model)
        outputs = model(
            **inputs,
            use_cache=False,
            num_items_in_batch=num_items_in_batch,
            num_tokens_in_batch=self._step_tokens,
            router_statistics=self._router_statistics,
            **self._model_options,
        )
        parts = self._add_to_loss(outputs, inputs, num_items_in_batch)
        self._window.add(outputs, _num_tokens(inputs) / self._step_tokens, parts)
        # Data-parallel engines average gradients over ranks, and these are to be added.
        loss = poison(outputs.loss) * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _add_to_loss(self, outputs: Any, inputs: Batch, num_labels: torch.Tensor | int | None) -> Batch:
        """
        Change `outputs.loss`, this micro-batch's share of the step's, to what is trained on. Here it is that already.

        Returns:
            name -> (), this micro-batch's share of each part, for the metrics.
        """
        return {}

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(self._autocast())
        return stack

    def _autocast(self) -> contextlib.AbstractContextManager:
        precision = "fp32" if stores_bf16(self.run) else run_precision(self.run)
        return autocast(precision, self.args.device.type)

    def _statistics_of_step(self, model: nn.Module) -> Any:
        """
        First pass of `aux_scope="global_batch"`, None for other scopes and for models without routers.

        It draws the same random numbers as the training pass that follows.
        """
        if not any(self._layers.values()) or self.model.config.aux_scope != "global_batch":
            return None
        bare = self.accelerator.unwrap_model(model)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            parts = [bare.router_statistics(**self._prepare_inputs(batch)) for batch in self._batches]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.all_reduce() if self.args.world_size > 1 else total

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: the estimate of transformers is for dense models."""
        return 0

    def _end_step(self, grad_norm: torch.Tensor) -> None:
        """Note whether the step counts, and judge the one before, of which the host knows by now."""
        self._applied = grad_norm.isfinite()
        self._window.end_step(self._applied)
        if getattr(getattr(self.model_wrapped, "optimizer", None), "overflow", False):
            # After a step that ZeRO skips, and only then, accelerate leaves out the schedule's as well.
            schedule: Any = self.lr_scheduler
            getattr(schedule, "scheduler", schedule).step()
        if self._step_before is not None:
            loss, skipped = self._step_before.tolist()
            self.guard.judge(Outcome(self.state.global_step, loss, bool(skipped)))

    def _locate_nonfinite(self) -> str:
        """Which rank and module of the step before gave the first number that is not finite. Called by all ranks."""
        partitioned = self.run.zero_stage == 3
        model = self.model_wrapped if partitioned else self.model
        with self._autocast():
            mine = find_nonfinite(model, self._batches_before, self.args.device, backward=not partitioned)
        found: list[Finding | None] = [mine]
        if self.args.world_size > 1:
            found = [None] * self.args.world_size
            dist.all_gather_object(found, mine)
        ranks = [(rank, finding) for rank, finding in enumerate(found) if finding is not None]
        # With expert parallelism the gradients of other ranks follow from one rank's forward pass.
        ranks = [(rank, finding) for rank, finding in ranks if finding.forward] or ranks
        if not ranks:
            searched = "forward pass" if partitioned else "forward and backward pass"
            return f"a second {searched} over the same batch gave finite numbers on every rank"
        more = f"; and on {len(ranks) - 2} other ranks" if len(ranks) > 2 else ""
        return "; ".join(f"on rank {rank} {finding.sentence}" for rank, finding in ranks[:2]) + more

    def _contents_of_step(self, step: int) -> str:
        """Blocks of a step, counted from 1, on all ranks, and how many each domain gave."""
        per_step = self.run.blocks_per_step(self.args.world_size)
        blocks = range((step - 1) * per_step, step * per_step)
        text = f"blocks {blocks.start} to {blocks.stop - 1} of the training data"
        if isinstance(self.data.train, StreamingMixture):
            return text
        domains = Counter(self.data.train.locate(block)[0] for block in blocks)
        return f"{text}: " + ", ".join(f"{count} of {name}" for name, count in domains.most_common())

    # ---- Metrics ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete training records and hand all to the callbacks, except for the Trainer's closing summary."""
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            figures = {name: value for name, value in logs.items() if name != "loss" and value is not None}
            logs = {name: value for name, value in figures.items() if math.isfinite(value)} | self._window_metrics()
        with writing(self.run.output_dir / "metrics.jsonl", self.run.output_dir):
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _divergence(self, symptom: str) -> str:
        good = latest_complete(self.run.output_dir)
        remedy = "lower optimization.learning_rate or raise optimization.warmup_steps"
        if good is not None and self._may_start_another(good):
            remedy += f", and start from the last finite weights with --init {good} and another output_dir"
        return f"training has diverged: {symptom} at step {self.state.global_step}; {remedy}"

    def _may_start_another(self, checkpoint: Path) -> bool:
        """Not one without plain weights, nor one of a phase, which starts from what the phase before it made."""
        return any(checkpoint.glob("model*.safetensors")) and "init" not in self.run.follows_from_place

    def _window_metrics(self) -> dict[str, float]:
        """Figures since the last record, over all ranks."""
        step, begun = self._window_start
        now = time.perf_counter()
        steps, seconds = self.state.global_step - step, now - begun - self._pauses
        self._window_start, self._pauses = (self.state.global_step, now), 0.0
        metrics, loads = self._window.means()
        per_step = self.run.tokens_per_step(self.args.world_size)
        metrics |= {"tokens": self.state.global_step * per_step, "tokens_per_second": steps * per_step / seconds}
        metrics |= self._figures()
        if self._flops_per_token is not None:
            tflops = metrics["tokens_per_second"] * self._flops_per_token / self.args.world_size / 1e12
            metrics["tflops_per_device"] = tflops
            if self._peak_tflops is not None:
                metrics["mfu"] = tflops / self._peak_tflops
        if self.args.world_size > 1:
            metrics |= self._stragglers.metrics(steps, self.args.device)
        common = common_experts(self.model.config)
        return metrics | loads.metrics(self._layers, self.run.expert_parallel_size, common)

    def _count_flops(self, model: ModMoEForCausalLM) -> float | None:
        """Of training on one token; None if that is not known."""
        return flops_per_token(model, self.run.data.sequence_length)

    def _figures(self) -> dict[str, float]:
        """What else a record of training says."""
        return {}

    @contextlib.contextmanager
    def _untimed(self) -> Iterator[None]:
        """Time that the tokens per second leave out."""
        begun = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - begun

    # ---- Training, evaluation, checkpoints ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        first = 0
        self._not_loaded = resume_from_checkpoint
        if resume_from_checkpoint is not None:
            first = step_of(Path(resume_from_checkpoint))
            self.clock.seconds = read_manifest(Path(resume_from_checkpoint))["seconds"]
            self.args.eval_on_start = False  # an earlier launch has done it
        self._window_start = (first, time.perf_counter())
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Engines would look for files of their own formats.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._engine_state = EngineState(self.model, self.optimizer)
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
            self._not_loaded = None
        return prepared

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """Nothing yet: weights come with the optimizer's state."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log loss and bits per byte of each domain."""
        with self._untimed():
            scores = self.score_domains(self.run.evaluation.blocks_per_domain)
        metrics: dict[str, float] = {}
        for name, score in scores.items():
            metrics[f"eval/{name}/nats_per_token"] = score.nats_per_token
            metrics[f"eval/{name}/bits_per_byte"] = score.bits_per_byte
        if metrics:
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score_domains(self, max_blocks: int) -> dict[str, DomainScore]:
        """Evaluate every domain on at most `max_blocks` blocks."""
        return evaluate_domains(
            self.model_wrapped,
            self.data.validation,
            self.data.statistics,
            max_blocks=max_blocks,
            batch_size=self.run.optimization.micro_batch_size,
            device=self.args.device,
            autocast=self._autocast,
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self._is_finite():
            raise DivergedError(self._divergence("a weight is not finite"))
        directory = checkpoint_dir(self.run.output_dir, self.state.global_step)
        with self._untimed():
            if self.args.should_save:
                # What an interrupted save left behind must not mix with the new files.
                shutil.rmtree(directory, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            try:
                with writing(directory, self.run.output_dir):
                    self._write_checkpoint(directory)
            except Exception:  # whatever it was, no half of a checkpoint stays
                shutil.rmtree(directory, ignore_errors=True)
                raise
            if self.args.should_save:
                prune_checkpoints(self.run.output_dir, self.run.checkpoint.keep)

    def _write_checkpoint(self, directory: Path) -> None:
        assert self.lr_scheduler is not None
        schedule = {key: self.lr_scheduler.state_dict()[key] for key in ("last_epoch", "_step_count")}
        values = {**self._engine_state.values(), "schedule": schedule}
        values |= self._values()

        def complete() -> None:
            self.state.save_to_json(str(directory / "trainer_state.json"))
            save_run_file(self.run, directory, self.facts)
            blocks = self.run.blocks_per_step(self.args.world_size)
            mark_complete(directory, self.args.world_size, blocks, self.clock.now())

        together(lambda: self._save_rng_state(str(directory)))
        self._write_model(directory, self._engine_state.pieces(), values, self._write_plain)
        self._on_main_process(complete)

    def _write_model(
        self,
        directory: Path,
        pieces: Iterator[Piece],
        values: dict[str, Any],
        write: Callable[[ShardedState, Path], None],
    ) -> None:
        """Write everybody's pieces below a directory, and to itself what `write` makes of them."""

        def own_part() -> None:
            (directory / STATE).mkdir(parents=True, exist_ok=True)
            write_pieces(directory / STATE, self.args.process_index, pieces, values)

        def whole() -> None:
            write_index(directory / STATE, self.args.world_size)
            write(ShardedState(directory / STATE), directory)

        together(own_part)
        self._on_main_process(whole)

    def _write_plain(self, state: ShardedState, directory: Path) -> None:
        """Write what others than this trainer read of a checkpoint. Called by one process, once the state is there."""
        write_model(state, directory, self.model, self.data.tokenizer)

    def _write_final(self, state: ShardedState, directory: Path) -> None:
        """The same for the result of the run."""
        self._write_plain(state, directory)

    def _values(self) -> dict[str, Any]:
        """What else a checkpoint must hold, for JSON; all processes agree on it."""
        return {}

    def _load_values(self, values: dict[str, Any]) -> None:
        """Take over what `_values` gave."""

    def _on_main_process(self, action: Callable[[], None]) -> None:
        """The others wait, and fail where it fails."""
        together(lambda: action() if self.args.should_save else None)

    def _load_state(self, checkpoint: Path) -> None:
        """
        Go on from a checkpoint of any number of processes, any sharding and any engine.

        Raises:
            SharedError: if it is not one of this model and optimizer.
            RunError: if it is damaged, perhaps where this rank alone reads.
        """
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        try:
            check_same_architecture(checkpoint, self.model.config)
        except ValueError as error:
            raise SharedError(f"cannot resume from {checkpoint}: {error}") from None
        try:
            state = ShardedState(checkpoint / STATE)
            self._engine_state.load(state)
            self._load_values(state.values)
        except (OSError, ValueError) as error:
            raise RunError(f"cannot resume from {checkpoint}: {error}") from error
        rates = [group["lr"] for group in self.optimizer.param_groups]
        schedule = {**state.values["schedule"], "_last_lr": rates, "lr_lambdas": [None] * len(rates)}
        self.lr_scheduler.load_state_dict(schedule)

    def _save_rng_state(self, output_dir: str) -> None:
        try:
            super()._save_rng_state(output_dir)
        except RuntimeError as error:  # as which torch.save reports a full disk
            raise OSError(str(error)) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The states of all processes if there are as many as before, else new ones that no step has had."""
        if checkpoint is None or read_manifest(Path(checkpoint))["world_size"] == self.args.world_size:
            super()._load_rng_state(checkpoint)
            return
        entropy = [self.run.seed, self.state.global_step, self.args.process_index]
        set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _is_finite(self) -> bool:
        """Whether all weights are finite, on all ranks."""
        # Under ZeRO-3 a parameter is empty and this rank's shard of it in ds_tensor.
        shards = [getattr(parameter, "ds_tensor", parameter) for parameter in self.model.parameters()]
        finite = torch.stack([part.isfinite().all() for part in shards]).all().int()
        if self.args.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def save_final(self, directory: Path) -> None:
        """
        Write a plain Hugging Face directory with model, generation config and tokenizer. Called by all ranks.

        It appears, and replaces the one before, only once it is complete.
        """
        temporary = directory.with_name(f".{directory.name}.tmp")
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._write_model(temporary, self._engine_state.weights(), {}, self._write_final)
        if self.args.should_save:
            shutil.rmtree(temporary / STATE)
            shutil.rmtree(directory, ignore_errors=True)
            temporary.rename(directory)
        self.accelerator.wait_for_everyone()


def gradient_norm(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> torch.Tensor:
    """(): Euclidean norm of the whole model's gradient; each process of `group`, if any, holds that of its experts."""
    own = [p.grad for p in parameters if expert_slice(p) is not None and p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if expert_slice(p) is None and p.grad is not None])
    if group is None:
        return norm
    squares = nn.utils.get_total_norm(own).to(norm.device).square()  # of no gradients it is on the host
    dist.all_reduce(squares, group=group)
    return (norm.square() + squares).sqrt()


def _num_tokens(batch: Batch) -> torch.Tensor:
    """(): routed tokens: all tokens of a packed batch, otherwise all but padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return ids.new_full((), ids.numel()) if mask is None else mask.sum()
