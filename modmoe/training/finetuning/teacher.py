"""A frozen model whose predictions are learned beside the data."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from modmoe.losses.distillation import hidden_error, summed_kl
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import TeacherSection
from modmoe.training.initialization import has_vocabulary
from modmoe.training.precision import Precision

_INPUTS = ("input_ids", "position_ids", "attention_mask")
Tensors = dict[str, torch.Tensor]


class Teacher:
    """
    Adds to the loss of a student: (1 - w) CE + w tau^2 KL(teacher || student) + h * error of hidden states.

    Args:
        model: any causal language model of the student's vocabulary, on the student's device.
        section: w, tau and h.
    """

    def __init__(self, model: nn.Module, section: TeacherSection) -> None:
        self._model = model.requires_grad_(False).eval()
        self._section = section

    def teach(
        self,
        outputs: Any,
        inputs: Tensors,
        num_labels: torch.Tensor | int,
        num_tokens: torch.Tensor | int,
    ) -> Tensors:
        """
        Change `outputs.loss` of the student on a micro-batch, its share of a step's loss.

        Args:
            outputs: of the student, with hidden states if their error counts.
            inputs: of the student, with labels.
            num_labels: tokens of the step that are to be predicted; the KL is a mean over them.
            num_tokens: tokens of the step; the error of hidden states is a mean over them.

        Returns:
            name -> (), this micro-batch's share of each part, without weights.
        """
        section, labels = self._section, inputs["labels"]
        with torch.no_grad():
            given = {name: inputs[name] for name in _INPUTS if name in inputs}
            taught = self._model(**given, use_cache=False, output_hidden_states=section.hidden_weight > 0)
        valid = (labels[:, 1:] != -100).flatten()
        logits, wanted = (scores[:, :-1].flatten(0, 1) for scores in (outputs.logits, taught.logits))
        kl = summed_kl(logits, wanted, valid, section.temperature) / torch.as_tensor(num_labels).clamp(min=1)
        soft = section.temperature**2 * kl - outputs.cross_entropy
        outputs.loss = outputs.loss + section.weight * soft
        parts = {"distillation/kl": kl}
        if section.hidden_weight:
            pairs = zip(outputs.hidden_states, taught.hidden_states, strict=True)
            errors = torch.stack([hidden_error(mine, theirs) for mine, theirs in pairs]).mean(0)
            if "attention_mask" in inputs:
                errors = errors.masked_fill(inputs["attention_mask"] == 0, 0.0)
            parts["distillation/hidden"] = errors.sum() / num_tokens
            outputs.loss = outputs.loss + section.hidden_weight * parts["distillation/hidden"]
        return parts


def load_teacher(
    section: TeacherSection,
    init: Path,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    precision: Precision,
    args: TrainingArguments,
) -> Teacher:
    """
    Load the teacher whole in each process, in the precision of the run.

    Args:
        section: which one; without a path the model of `init`.
        init: where the student is from.
        student, tokenizer: what it must fit.
        precision: of the run.
        args: of the trainer.

    Raises:
        ConfigError: if it cannot be loaded or speaks of other tokens; says why.
    """
    name = str(init if section.path is None else Path(section.path).expanduser())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        with without_sharding(args):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), repr(error)).rstrip(".")  # transformers adds advice on networks
        raise ConfigError(
            f"finetuning.teacher: cannot load {name} ({reason}): give the directory of a saved model, or its name on "
            "the hub"
        ) from None
    problem = _mismatch(name, model, student, tokenizer, section.hidden_weight > 0)
    if problem is not None:
        raise ConfigError(f"finetuning.teacher: {name} {problem}")
    return Teacher(model.to(args.device), section)


@contextlib.contextmanager
def without_sharding(args: TrainingArguments) -> Iterator[None]:
    """Models that are loaded in this context are whole in each process, also under ZeRO-3."""
    config = getattr(args, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def _mismatch(
    name: str, model: Any, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, match_hidden: bool
) -> str | None:
    """Why a model cannot teach a student."""
    theirs, ours = model.config.get_text_config(), student.config
    if theirs.vocab_size != ours.vocab_size:
        return (
            f"predicts {theirs.vocab_size} tokens and the student {ours.vocab_size}, so that their distributions "
            "cannot be compared: choose a teacher with the student's vocabulary"
        )
    if not _has_tokenizer(name, tokenizer):
        return (
            "was trained with another tokenizer, so that its tokens mean others than the student's: choose a teacher "
            "with the student's tokenizer"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no position_ids, so that it would read across the documents of a block: choose another teacher"
    here = (ours.num_hidden_layers, ours.hidden_size)
    there = (theirs.num_hidden_layers, theirs.hidden_size)
    if match_hidden and here != there:
        return (
            f"has {there[0]} layers of width {there[1]} and the student {here[0]} of width {here[1]}, so that hidden "
            "states cannot be compared: set hidden_weight to 0"
        )
    return None


def _has_tokenizer(name: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer saved with a model, if one is, gives every token the same id as this one."""
    if Path(name).is_dir():
        return has_vocabulary(Path(name), tokenizer)
    try:
        return AutoTokenizer.from_pretrained(name).get_vocab() == tokenizer.get_vocab()
    except (OSError, ValueError):
        return True
