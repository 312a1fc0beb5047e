"""Which part of weights and optimizer state this process holds, under plain PyTorch and every ZeRO stage.

An engine keeps each weight that it trains in full precision as an interval of some tensor that the optimizer steps:
the parameter itself, or a flat one made of many (ZeRO). The optimizer's state has the shape of that tensor. So a
process's share of a parameter is one interval, here called a fragment, and its state the same interval of every state
tensor.

Relies on internals of DeepSpeed 0.19: `param._hp_mapping` (stages 1 and 2), `grad_position` and `ds_tensor` (stage 3).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from modmoe.parallel.layout import expert_slice
from modmoe.training.checkpoints.checkpoint import together
from modmoe.training.checkpoints.sharded_state import Piece, ShardedState
from modmoe.training.errors import RunError

WEIGHT = "weight"
_LEARNING_RATE = "lr"


class _Fragment(NamedTuple):
    """An interval of a parameter or buffer that this process holds; empty if it holds none."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor, with all experts."""
    start: int
    """Of the interval in the whole tensor."""
    weight: torch.Tensor
    """(n,) a view on the values in full precision."""
    saved: slice
    """What this process writes of it: replicas share the work."""
    group: dict[str, Any] | None = None
    """The optimizer's group that the parameter is in; None: not trained."""
    stepped: torch.Tensor | None = None
    """The tensor that the optimizer steps, of which `weight` is a part."""
    offset: int = 0
    """Where `weight` begins in `stepped`."""


class EngineState:
    """
    The state of a training process: its intervals of all weights, buffers and optimizer state.

    Args:
        model: the bare model, after the engine has prepared it.
        optimizer: as the engine left it, wrapped as often as it likes.

    Raises:
        RunError: for an engine whose state cannot be cut into intervals.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        wrappers = [optimizer]
        while hasattr(wrappers[-1], "optimizer"):
            wrappers.append(wrappers[-1].optimizer)
        self._model = model
        self._optimizer: torch.optim.Optimizer = wrappers[-1]
        self._engine = _engine(wrappers[-2] if len(wrappers) > 1 else None, self._optimizer)

    # ---- Saving ----

    def weights(self) -> Iterator[Piece]:
        """What this process saves of the weights and buffers, in full precision."""
        for fragment in self._fragments():
            yield _piece(WEIGHT, fragment, fragment.weight)

    def pieces(self) -> Iterator[Piece]:
        """What this process saves of everything; `weight/NAME` and, for example, `exp_avg/NAME`."""
        yield from self.weights()
        for fragment in self._fragments():
            for key, value in self._state_of(fragment).items():
                if _is_elementwise(value, fragment):
                    yield _piece(key, fragment, _interval(value, fragment))

    def values(self) -> dict[str, dict[str, float]]:
        """`weight/NAME` -> learning rate and the optimizer's scalars, such as Adam's step."""
        return {
            _key(WEIGHT, fragment): {
                _LEARNING_RATE: fragment.group["lr"],
                **{k: _number(v) for k, v in self._state_of(fragment).items() if not _is_elementwise(v, fragment)},
            }
            for fragment in self._fragments()
            if fragment.group is not None and fragment.weight.numel()
        }

    # ---- Loading ----

    @torch.no_grad()
    def load(self, state: ShardedState) -> None:
        """
        Take over what `pieces` and `values` gave, on whatever number of processes. Collective.

        Raises:
            ValueError: if the tensors are those of another model, or a file is damaged or truncated.
            FileNotFoundError: if a file is missing.
        """
        together(lambda: self._read(state))
        self._engine.finish_loading()

    def _read(self, state: ShardedState) -> None:
        self._check_same_tensors(state)
        self._engine.begin_loading()
        self._optimizer.state.clear()
        moments = sorted({name.partition("/")[0] for name in state.specs} - {WEIGHT})
        for fragment in self._fragments():
            numbers = dict(state.values.get(_key(WEIGHT, fragment), {}))
            if fragment.group is not None:
                fragment.group["lr"] = numbers.pop(_LEARNING_RATE, fragment.group["lr"])
            if fragment.weight.numel():
                state.read(_key(WEIGHT, fragment), fragment.start, fragment.weight)
                self._read_optimizer_state(state, fragment, moments, numbers)

    def _read_optimizer_state(
        self, state: ShardedState, fragment: _Fragment, moments: list[str], numbers: dict[str, float]
    ) -> None:
        """A tensor of the optimizer's is made with the first of the parameters that it covers."""
        if fragment.stepped is None or fragment.group is None:
            return
        entry = self._optimizer.state[fragment.stepped]
        for key in moments:
            saved = state.specs.get(_key(key, fragment))
            if saved is None:
                continue
            if key not in entry:
                entry[key] = torch.zeros_like(fragment.stepped, dtype=saved.dtype, requires_grad=False)
            state.read(_key(key, fragment), fragment.start, _interval(entry[key], fragment))
        for key, number in numbers.items():
            entry[key] = _scalar(number, fragment.stepped, fragment.group)

    def _check_same_tensors(self, state: ShardedState) -> None:
        ours = {_key(WEIGHT, fragment): fragment.shape for fragment in self._fragments()}
        theirs = {name: spec.shape for name, spec in state.specs.items() if name.startswith(f"{WEIGHT}/")}
        for key in sorted(ours.keys() | theirs.keys()):
            name = key.removeprefix(f"{WEIGHT}/")
            if key not in theirs:
                raise ValueError(f"it has no tensor {name}, which the model has")
            if key not in ours:
                raise ValueError(f"it has a tensor {name}, which the model does not have")
            if ours[key] != theirs[key]:
                raise ValueError(f"its tensor {name} has shape {theirs[key]}, the model's {ours[key]}")

    # ---- Fragments ----

    def _fragments(self) -> Iterator[_Fragment]:
        """Of every saved parameter and buffer, in the same order on every process."""
        saved = self._model.state_dict().keys()
        for name, parameter in self._model.named_parameters():
            if name in saved:
                yield self._engine.fragment(name, parameter)
        for name, buffer in self._model.named_buffers():
            if name in saved:
                yield _whole(name, buffer)

    def _state_of(self, fragment: _Fragment) -> dict[str, Any]:
        if fragment.stepped is None or not fragment.weight.numel():
            return {}
        entry = self._optimizer.state.get(fragment.stepped, {})
        return {key: value for key, value in entry.items() if value is not None}


# ---- Engines: where each keeps its full-precision weights ----


def _engine(wrapper: Any, optimizer: torch.optim.Optimizer) -> Any:
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _Zero3(wrapper)
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return _Zero(wrapper, wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups)
    if type(wrapper).__name__ == "BF16_Optimizer":
        return _Zero(wrapper, wrapper.bf16_groups, wrapper.fp32_groups_flat_partition)
    return _InPlace(optimizer)


class _InPlace:
    """The optimizer steps the model's own parameters: plain PyTorch, DDP, DeepSpeed at stage 0."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def fragment(self, name: str, parameter: nn.Parameter) -> _Fragment:
        group = self._group_of.get(id(parameter))
        return _whole(name, parameter, group, None if group is None else parameter)

    def begin_loading(self) -> None:
        pass

    def finish_loading(self) -> None:
        pass


class _Zero:
    """Each process steps an interval of every group of parameters, made one flat tensor: stages 1 and 2."""

    def __init__(self, wrapper: Any, groups: Any, flats: Any) -> None:
        self._wrapper = wrapper
        self._flats = flats
        self._group_of = {id(p): index for index, group in enumerate(groups) for p in group}

    def fragment(self, name: str, parameter: Any) -> _Fragment:
        if id(parameter) not in self._group_of:
            return _whole(name, parameter)
        group = self._wrapper.optimizer.param_groups[self._group_of[id(parameter)]]
        shape, first = _place(parameter, tuple(parameter.shape))
        mapping = parameter._hp_mapping
        if mapping is None:
            return _Fragment(name, shape, first, torch.empty(0), slice(0, 0), group)
        flat = self._flats[self._group_of[id(parameter)]]
        start, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        weight = flat.detach().view(-1)[start : start + size]
        return _Fragment(
            name, shape, first + mapping.lp_fragment_address.start, weight, slice(0, size), group, flat, start
        )

    def begin_loading(self) -> None:
        pass

    def finish_loading(self) -> None:
        self._wrapper.update_lp_params()


class _Zero3:
    """Each process holds one part of every parameter, the last parts padded."""

    def __init__(self, wrapper: Any) -> None:
        if wrapper.swap_optimizer or wrapper.params_in_nvme_and_cpu:
            raise RunError("state on NVMe cannot be saved: set deepspeed.zero_optimization.offload_*.device to cpu")
        self._wrapper = wrapper

    def fragment(self, name: str, parameter: Any) -> _Fragment:
        shape, first = _place(parameter, tuple(parameter.ds_shape))
        padded = parameter.partition_numel()
        start = min(padded * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        size = min(padded, parameter.ds_numel - start)
        if not parameter.requires_grad:
            weight = parameter.ds_tensor.detach().view(-1)[:size]
            return _Fragment(name, shape, first + start, weight, slice(0, size))
        index, offset, _ = self._wrapper.grad_position[self._wrapper.get_param_id(parameter)]
        flat = self._wrapper.fp32_partitioned_groups_flat[index]
        group = self._wrapper.optimizer.param_groups[self._wrapper.sub_group_to_group_id[index]]
        weight = flat.detach().view(-1)[offset : offset + size]
        return _Fragment(name, shape, first + start, weight, slice(0, size), group, flat, offset)

    def begin_loading(self) -> None:
        # Small parameters stay gathered; they must be gathered anew.
        self._wrapper.checkpoint_event_prologue()

    def finish_loading(self) -> None:
        for index in range(len(self._wrapper.fp32_partitioned_groups_flat)):
            self._wrapper._reassign_or_swap_out_partitioned_parameters(index)
        self._wrapper.checkpoint_event_epilogue()


def _whole(
    name: str, tensor: torch.Tensor, group: dict[str, Any] | None = None, stepped: torch.Tensor | None = None
) -> _Fragment:
    """A tensor of which this process holds all, or all of its own experts."""
    shape, first = _place(tensor, tuple(tensor.shape))
    rank, replicas = _replica(tensor)
    size = tensor.numel()
    share = slice(rank * size // replicas, (rank + 1) * size // replicas)
    return _Fragment(name, shape, first, tensor.detach().view(-1), share, group, stepped)


def _place(parameter: torch.Tensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Shape of the whole tensor, and the first element in it of the part with this shape."""
    part = expert_slice(parameter)
    if part is None:
        return shape, 0
    return (part.num_experts, *shape[1:]), part.start * torch.Size(shape[1:]).numel()


def _replica(tensor: Any) -> tuple[int, int]:
    """Which of how many processes with the same values this is."""
    if not dist.is_initialized():
        return 0, 1
    if expert_slice(tensor) is None:
        return dist.get_rank(), dist.get_world_size()
    from deepspeed.utils import groups

    group = groups._get_expert_data_parallel_group(tensor.group_name)
    return dist.get_rank(group), dist.get_world_size(group)


# ---- State of one fragment ----


def _key(kind: str, fragment: _Fragment) -> str:
    return f"{kind}/{fragment.name}"


def _piece(kind: str, fragment: _Fragment, data: torch.Tensor) -> Piece:
    saved = fragment.saved
    return Piece(_key(kind, fragment), fragment.shape, fragment.start + saved.start, data[saved])


def _interval(value: torch.Tensor, fragment: _Fragment) -> torch.Tensor:
    return value.view(-1)[fragment.offset : fragment.offset + fragment.weight.numel()]


def _is_elementwise(value: Any, fragment: _Fragment) -> bool:
    return torch.is_tensor(value) and fragment.stepped is not None and value.shape == fragment.stepped.shape


def _number(value: Any) -> float:
    """A scalar of the optimizer's for JSON: of a tensor a float."""
    if torch.is_tensor(value) and value.numel() == 1:
        return float(value)
    if isinstance(value, int):
        return value
    raise RunError(
        f"the optimizer's {type(value).__name__} {value!r} is neither a number nor of its weight's shape: such state "
        "cannot be saved"
    )


def _scalar(number: float, stepped: torch.Tensor, group: dict[str, Any]) -> Any:
    """As the optimizer keeps it: what was a tensor lies beside its weight where a kernel reads it."""
    if isinstance(number, int):
        return number
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(number, dtype=torch.float32, device=stepped.device if on_device else "cpu")
