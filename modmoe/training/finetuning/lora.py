"""LoRA adapters inside a model, made by PEFT: for linear layers and for stacks of experts.

The model stays a `ModMoEForCausalLM`: PEFT's layers are put into it and its own weights are frozen. Names of adapted
weights get a `base_layer` in them, so that such a model is no plain directory; what is written is an adapter directory
of PEFT, and in the end the merged model.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modmoe.layers.experts import ExpertLinear, GatedFFN, PlainFFN
from modmoe.layers.router import Router
from modmoe.models import ModMoEForCausalLM
from modmoe.training.checkpoints.engine_state import WEIGHT
from modmoe.training.checkpoints.sharded_state import ShardedState
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import LoraSection

ADAPTER = "adapter"
_NAME = "default"
_MARKS = (".lora_A.", ".lora_B.")


def add_adapters(model: ModMoEForCausalLM, lora: LoraSection, init: Path, seed: int) -> None:
    """
    Put adapters into a model, in place, and freeze everything else. They change nothing before they are trained.

    Args:
        model: in the process as a whole.
        lora: rank, scale and targets.
        init: where the model is from, for the adapter's own config.
        seed: of the adapters' first weights.

    Raises:
        ConfigError: a target that the model does not have, dropout for a stack of experts, or no PEFT.
    """
    peft = _peft()
    linears, stacks = _targets(model, lora.targets)
    if lora.dropout and stacks:
        raise ConfigError(
            f"finetuning.lora.dropout={lora.dropout} is for linear layers, and {stacks[0]} is a stack of experts: set "
            "it to 0, or name other targets"
        )
    if stacks and any(hasattr(p, "ds_shape") for p in model.parameters()):
        raise ConfigError(
            f"finetuning.lora cannot adapt {stacks[0]}, a stack of experts, under ZeRO-3: use stage 2 or less, or "
            "name other targets"
        )
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=linears or None,
        target_parameters=stacks or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(init),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, _NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))


def write_adapter(state: ShardedState, directory: Path, model: PreTrainedModel) -> None:
    """
    Write the adapter directory that PEFT reads.

    Args:
        state: with the weights of a model with adapters.
        directory: is made.
        model: after `add_adapters`.
    """
    directory.mkdir()
    tensors = {}
    prefix = f"{WEIGHT}/"
    for key, spec in state.specs.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and _is_adapter(name):
            tensor = torch.empty(spec.numel, dtype=spec.dtype)
            state.read(key, 0, tensor)
            tensors[f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"] = tensor.view(spec.shape)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = model.peft_config
    config[_NAME].save_pretrained(directory)


def write_merged(init: Path, adapter: Path, directory: Path, config: PreTrainedConfig) -> None:
    """
    Write the weights of a model with its adapters merged into it, in fp32.

    Args:
        init: the model without them.
        adapter: of `write_adapter`.
        directory: an existing one.
        config: of the model.
    """
    base = AutoModelForCausalLM.from_pretrained(init, config=config, dtype="float32")
    merged: Any = _peft().PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(directory)


def _is_adapter(name: str) -> bool:
    return any(mark in name for mark in _MARKS)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"finetuning.method='lora' needs PEFT: pip install 'modmoe[finetune]' ({error})") from None
    return peft


def _targets(model: ModMoEForCausalLM, wanted: list[str]) -> tuple[list[str], list[str]]:
    """Full names of the linear layers, and of the stacked weights, that the targets mean."""
    weights = _adaptable(model)
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    found: set[str] = set()
    for target in wanted:
        matches = {name for name in weights if f".{name}".endswith(f".{target}")}
        if not matches:
            ends = sorted({name.rpartition(".")[2] for name in weights})
            raise ConfigError(
                f"finetuning.lora.targets: no weight of this model that can be adapted ends with {target!r}; there "
                f"are {', '.join(ends)}"
            )
        found |= matches
    if not wanted:
        found = {name for name in weights if name.rpartition(".")[0] not in routers}
    linears = [name for name, parameter in weights.items() if name in found and parameter is None]
    stacks = [parameter for name, parameter in weights.items() if name in found and parameter is not None]
    return linears, stacks


def _adaptable(model: ModMoEForCausalLM) -> dict[str, str | None]:
    """Name that a user gives -> full name of the stacked weight; None for a linear layer of that name."""
    output = model.get_output_embeddings()
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            found[name] = f"{name}.weight"
        elif isinstance(module, GatedFFN | PlainFFN):
            found |= {f"{name}.{weight}": f"{name}.{weight}" for weight, _ in module.named_parameters(recurse=False)}
        elif isinstance(module, nn.Linear) and module is not output:
            found[name] = None
    return found
