"""A model as a frame and stages: cut, run, put together again, saved stage by stage."""

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from modmoe.distill.frame import Batch, Calls, Frame, blocks_name, layer_type, model_class, new_block, skeleton
from modmoe.distill.ranges import Range, StageSpec, balanced_ranges, checked_ranges, even_ranges, stage_specs
from modmoe.models.safetensors_stream import WEIGHTS, SavedWeights

FRAME = "frame"
STAGE = "stage.json"


class Stage(nn.Module):
    """
    Consecutive blocks of a Hugging Face model.

    Args:
        spec: which blocks of the model it stands for.
        config: of the whole model; `architectures` names its class.
        blocks: the modules; those of a teacher's stage, or fewer that stand for them in a meta model.
        layer_indices: the place in the whole model of each block.
    """

    def __init__(
        self, spec: StageSpec, config: PreTrainedConfig, blocks: Sequence[nn.Module], layer_indices: Sequence[int]
    ) -> None:
        super().__init__()
        self.spec = spec
        self.config = config
        self.layer_indices = tuple(layer_indices)
        self.layer_types = [layer_type(config, i) for i in layer_indices]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden_states: torch.Tensor, calls: Calls) -> torch.Tensor:
        """(B, T, input width) -> (B, T, output width); `calls` are what a `Frame` gives its body."""
        for block, kind in zip(self.blocks, self.layer_types, strict=True):
            hidden_states = calls[kind](block, hidden_states)
        return hidden_states

    def save(self, directory: Path) -> None:
        """Write weights, the model's config and `stage.json`: all that `load` needs."""
        save_part(directory, self.config, self.blocks.state_dict())
        write_stage_file(directory, self.spec, layer_indices=self.layer_indices)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """
        Read a stage that was saved; of the model it belongs to, nothing else is read.

        Raises:
            FileNotFoundError: if the directory holds no stage.
            ValueError: if a file is damaged.
        """
        spec, rest = read_stage_file(directory)
        config = AutoConfig.from_pretrained(directory)
        whole = skeleton(config)
        likes = whole.get_submodule(blocks_name(whole))
        indices = rest.get("layer_indices", [])
        stage = cls(spec, whole.config, [new_block(whole.config, likes[i], i) for i in indices], indices)
        try:
            stage.blocks.load_state_dict(dict(SavedWeights(directory)), assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {directory} do not fit its config ({error}): save the stage again"
            ) from None
        return stage.eval()


class CutOutput(NamedTuple):
    """What a cut model computes."""

    logits: torch.Tensor
    """(B, T, V) of a language model; (B, V) of an image classifier."""
    boundaries: tuple[torch.Tensor, ...]
    """Hidden states (B, T, H) at each boundary: 0 are the embeddings, i + 1 is what stage i gives out."""


def _in_turn(stages: Iterable[nn.Module], hidden_states: torch.Tensor, calls: Calls) -> torch.Tensor:
    for stage in stages:
        hidden_states = stage(hidden_states, calls)
    return hidden_states


class CutModel(nn.Module):
    """
    A frame and its stages, which run one after another: a teacher that was cut, a meta model, or a hybrid of the two.

    Raises:
        ValueError: if stages are missing, in disorder, or do not fit each other.
    """

    def __init__(self, frame: Frame, stages: Sequence[Stage]) -> None:
        super().__init__()
        check_complete([stage.spec for stage in stages])
        self.frame = frame
        self.stages = cast(Sequence[Stage], nn.ModuleList(stages))

    @property
    def specs(self) -> list[StageSpec]:
        """Of every stage."""
        return [stage.spec for stage in self.stages]

    def forward(self, **batch: object) -> CutOutput:
        """Run the model; takes what the whole model takes, and leaves targets out."""
        boundaries: list[torch.Tensor] = []

        def body(hidden_states: torch.Tensor, calls: Calls) -> torch.Tensor:
            boundaries.append(hidden_states)
            for stage in self.stages:
                boundaries.append(stage(boundaries[-1], calls))
            return boundaries[-1]

        logits = self.frame(batch, body)
        return CutOutput(logits, tuple(boundaries))

    def until(self, batch: Batch, stage: int) -> torch.Tensor:
        """(B, T, H): what goes into a stage."""

        def body(hidden_states: torch.Tensor, calls: Calls) -> torch.Tensor:
            return _in_turn(self.stages[:stage], hidden_states, calls)

        return self.frame.enter(batch, body)

    def around(self, batch: Batch, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, H) each: what goes into a stage, and what comes out of it."""
        entering: list[torch.Tensor] = []

        def body(hidden_states: torch.Tensor, calls: Calls) -> torch.Tensor:
            entering.append(_in_turn(self.stages[:stage], hidden_states, calls))
            return self.stages[stage](entering[0], calls)

        leaving = self.frame.enter(batch, body)
        return entering[0], leaving

    def after(self, batch: Batch, stage: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Logits from what comes out of a stage.

        Args:
            batch: inputs of the model; the embeddings are not used, masks and positions are.
            stage: which one.
            hidden_states: (B, T, H), its output.
        """

        def body(_: torch.Tensor, calls: Calls) -> torch.Tensor:
            return _in_turn(self.stages[stage + 1 :], hidden_states, calls)

        return self.frame(batch, body)

    def with_stage(self, stage: Stage) -> "CutModel":
        """The model with another stage in place of the one with its index; modules are shared, not copied."""
        stages = list(self.stages)
        stages[stage.spec.index] = stage
        return CutModel(self.frame, stages)

    def save(self, directory: Path) -> None:
        """Write the frame and every stage into directories of their own; `stage_directory` names them."""
        save_frame(self.frame, directory / FRAME)
        for stage in self.stages:
            stage.save(stage_directory(directory, stage.spec.index))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """
        Read a frame and all its stages.

        Raises:
            FileNotFoundError: if there is no frame.
            ValueError: if stages are missing or files are damaged.
        """
        frame = load_frame(directory / FRAME)
        return cls(frame, [Stage.load(path) for path in sorted(directory.glob("stage_*"))]).eval()


def cut(
    model: PreTrainedModel, stages: int | Sequence[Range], balance: Literal["blocks", "parameters"] = "blocks"
) -> CutModel:
    """
    Cut a model into contiguous stages. Weights are shared with it, not copied.

    Args:
        model: any Hugging Face model that is one stack of blocks between embeddings and a head.
        stages: how many, or explicit ranges of blocks (end excluded).
        balance: what stages have about as much of, where only their number is given.

    Raises:
        ValueError: for stages that do not fit the model, or a model that is not one stack of blocks.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    name = blocks_name(model)
    blocks = model.get_submodule(name)
    if not isinstance(stages, int):
        ranges = checked_ranges(stages, len(blocks))
    elif balance == "blocks":
        ranges = even_ranges(len(blocks), stages)
    elif balance == "parameters":
        ranges = balanced_ranges([sum(p.numel() for p in block.parameters()) for block in blocks], stages)
    else:
        raise ValueError(f"balance={balance!r} must be 'blocks' or 'parameters'")
    outside = {k: v for k, v in model.state_dict().items() if not k.startswith(f"{name}.")}
    modules = [
        Stage(spec, config, blocks[spec.start : spec.stop], range(spec.start, spec.stop))
        for spec in stage_specs(ranges, config.hidden_size)
    ]
    return CutModel(Frame(config, outside), modules).train(model.training)


def join(model: CutModel) -> PreTrainedModel:
    """
    The whole model again, of its own class, with weights shared.

    Raises:
        ValueError: if its stages do not hold every block, as in a meta model.
    """
    config, name = model.frame.config, model.frame.blocks_name
    state = model.frame.weights()
    for stage in model.stages:
        for index, block in zip(stage.layer_indices, stage.blocks, strict=True):
            state |= {f"{name}.{index}.{key}": tensor for key, tensor in block.state_dict().items()}
    with no_init_weights():
        whole = model_class(config)._from_config(copy.deepcopy(config))
    found = whole.load_state_dict(state, strict=False, assign=True)
    missing = sorted(set(found.missing_keys) - set(whole.all_tied_weights_keys))
    if missing:
        raise ValueError(
            f"{len(missing)} weights are in no stage, such as {missing[0]}: a meta model has fewer blocks than its "
            "config says and cannot be joined"
        )
    whole.tie_weights()
    return whole.to(next(iter(state.values())).device).train(model.training)


def check_complete(specs: Sequence[StageSpec]) -> None:
    """
    Whether stages are all those of one model, in order.

    Raises:
        ValueError: names what is missing or does not fit.
    """
    if not specs:
        raise ValueError("there are no stages: give every stage of the model")
    wanted = range(specs[0].num_stages)
    indices = [spec.index for spec in specs]
    missing = sorted(set(wanted) - set(indices))
    if missing:
        raise ValueError(f"stages {_names(missing)} of {len(wanted)} are missing: give every stage, 0 to {wanted[-1]}")
    if indices != list(wanted):
        raise ValueError(f"stages {indices} must be 0 to {wanted[-1]} in order, each once")
    for before, after in pairwise(specs):
        if before.num_stages != after.num_stages or before.stop != after.start:
            raise ValueError(
                f"stage {after.index} of {after.num_stages} begins at block {after.start}, and stage {before.index} "
                f"of {before.num_stages} ends at block {before.stop}: they come from different cuts"
            )
        if before.output_width != after.input_width:
            raise ValueError(
                f"stage {before.index} gives out width {before.output_width} and stage {after.index} takes width "
                f"{after.input_width}: they come from models of different width"
            )


def _names(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices))


def stage_directory(directory: Path, index: int) -> Path:
    """Where a cut model keeps a stage."""
    return directory / f"stage_{index:02d}"


def save_frame(frame: Frame, directory: Path) -> None:
    """Write a frame: its weights, and the config of the whole model."""
    save_part(directory, frame.config, frame.weights())


def load_frame(directory: Path) -> Frame:
    """
    Read a frame; stages are not read.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a file is damaged.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no frame: cut a model and save it there")
    return Frame(AutoConfig.from_pretrained(directory), dict(SavedWeights(directory)))


def read_stage_file(directory: Path) -> tuple[StageSpec, dict[str, Any]]:
    """
    The spec of a saved stage, and what else its `stage.json` says.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = directory / STAGE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no stage: it has no {STAGE}")
    try:
        content = json.loads(path.read_text())
        return StageSpec(**{f.name: content.pop(f.name) for f in dataclasses.fields(StageSpec)}), content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): save the stage again") from None


def write_stage_file(directory: Path, spec: StageSpec, **rest: Any) -> None:
    """Write `stage.json`: the spec, and what else must be known of the stage."""
    (directory / STAGE).write_text(json.dumps(dataclasses.asdict(spec) | rest, indent=2))


def save_part(directory: Path, config: PreTrainedConfig, state: dict[str, torch.Tensor]) -> None:
    """Write weights and a config into a directory, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})


def stages_of(directory: Path) -> Iterator[Stage]:
    """The stages of a saved model one after another, each in memory only while it is used."""
    for path in sorted(directory.glob("stage_*")):
        yield Stage.load(path)
