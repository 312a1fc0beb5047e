"""The teacher, cut into stages that are saved one by one."""

import hashlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from modmoe.data.tokenizer import existing_tokenizer
from modmoe.distill.stages import CutModel, cut, load_frame
from modmoe.distill.student import check_same_tokenizer
from modmoe.models import ModMoEConfig
from modmoe.surgery.fingerprint import checkpoint_fingerprint, difference
from modmoe.training.checkpoints.checkpoint import writing
from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.places import Places
from modmoe.training.errors import ConfigError
from modmoe.training.initialization import model_config, num_ids

_CUT = "cut.json"


class CutTeacher(NamedTuple):
    """What is known of the teacher without loading its stages."""

    identity: str
    """Changes with its weights and with the cut."""
    student: ModMoEConfig
    """Of the student that the run asks for, with the teacher's vocabulary."""
    width: int
    """Of the teacher's hidden states."""

    @property
    def needs_projection(self) -> bool:
        """Whether hidden states of teacher and student differ in width."""
        return self.width != self.student.hidden_size


def cut_teacher(run: DistillRun, places: Places) -> None:
    """
    Cut the teacher and save its parts, with its tokenizer, unless they are there.

    Raises:
        ConfigError: if it cannot be loaded, cut, or teach this student; or if other parts are there.
    """
    if (places.teacher / _CUT).is_file():
        if not run.overwrite_output:
            _check_same(run, places)
        if _difference(run, places) is None:
            _check_tokenizer(run, existing_tokenizer(str(places.frame)))
            return
    tokenizer = _tokenizer(run)
    model = _load(run.teacher)
    parts = _cut(run, model)
    temporary = places.teacher.with_name(".teacher.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(places.teacher, run.output_dir):
        parts.save(temporary)
        tokenizer.save_pretrained(temporary / places.frame.name)
    content = {
        "parts": part_fingerprints(temporary),
        "teacher": run.teacher,
        "source": _source(run.teacher),
        "stages": _cut_settings(run),
        "parameters": sum(p.numel() for p in model.parameters()),
        "ranges": [(spec.start, spec.stop) for spec in parts.specs],
    }
    (temporary / _CUT).write_text(json.dumps(content, indent=2))
    shutil.rmtree(places.teacher, ignore_errors=True)
    temporary.rename(places.teacher)


def open_teacher(run: DistillRun, places: Places) -> CutTeacher:
    """
    What the run must know of the teacher that was cut; its stages need not be there.

    Raises:
        ConfigError: if nothing was cut, or for another run; or if it cannot teach this student.
    """
    if not (places.teacher / _CUT).is_file():
        raise ConfigError(
            f"{places.teacher} holds no teacher that was cut: run the same command without --stage first, or copy it "
            f"from where that ran, with {places.meta} if there is one"
        )
    _check_same(run, places)
    _check_parts(places)
    frame = load_frame(places.frame)
    size, asked = frame.config.get_text_config().vocab_size, run.model.get("vocab_size")
    if asked not in (None, size):
        raise ConfigError(
            f"model.vocab_size={asked}, and the teacher predicts {size} tokens: logits are compared one by one, so "
            "leave it out"
        )
    tokenizer = existing_tokenizer(str(places.frame))
    if num_ids(tokenizer) > size:
        raise ConfigError(
            f"teacher: its tokenizer has {num_ids(tokenizer)} tokens and it knows {size}, as if tokens had been added "
            "without training: save it with the tokenizer that it was trained with, or after resize_token_embeddings"
        )
    length, longest = run.data.sequence_length, getattr(frame.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigError(
            f"data.sequence_length={length} is more than the {longest} positions that the teacher knows "
            f"(max_position_embeddings): lower it to {longest}"
        )
    student = model_config(dict(run.model) | {"vocab_size": size}, tokenizer)
    _check_widths(run, frame.config, student)
    return CutTeacher(parts_identity(_saved(places)["parts"]), student, frame.config.hidden_size)


def teacher_parameters(places: Places) -> int:
    """Of the whole teacher."""
    return int(_saved(places)["parameters"])


def _check_widths(run: DistillRun, teacher: PreTrainedConfig, student: ModMoEConfig) -> None:
    """
    Raises:
        ConfigError: if what is to be compared has no common width.
    """
    width, section = teacher.hidden_size, run.distillation.pairs
    if student.hidden_size > width and section.stitch == "projection":
        raise ConfigError(
            f"model.hidden_size={student.hidden_size} is more than the teacher's {width}: stitches of kind "
            "'projection' lead to a narrower student only; lower it, or set distillation.pairs.stitch to 'linear'"
        )
    heads = section.objective.relation_heads
    if section.objective.relation_weight and (student.hidden_size % heads or width % heads):
        raise ConfigError(
            f"distillation.pairs.objective.relation_heads={heads} must divide the widths of teacher and student, "
            f"{width} and {student.hidden_size}"
        )
    theirs, ours = ((c.num_hidden_layers, c.hidden_size) for c in (teacher, student))
    last = run.end_to_end.teacher
    if last is not None and last.hidden_weight and theirs != ours:
        raise ConfigError(
            f"finetuning.teacher.hidden_weight={last.hidden_weight} compares every block, and the teacher has "
            f"{theirs[0]} of width {theirs[1]}, the student {ours[0]} of width {ours[1]}: set it to 0"
        )


def _tokenizer(run: DistillRun) -> PreTrainedTokenizerFast:
    try:
        tokenizer = existing_tokenizer(run.teacher)
    except (ValueError, OSError) as error:
        raise ConfigError(f"tokenizer: {error}") from None
    _check_tokenizer(run, tokenizer)
    return tokenizer


def _check_tokenizer(run: DistillRun, teachers: PreTrainedTokenizerFast) -> None:
    """
    Raises:
        ConfigError: if the run asks for another one than the teacher's.
    """
    try:
        if run.tokenizer.name is None:
            raise ValueError("the student reads with the teacher's tokenizer: remove the section 'tokenizer'")
        if run.tokenizer.name != run.teacher:
            check_same_tokenizer(teachers.get_vocab(), existing_tokenizer(run.tokenizer.name).get_vocab())
    except (ValueError, OSError) as error:
        raise ConfigError(f"tokenizer: {error}") from None


def _load(name: str) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(str(Path(name).expanduser()), dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"teacher: cannot load {name}: {error}") from None
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"teacher: a {type(model).__name__} takes no position_ids, so that it would read across the documents of "
            "a block: choose another one"
        )
    return model.eval()


def _cut(run: DistillRun, model: PreTrainedModel) -> CutModel:
    """
    Raises:
        ConfigError: for stages that do not fit, or if the parts do not compute what the model does, as where blocks
            are given inputs of their own.
    """
    section = run.distillation.stages
    ids = {"input_ids": torch.arange(16).remainder(model.config.get_text_config().vocab_size).reshape(2, 8)}
    try:
        parts = cut(model, section.ranges or section.count, section.balance)
        with torch.no_grad():
            whole, joined = model(**ids).logits, parts(**ids).logits
    except ValueError as error:
        raise ConfigError(f"distillation.stages: {error}") from None
    except (AssertionError, AttributeError, LookupError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"teacher: a {type(model).__name__} cannot be cut into stages ({error!r}): choose a model that is one "
            "stack of blocks between embeddings and a head"
        ) from None
    if not torch.allclose(joined, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item()):
        raise ConfigError(
            f"teacher: the stages of this {type(model).__name__} do not compute what the model does, so its blocks "
            "are more than one stack: choose another teacher"
        )
    return parts


def _cut_settings(run: DistillRun) -> dict[str, Any]:
    return run.distillation.stages.model_dump(mode="json", exclude={"student_ranges"})


def _saved(places: Places) -> dict[str, Any]:
    path = places.teacher / _CUT
    try:
        saved = json.loads(path.read_text())
        return saved | {"parts": dict(saved["parts"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}): remove {places.teacher}, and it is cut again") from None


def _check_same(run: DistillRun, places: Places) -> None:
    problem = _difference(run, places)
    if problem is not None:
        raise ConfigError(
            f"{places.teacher} holds another teacher or cut ({problem}): choose another output_dir, or pass "
            "--overwrite_output true"
        )


def _difference(run: DistillRun, places: Places) -> str | None:
    saved, settings = _saved(places), _cut_settings(run)
    for name, value in settings.items():
        if saved["stages"].get(name) != value:
            return f"distillation.stages.{name} is {saved['stages'].get(name)!r} there and {value!r} here"
    source = _source(run.teacher)
    if source is not None and saved["source"] is not None:
        return None if source == saved["source"] else f"the model in {run.teacher} has changed"
    # One of the hub, or one that is not here; a machine that trains one pair may not have it at all.
    if run.stage is None and run.teacher != saved["teacher"]:
        return f"teacher is {saved['teacher']!r} there and {run.teacher!r} here"
    return None


def _check_parts(places: Places) -> None:
    """
    Raises:
        ConfigError: if one that is there is not what was cut, as after copying another one from elsewhere.
    """
    for name, expected in _saved(places)["parts"].items():
        part = places.teacher / name
        if not part.is_dir():
            continue  # a machine that trains one pair in a meta model needs no other stages
        try:
            problem = difference(expected, checkpoint_fingerprint(part))
        except (FileNotFoundError, ValueError) as error:
            problem = str(error)
        if problem is not None:
            raise ConfigError(
                f"{part} is not what was cut ({problem}): copy it again from where that was done, or remove "
                f"{places.teacher}, and the teacher is cut anew"
            )


def _source(name: str) -> dict[str, str] | None:
    directory = Path(name).expanduser()
    return checkpoint_fingerprint(directory) if (directory / "config.json").is_file() else None


def part_fingerprints(directory: Path) -> dict[str, dict[str, str]]:
    """Name -> fingerprint, of the frame and the stages that lie in a directory."""
    parts = sorted(path for path in directory.iterdir() if path.is_dir())
    return {part.name: checkpoint_fingerprint(part) for part in parts}


def parts_identity(fingerprints: dict[str, dict[str, str]]) -> str:
    """Of a model in parts: changes with their weights and configs."""
    return hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()[:16]
