"""The student's stages: contiguous blocks of a modular model, each a model of its own while it is trained.

Language models and image classifiers differ in what comes before and after their blocks: `student_kind` says how.
Letters: B batch, T tokens, H hidden size, V classes, which are a vocabulary or the labels of images.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import nn
from transformers import AutoConfig

from modmoe.distill.frame import TARGETS, Batch, Frame
from modmoe.distill.ranges import StageSpec
from modmoe.distill.seeds import stage_random_state
from modmoe.distill.stages import Stage, read_stage_file, save_part, write_stage_file
from modmoe.losses.router import RouterLosses, RouterStatistics
from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.configuration_vision import ModMoEVisionConfig
from modmoe.models.modeling_modmoe import ModMoEForCausalLM, ModMoEModel, WithRouterLosses
from modmoe.models.modeling_vision import ClassTokenClassifier, ModMoEForImageClassification, ModMoEVisionModel
from modmoe.models.outputs import ModMoEModelOutputWithPast
from modmoe.models.safetensors_stream import SavedWeights

_LAYERS = "model.layers."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

InitializeBlock = Callable[[nn.Module, nn.Module], None]
"""(teacher's block, student's block): writes weights into the latter."""


class StudentOutput(NamedTuple):
    """What a stage computes."""

    hidden_states: torch.Tensor
    """(B, T, H) at its end; of the last stage after the final norm."""
    logits: torch.Tensor | None
    """(B, T, V) of the last stage; (B, V) for images."""
    routing: ModMoEModelOutputWithPast
    """Logits and choices of its routers."""


class StudentKind(NamedTuple):
    """What students of one kind are made of."""

    whole: type[WithRouterLosses]
    """Class of the assembled student."""
    base: type[ModMoEModel]
    """Class of its blocks, with what comes before them."""
    head: str
    """Name of its output layer."""
    build_head: Callable[[ModMoEConfig], nn.Linear]
    """That layer: (B, T, H) -> logits."""
    num_logits: str
    """Field of the config that holds V."""


_LANGUAGE = StudentKind(
    ModMoEForCausalLM,
    ModMoEModel,
    "lm_head",
    lambda config: nn.Linear(config.hidden_size, config.vocab_size, bias=False),
    "vocab_size",
)
_IMAGES = StudentKind(
    ModMoEForImageClassification,
    ModMoEVisionModel,
    "classifier",
    lambda config: ClassTokenClassifier(config.hidden_size, config.num_labels),
    "num_labels",
)


def student_kind(config: ModMoEConfig) -> StudentKind:
    """The kind of student that a config describes."""
    return _IMAGES if isinstance(config, ModMoEVisionConfig) else _LANGUAGE


def stage_config(config: ModMoEConfig, spec: StageSpec) -> ModMoEConfig:
    """
    The config of a stage's blocks alone.

    Raises:
        ValueError: if the stage does not lie in the model, or a tied embedding would be torn apart.
    """
    if not 0 <= spec.start < spec.stop <= config.num_hidden_layers:
        raise ValueError(
            f"stage {spec.index} is the range {spec.start}..{spec.stop} (end excluded), and the student has "
            f"num_hidden_layers={config.num_hidden_layers}"
        )
    if config.tie_word_embeddings and spec.num_stages > 1:
        raise ValueError(
            "tie_word_embeddings=True: the first and the last stage are trained apart and cannot share a weight; "
            "set it to False"
        )
    part = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name.startswith("num_"):
            setattr(part, name, value[spec.start : spec.stop])
    part.num_hidden_layers = spec.num_blocks
    return part


class StudentStage(WithRouterLosses):
    """
    Blocks of a modular model, with the embedding in the first stage and the norm and head in the last.

    Args:
        config: of the whole student.
        spec: which of its blocks.

    Raises:
        ValueError: see `stage_config`.
    """

    def __init__(self, config: ModMoEConfig, spec: StageSpec) -> None:
        super().__init__(stage_config(config, spec))
        self.whole_config = config
        self.spec = spec
        self.model = self.kind.base(self.config)
        if not spec.is_first:
            for name in ("embed_tokens", "embed_positions"):
                setattr(self.model, name, None)
        self.register_module(self.kind.head, self.kind.build_head(config) if spec.is_last else None)
        if not spec.is_last:
            self.model.norm = nn.Identity()
        if config.tie_word_embeddings:
            self._tied_weights_keys = {_HEAD: _EMBEDDING}
        self.post_init()

    @property
    def kind(self) -> StudentKind:
        """Of the whole student."""
        return student_kind(self.whole_config)

    def forward(self, batch: Batch, hidden_states: torch.Tensor | None = None) -> StudentOutput:
        """
        Args:
            batch: inputs of the model: `input_ids` (B, T), and `attention_mask` and `position_ids` if any; or
                `pixel_values` (B, channels, height, width).
            hidden_states: (B, T, H) from the stage before; None in the first stage.
        """
        inputs = {name: value for name, value in batch.items() if name not in TARGETS}
        if not self.spec.is_first:
            inputs |= {self.model.main_input_name: None, "inputs_embeds": hidden_states}
        outputs = self.model(**inputs, use_cache=False, output_router_logits=True)
        hidden_states = outputs.last_hidden_state
        head = getattr(self, self.kind.head)
        return StudentOutput(hidden_states, None if head is None else head(hidden_states), outputs)

    def statistics_of(self, output: StudentOutput, batch: Batch) -> RouterStatistics | None:
        """Sums over the tokens of a forward pass, of FFN and then of attention routers; None without routers."""
        return self._statistics(output.routing, batch.get("attention_mask"))

    def loads(self, output: StudentOutput, batch: Batch) -> dict[str, tuple[torch.Tensor, ...]]:
        """How many tokens chose each expert, under the names of a causal LM's output: (E,) fp32 per router."""
        statistics = self.statistics_of(output, batch)
        if statistics is None:
            return {}
        loads = iter(statistics.tokens_per_expert())
        ffn = tuple(next(loads) for _ in output.routing.router_logits or ())
        return {"tokens_per_expert": ffn, "attn_tokens_per_expert": tuple(loads)}

    def router_losses(
        self,
        output: StudentOutput,
        batch: Batch,
        targets: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_tokens_in_batch: torch.Tensor | int | None = None,
        router_statistics: RouterStatistics | None = None,
    ) -> RouterLosses | None:
        """
        Losses of this stage's routers; None if it has none. Arguments as of `ModMoEForCausalLM.forward`.

        Args:
            targets: (B, T), or (B,) for images; -100 where there is nothing to predict.
        """
        statistics = self.statistics_of(output, batch)
        if statistics is None:
            return None
        shares = (targets, num_items_in_batch, num_tokens_in_batch, router_statistics)
        return self._router_losses(statistics, *shares)

    def save(self, directory: Path, **rest: Any) -> None:
        """Write weights, the whole student's config and `stage.json`, with what else must be known of the stage."""
        tied = self.all_tied_weights_keys
        state = {name: tensor for name, tensor in self.state_dict().items() if name not in tied}
        save_part(directory, self.whole_config, state)
        write_stage_file(directory, self.spec, **rest)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """
        Read a stage that was saved.

        Raises:
            FileNotFoundError: if the directory holds no stage.
            ValueError: if a file is damaged or the weights do not fit.
        """
        spec, _ = read_stage_file(directory)
        stage = cls(AutoConfig.from_pretrained(directory), spec)
        found = stage.load_state_dict(dict(SavedWeights(directory)), strict=False, assign=True)
        missing = set(found.missing_keys) - set(stage.all_tied_weights_keys)
        if missing or found.unexpected_keys:
            raise ValueError(
                f"the weights in {directory} do not fit its config: missing {sorted(missing)}, unexpected "
                f"{sorted(found.unexpected_keys)}; save the stage again"
            )
        stage.tie_weights()
        return stage


def build_student_stage(config: ModMoEConfig, spec: StageSpec, seed: int) -> StudentStage:
    """A stage with fresh fp32 weights that depend on seed and stage alone; arguments as of `StudentStage`."""
    with stage_random_state(seed, "student", spec.index):
        return StudentStage(config, spec).float()


def whole_name(name: str, spec: StageSpec) -> str:
    """The name in the whole student of a weight of its stage."""
    if not name.startswith(_LAYERS):
        return name
    index, _, rest = name.removeprefix(_LAYERS).partition(".")
    return f"{_LAYERS}{int(index) + spec.start}.{rest}"


@torch.no_grad()
def initialize_from(student: StudentStage, weights: Mapping[str, torch.Tensor]) -> None:
    """
    Give a stage its part of a whole student, such as one that `modmoe.surgery.upcycle` made of the teacher.

    Args:
        student: changed in place.
        weights: of the whole student; `SavedWeights` of its directory reads this stage's tensors alone. A tied head,
            which is not saved, is the embedding.

    Raises:
        ValueError: if a weight is missing or has another shape.
    """
    tied = student.all_tied_weights_keys
    for name, tensor in student.state_dict().items():
        source = whole_name(name, student.spec)
        if name in tied:
            continue
        given = weights.get(source)
        if given is None and source == _HEAD:
            given = weights.get(_EMBEDDING)
        if given is None or given.shape != tensor.shape:
            found = "missing" if given is None else f"of shape {tuple(given.shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"{source} is {found}: the weights to start from belong to a student of another config")
        tensor.copy_(given)


def initialize_blocks(student: StudentStage, teacher: Stage, initialize: InitializeBlock) -> None:
    """
    Give every block of a student's stage the weights of the block of the teacher's stage at the same relative depth.

    Args:
        student: changed in place.
        teacher: the stage it is to replace.
        initialize: writes one block into another, such as an upcycling function.
    """
    layers = student.model.layers
    for position, layer in enumerate(layers):
        source = teacher.blocks[(2 * position + 1) * len(teacher.blocks) // (2 * len(layers))]
        with torch.no_grad():
            initialize(source, layer)


@torch.no_grad()
def initialize_ends(student: StudentStage, frame: Frame, projection: torch.Tensor | None = None) -> list[str]:
    """
    Give the first stage the teacher's embedding, and the last one its final norm and head, where shapes allow.

    Through a projection P (see `stitch`) the embedding is E P. A head after an RMSNorm with weight g reads
    W (g * h) sqrt(Ht) / ||h||; for h = P x that is W diag(g) P sqrt(Ht / Hs) after a norm of the student's width
    without weight. Through a LayerNorm no head is exact, so it stays fresh. Of an image model the embedding is that of
    patches, the class token and the positions.

    Args:
        student: changed in place.
        frame: of the teacher.
        projection: (Ht, Hs) of the stitches, None for equal widths.

    Returns:
        names of the weights that were written; all others keep their values.
    """
    written: dict[str, torch.Tensor] = {}
    own = dict(student.named_parameters())
    if student.spec.is_first:
        written |= (_image_embedding if student.kind is _IMAGES else _token_embedding)(frame, projection)
    head, norm = output_layer(frame), final_norm(frame)
    if student.spec.is_last and head is not None and norm is not None:
        own_head = student.kind.head
        same_norm = _is_rms(norm) == (student.config.norm_type == "rmsnorm")
        if projection is None and same_norm:
            written |= {f"model.norm.{name}": value for name, value in norm.named_parameters()}
            written |= {f"{own_head}.{name}": value for name, value in head.named_parameters()}
        elif projection is not None and same_norm and _is_rms(norm):
            scale = (projection.shape[0] / projection.shape[1]) ** 0.5
            written[f"{own_head}.weight"] = (
                _projected(head.weight * cast(torch.Tensor, norm.weight), projection) * scale
            )
    written = {name: value for name, value in written.items() if name in own and own[name].shape == value.shape}
    for name, value in written.items():
        own[name].copy_(value)
    return sorted(written)


def _token_embedding(frame: Frame, projection: torch.Tensor | None) -> dict[str, torch.Tensor]:
    embedding = frame.model.get_input_embeddings()
    return {} if embedding is None else {_EMBEDDING: _projected(embedding.weight, projection)}


def _image_embedding(frame: Frame, projection: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Patches, class token and positions, which are found by their shapes."""
    written: dict[str, torch.Tensor] = {}
    patches = next(module for module in frame.model.modules() if isinstance(module, nn.Conv2d))
    for name, weight in patches.named_parameters():  # their width is in front
        turned = _projected(weight.movedim(0, -1), projection).movedim(-1, 0)
        written[f"model.embed_tokens.projection.{name}"] = turned
    for tokens in frame.model.parameters():
        if tokens.ndim == 3 and tokens.shape[:2] == (1, 1):
            written["model.embed_tokens.class_token"] = _projected(tokens, projection)
        elif tokens.ndim == 3 and len(tokens) == 1:
            written["model.embed_positions.weight"] = _projected(tokens[0], projection)
    return written


def output_layer(frame: Frame) -> nn.Linear | None:
    """The layer that gives the logits: the one that the model declares, or its last linear one; None without any."""
    declared = frame.model.get_output_embeddings()
    linears = [module for module in frame.model.modules() if isinstance(module, nn.Linear)]
    return declared if declared is not None or not linears else linears[-1]


def final_norm(frame: Frame) -> nn.Module | None:
    """The last module of a frame with one weight per element of the hidden states; None if there is none."""
    shape = (frame.config.hidden_size,)
    norms = [m for m in frame.model.modules() if getattr(getattr(m, "weight", None), "shape", None) == shape]
    return norms[-1] if norms else None


def _is_rms(norm: nn.Module) -> bool:
    return getattr(norm, "bias", None) is None


def _projected(weight: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
    return weight if projection is None else weight.float() @ projection


def check_same_tokenizer(teacher: Mapping[str, int], student: Mapping[str, int]) -> None:
    """
    Whether two tokenizers give every token the same id.

    Args:
        teacher, student: token -> id, `get_vocab()` of each.

    Raises:
        ValueError: says where they differ, and why it matters.
    """
    if teacher == student:
        return
    differing = sorted(token for token in teacher.keys() | student.keys() if teacher.get(token) != student.get(token))
    example = differing[0]
    raise ValueError(
        f"teacher and student have different tokenizers: {len(differing)} tokens differ, such as {example!r}, "
        f"{teacher.get(example)} for the teacher and {student.get(example)} for the student. Stages of both run in "
        "one model on the same ids, and logits are compared id by id: use the teacher's tokenizer for the student"
    )
