"""The model a run starts with: fresh, or with the weights of a saved one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from modmoe.models import ModMoEConfig, ModMoEForCausalLM
from modmoe.models.safetensors_stream import weight_files
from modmoe.parallel.loading import fresh_model, saved_model
from modmoe.parallel.topology import Topology
from modmoe.training.errors import ConfigError
from modmoe.training.ranks.bootstrap import world_size
from modmoe.training.run_config import RunConfig, build_model_config


def build_model(run: RunConfig, tokenizer: PreTrainedTokenizerFast) -> ModMoEForCausalLM:
    """
    Make the model in fp32, with the tokenizer's vocabulary and special tokens.

    Raises:
        ConfigError: if the directory to start from is missing, damaged, pickled or does not fit the run.
    """
    if run.init is None:
        return _fresh(model_config(run.model, tokenizer), run)
    check_saved_model(run.init)
    if not has_vocabulary(run.init, tokenizer):
        raise ConfigError(
            f"the model in {run.init} was trained with another tokenizer than this run's: its embeddings would belong "
            f"to other tokens; use the one saved with it, tokenizer: {{name: {run.init}}}"
        )
    try:
        config = model_config(run.model, tokenizer) if run.model else _saved_config(run.init, tokenizer)
        model = _saved(run.init, config, run)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot start from {run.init}: {error}") from None
    if not isinstance(model, ModMoEForCausalLM):
        raise ConfigError(
            f"cannot start from {run.init}: it holds a {type(model).__name__}, not a modular model; make one of a "
            "dense model with tools/upcycle.py"
        )
    return model


def _fresh(config: ModMoEConfig, run: RunConfig) -> ModMoEForCausalLM:
    if run.expert_parallel_size > 1:
        return _in_parts(run, lambda topology: fresh_model(config, topology, chunks=run.expert_parallel_chunks))
    if run.zero_stage == 3:  # where transformers shards while it builds
        return AutoModelForCausalLM.from_config(config)
    return fresh_model(config)


def _saved(directory: Path, config: PreTrainedConfig, run: RunConfig) -> PreTrainedModel:
    if run.expert_parallel_size == 1:
        return AutoModelForCausalLM.from_pretrained(directory, config=config, dtype="float32")
    if not isinstance(config, ModMoEConfig):
        raise ValueError(
            f"expert_parallel_size={run.expert_parallel_size} reads the native format only, not "
            f"{config.model_type!r}: convert it first, with tools/convert_moduleformer.py if it is IBM's"
        )
    return _in_parts(run, lambda topology: saved_model(directory, config, topology, chunks=run.expert_parallel_chunks))


def _in_parts(run: RunConfig, make: Callable[[Topology], ModMoEForCausalLM]) -> ModMoEForCausalLM:
    """A model of which this process has a part."""
    from modmoe.parallel.engine import expert_parallel_topology  # imports DeepSpeed

    size = run.expert_parallel_size
    if world_size() % size:
        raise ConfigError(
            f"expert_parallel_size={size} does not divide the {world_size()} processes of this run: choose a divisor, "
            "or start another number of processes"
        )
    try:
        return make(expert_parallel_topology(size))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def has_vocabulary(directory: Path, tokenizer: PreTrainedTokenizerFast) -> bool:
    """
    Whether the tokenizer saved in a directory, if one is, gives every token the same id as this one.

    Raises:
        ConfigError: if the saved one is damaged.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return True
    try:
        saved = Tokenizer.from_file(str(file))
    except Exception as error:  # the only class that tokenizers raises
        raise ConfigError(f"{file} is damaged: {error}") from None
    return _vocabulary(saved) == _vocabulary(tokenizer.backend_tokenizer)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer.get_vocab(with_added_tokens=True)


def _saved_config(directory: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if num_ids(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {num_ids(tokenizer)} ids and the model {config.vocab_size}")
    return config


def num_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """Smallest vocabulary that holds every id; ids may have gaps."""
    return 1 + max(_vocabulary(tokenizer.backend_tokenizer).values())


def model_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> ModMoEConfig:
    """
    Complete model fields by what the tokenizer decides.

    Raises:
        ConfigError: if the model's vocabulary is too small.
    """
    fields = {
        "vocab_size": num_ids(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }
    size, needed = fields["vocab_size"], num_ids(tokenizer)
    if size < needed:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the tokenizer's {needed}: leave it out, or set it to at least "
            f"{needed}"
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
    try:
        files = weight_files(directory)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"cannot start from {directory}: {error}") from None
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"weights {path} are damaged or truncated ({error}): copy or save the checkpoint again"
            ) from None
