"""A Hugging Face model without its blocks: what runs before them and after them, for any family.

Families differ in what they hand to a block: masks, positions, rotary tables, per kind of attention. None of it is
re-implemented here. The model keeps its own forward, and where its blocks were stands a relay: it takes what the
model gives to its blocks, calls a function with it, and returns the function's result as if it were the last block's.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from modmoe import models

Batch = Mapping[str, Any]
# What teaches and what says how, not what goes into the network.
TARGETS = ("labels",)


class Call(NamedTuple):
    """How the model calls its blocks in one forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, H); what else the block returns is dropped."""
        output = block(hidden_states, *self.args, **self.kwargs)
        return output if isinstance(output, torch.Tensor) else output[0]


# By kind of attention: the entry of `config.layer_types`, None in families that have only one kind.
Calls = Mapping[str | None, Call]
Body = Callable[[torch.Tensor, Calls], torch.Tensor]


class _Relay(nn.Module):
    """Stands where the blocks of one kind stood."""

    def __init__(self, extras: int | None) -> None:
        super().__init__()
        self.extras = extras
        self.call: Call | None = None
        self.body: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[Any, ...]:
        self.call = Call(args, kwargs)
        if self.body is not None:
            hidden_states = self.body(hidden_states)
        return hidden_states if self.extras is None else (hidden_states, *[None] * self.extras)


class _Reached(Exception):
    """Ends a forward pass: what was wanted of it is there."""


class Frame(nn.Module):
    """
    What a model runs before and after its blocks: embeddings, positions, masks; final norm and head.

    Args:
        config: of the whole model; `architectures` names its class.
        state: the weights outside of the blocks, under the model's own names; they are shared, not copied.

    Raises:
        ValueError: for an unknown class, a model without a list of blocks, or weights that do not fit.
    """

    def __init__(self, config: PreTrainedConfig, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.config = config
        self.layer_types = list(dict.fromkeys(layer_type(config, i) for i in range(config.num_hidden_layers)))
        self.model = _one_block_per_kind(config, self.layer_types)
        self.blocks_name = blocks_name(self.model)
        extras = _extra_outputs(self.model, self.blocks_name)
        self._relays = [_Relay(extras) for _ in self.layer_types]
        self.model.set_submodule(self.blocks_name, nn.ModuleList(self._relays))
        self._take(state)
        self.eval()

    def forward(self, batch: Batch, body: Body) -> torch.Tensor:
        """
        Run the model with `body` in place of its blocks.

        Args:
            batch: inputs of the model, as it takes them; targets are left out.
            body: (B, T, H) of the embeddings, and how to call blocks -> (B, T, H) for the final norm.

        Returns:
            logits, (B, T, V) of a language model, (B, V) of an image classifier.
        """
        relays = self._relays
        relays[-1].body = lambda hidden_states: body(hidden_states, self._calls())
        try:
            return self.model(**{name: value for name, value in batch.items() if name not in TARGETS}).logits
        finally:
            relays[-1].body = None
            for relay in relays:
                relay.call = None

    def enter(self, batch: Batch, body: Body) -> torch.Tensor:
        """As `forward`, up to what `body` returns: final norm and head are not run."""
        reached: list[torch.Tensor] = []

        def last(hidden_states: torch.Tensor, calls: Calls) -> torch.Tensor:
            reached.append(body(hidden_states, calls))
            raise _Reached

        with contextlib.suppress(_Reached):
            self(batch, last)
        return reached[0]

    def _calls(self) -> dict[str | None, Call]:
        calls = {kind: relay.call for kind, relay in zip(self.layer_types, self._relays, strict=True)}
        return {kind: call for kind, call in calls.items() if call is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights under the whole model's names, each once: a tied head is the embedding."""
        tied = self.model.all_tied_weights_keys
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}

    def _take(self, state: Mapping[str, torch.Tensor]) -> None:
        tied = set(self.model.all_tied_weights_keys)
        state = {name: tensor for name, tensor in state.items() if name not in tied}
        found = self.model.load_state_dict(state, strict=False, assign=True)
        missing = sorted(set(found.missing_keys) - tied)
        if missing or found.unexpected_keys:
            raise ValueError(
                f"weights do not fit the config of a {type(self.model).__name__}: missing {missing}, unexpected "
                f"{sorted(found.unexpected_keys)}; take both from one model"
            )
        self.model.tie_weights()
        self.to(next(iter(state.values())).device)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """
    The class that a config names.

    Raises:
        ValueError: if it names none that modmoe or transformers have.
    """
    name = (config.architectures or ["none"])[0]
    for library in (models, transformers):
        found = getattr(library, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"config.architectures names {name!r}, which is no model class of modmoe or of transformers "
        f"{transformers.__version__}: save the teacher again, with its own class"
    )


def layer_type(config: PreTrainedConfig, index: int) -> str | None:
    """Kind of attention of a block; None in families that have only one."""
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds else None


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model without numbers (on PyTorch's meta device): its classes, names and shapes."""
    with torch.device("meta"), no_init_weights():
        return model_class(config)._from_config(copy.deepcopy(config))


def new_block(config: PreTrainedConfig, like: nn.Module, index: int) -> nn.Module:
    """
    Another block with memory for its weights, which hold no useful numbers yet.

    Args:
        config: of the whole model.
        like: a block of the class, as in the `skeleton`.
        index: its place in the whole model, which some families look at.
    """
    cls = type(like)
    names = {"layer_idx", "layer_id"} & inspect.signature(cls.__init__).parameters.keys()
    with no_init_weights():
        block = cls(config, **dict.fromkeys(names, index))
    return block.eval()


def blocks_name(model: PreTrainedModel) -> str:
    """
    Where a model keeps its blocks: the list of `num_hidden_layers` modules that holds most parameters.

    Raises:
        ValueError: if there is no such list.
    """
    wanted = model.config.num_hidden_layers
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    }
    if not sizes:
        raise ValueError(
            f"{type(model).__name__} has no list of num_hidden_layers={wanted} blocks: only models that are one stack "
            "of blocks can be cut into stages"
        )
    return max(sizes, key=lambda name: sizes[name])


def _one_block_per_kind(config: PreTrainedConfig, kinds: list[str | None]) -> PreTrainedModel:
    """A model of the family with its first block of each kind, without weights."""
    total = config.num_hidden_layers
    firsts = [next(i for i in range(total) if layer_type(config, i) == kind) for kind in kinds]
    small = copy.deepcopy(config)
    if hasattr(small, "use_cache"):
        small.use_cache = False
    # Whatever is listed per layer: kinds of attention, numbers of experts.
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:
            setattr(small, name, [value[i] for i in firsts])
    small.num_hidden_layers = len(firsts)
    with no_init_weights():
        return model_class(config)._from_config(small)


def _extra_outputs(model: PreTrainedModel, name: str) -> int | None:
    """
    How many values blocks return after the hidden states; None if they return a bare tensor.

    The blocks that the frame throws away tell it, in a forward pass over the smallest input.
    """
    returned: list[Any] = []
    hook = model.get_submodule(f"{name}.0").register_forward_hook(lambda *arguments: returned.append(arguments[-1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.eval()(**_smallest_input(model))
    hook.remove()
    return None if isinstance(returned[0], torch.Tensor) else len(returned[0]) - 1


def _smallest_input(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {model.main_input_name: torch.zeros(1, model.config.num_channels, height, width, dtype=model.dtype)}
