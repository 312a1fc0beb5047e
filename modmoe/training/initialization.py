"""The model a run starts with: fresh, or with the weights of a saved one."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modmoe.models import ModMoEConfig
from modmoe.training.run_config import RunConfig, build_model_config
from modmoe.training.yaml_config import ConfigError


def build_model(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """
    Make the model in fp32, with the tokenizer's vocabulary and special tokens.

    Raises:
        ConfigError: if the directory to start from is missing, damaged, pickled or does not fit the run.
    """
    if run.init is None:
        return AutoModelForCausalLM.from_config(model_config(run.model, tokenizer))
    check_saved_model(run.init)
    config = model_config(run.model, tokenizer) if run.model else AutoConfig.from_pretrained(run.init)
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model in {run.init} {config.vocab_size}: use the "
            f"tokenizer saved with it, tokenizer.name: {run.init}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(run.init, config=config, dtype="float32")
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot start from {run.init}: {error}") from None
    return model


def model_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> ModMoEConfig:
    """
    Complete model fields by what the tokenizer decides.

    Raises:
        ConfigError: if the model's vocabulary is too small.
    """
    fields = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }
    if fields["vocab_size"] < len(tokenizer):
        raise ConfigError(
            f"model.vocab_size={fields['vocab_size']} is smaller than the tokenizer's {len(tokenizer)}; leave it out"
        )
    return build_model_config(fields)


def check_saved_model(directory: Path) -> None:
    """
    Check that a directory holds a config and readable safetensors.

    Raises:
        ConfigError: if it does not; says what is wrong.
    """
    if not directory.is_dir():
        raise ConfigError(f"init directory {directory} does not exist")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"init directory {directory} has no config.json: not a saved model")
    for path in _weight_files(directory):
        if not path.is_file():
            raise ConfigError(f"weights {path} are missing")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"weights {path} are damaged or truncated: {error}") from None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        raise ConfigError(
            f"init directory {directory} holds pickled weights ({pickles[0]}), which can run code when loaded; "
            "only safetensors are read: convert them first"
        )
    raise ConfigError(f"init directory {directory} has no model.safetensors")
