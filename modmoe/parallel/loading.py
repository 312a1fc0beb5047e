"""Models of which each process makes or reads only its own experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modmoe.models import ModMoEConfig, ModMoEForCausalLM
from modmoe.models.safetensors_stream import SavedWeights
from modmoe.parallel.expert_parallel import check_divisible, keep_own_experts, parallelize
from modmoe.parallel.layout import expert_slice
from modmoe.parallel.topology import Topology


def fresh_model(config: ModMoEConfig, topology: Topology | None = None, *, chunks: int = 1) -> ModMoEForCausalLM:
    """
    A model with random weights in float32, whole or with this process's experts.

    From the same random state come the same weights, whatever the topology: they are drawn one by one and cut at once,
    so that no more than one stacked weight is ever there in full. (`from_config` would also draw what PyTorch's
    modules start with.)

    Args:
        config: of the whole model.
        topology, chunks: as for `parallelize`; without a topology the model is whole.

    Raises:
        ValueError: if a pool's experts cannot be distributed evenly.
    """
    model = _on_meta(config, topology)
    pools = {module for _, experts in model.routed_pools() for module in experts.modules()}

    def initialize(module: nn.Module) -> None:
        _materialize(module)
        model._init_weights(module)
        if topology is not None and module in pools:
            keep_own_experts(module, topology)

    # Children first, as transformers goes through a model.
    _visit(model, initialize)
    model.tie_weights()
    if topology is not None:
        parallelize(model, topology, chunks=chunks)
    return model


@torch.no_grad()
def saved_model(directory: Path, config: ModMoEConfig, topology: Topology, *, chunks: int = 1) -> ModMoEForCausalLM:
    """
    A saved model with this process's experts, in float32; other experts are never read.

    Args:
        directory: a plain Hugging Face directory of the native format.
        config: of the whole model.
        topology, chunks: as for `parallelize`.

    Raises:
        ValueError: if a pool's experts cannot be distributed evenly, or weights are missing, of other shapes, or have
            no place in the model.
    """
    model = _on_meta(config, topology)
    for _, experts in model.routed_pools():
        for module in experts.modules():
            keep_own_experts(module, topology)

    def materialize(module: nn.Module) -> None:
        _materialize(module)
        if any(True for _ in module.buffers(recurse=False)):
            model._init_weights(module)  # tables that are not saved

    _visit(model, materialize)
    model.tie_weights()
    _read(model, directory)
    parallelize(model, topology, chunks=chunks)
    return model


def _on_meta(config: ModMoEConfig, topology: Topology | None) -> ModMoEForCausalLM:
    with torch.device("meta"):
        model = ModMoEForCausalLM(config)
    if topology is not None:
        check_divisible(model, topology.size)
    return model


def _visit(module: nn.Module, action: Callable[[nn.Module], None]) -> None:
    for child in module.children():
        _visit(child, action)
    action(module)


def _materialize(module: nn.Module) -> None:
    """Give the module's own parameters and buffers memory; their values are undefined."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        real = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), parameter.requires_grad)
        real.__dict__.update(parameter.__dict__)
        setattr(module, name, real)
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, torch.empty_like(buffer, device="cpu"))


def _read(model: ModMoEForCausalLM, directory: Path) -> None:
    saved = SavedWeights(directory)
    wanted: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    tied = set(model.all_tied_weights_keys)
    for name in saved:
        if name not in wanted:
            raise ValueError(f"{directory}: tensor {name} has no place in the model: use the config saved with it")
        target = wanted.pop(name)
        part = expert_slice(target)
        shape = tuple(target.shape) if part is None else (part.num_experts, *target.shape[1:])
        if saved.spec(name).shape != shape:
            raise ValueError(f"{directory}: tensor {name} has shape {saved.spec(name).shape}, the config says {shape}")
        target.copy_(saved[name] if part is None else saved.rows(name, part.start, part.stop))
    # A model that was trained without selection bias can get one; tied weights are saved once.
    missing = [name for name in wanted if name not in tied and not name.endswith("selection_bias")]
    if missing:
        raise ValueError(f"{directory}: {len(missing)} tensors are missing, such as {missing[0]}")
