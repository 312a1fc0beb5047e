"""What a run's configuration asks of the cluster: directories that are shared, and space for checkpoints."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from modmoe.training.distillation.config import DistillRun
from modmoe.training.finetuning.config import FinetuningRun
from modmoe.training.initialization import num_ids
from modmoe.training.run_config import RunConfig, build_model_config, load_run_config
from modmoe.training.yaml_config import load_yaml

# fp32 weights as an export, and to resume from these in full precision with Adam's two moments.
CHECKPOINT_BYTES = 4 * 4
EXPORT_BYTES = 4


class Needs:
    """
    What a run needs.

    Args:
        path: its configuration.
        overrides: `--section.key VALUE` pairs.

    Raises:
        modmoe.training.errors.ConfigError: for mistakes in them.

    Attributes:
        run: the resolved configuration.
        digest: equal for equal configurations.
        directories: what all ranks must share, the output directory first.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.run = load_run_config(path, overrides, _kind(path))
        content = json.dumps(self.run.model_dump(mode="json"), sort_keys=True)
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.directories = [self.run.output_dir, self.run.data.cache_dir]

    def checkpoint_space(self) -> tuple[int, str]:
        """
        Bytes that the run writes below its output directory, at most, and what they consist of.

        A checkpoint is written before the oldest is deleted. Of a distillation it is the last phase that counts.
        """
        parameters, count = self.num_parameters(), self.run.checkpoint.keep + 1
        checkpoint = parameters * CHECKPOINT_BYTES
        pieces = f"{count} checkpoints of {checkpoint / 1e9:.3g} GB and the final model"
        if isinstance(self.run, DistillRun):
            pieces += ", beside the teacher, stages and their signals"
        return count * checkpoint + parameters * EXPORT_BYTES, pieces

    def num_parameters(self) -> int:
        """Parameters of the run's model, which is not made for it."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._model_config())
        return sum(parameter.numel() for parameter in model.parameters())

    def _model_config(self) -> PreTrainedConfig:
        if self.run.init is not None and not self.run.model:
            return AutoConfig.from_pretrained(self.run.init)
        return build_model_config({"vocab_size": self._vocabulary(), **self.run.model})

    def _vocabulary(self) -> int | None:
        name = self.run.tokenizer.name
        if name is None:
            return self.run.tokenizer.vocab_size
        return num_ids(AutoTokenizer.from_pretrained(str(Path(name).expanduser())))


def _kind(path: Path) -> type[RunConfig]:
    """By the sections of the file: of a distillation, a fine-tuning run, or any other."""
    sections = load_yaml(path).keys()
    if sections & {"teacher", "distillation"}:
        return DistillRun
    return FinetuningRun if "finetuning" in sections else RunConfig
