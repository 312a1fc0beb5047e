"""Strict loading: a checkpoint and its config must cover each other, and reading one must not run code."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers.modeling_utils import PreTrainedModel

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.safetensors_stream import pickled_files

# Keywords of `from_pretrained` that are most often meant, besides the fields of the config.
_LOADING_KEYWORDS = ("attn_implementation", "experts_implementation", "device_map", "dtype", "revision", "token")

# Output layers of classifiers: a model for one task is the start of one for another.
_CLASSIFIERS = ("score.", "classifier.")
_ALIGNMENT = 64  # bytes, as PyTorch allocates


class StrictPreTrainedModel(PreTrainedModel):
    """transformers warns about missing weights and makes them up; here loading fails and names a tensor."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """
        As in transformers, but strict: weights and config must cover each other, and only safetensors are read.

        Raises:
            ValueError: damaged file, pickled weights, weights that the config does not match, or an unknown keyword.
        """
        where = pretrained_model_name_or_path
        if kwargs.setdefault("use_safetensors", True) is False:
            raise ValueError("use_safetensors=False would read pickled weights, which can run code: leave it out")
        _refuse_pickles(where)
        accept_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                where, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"the weights in {where} are damaged or truncated ({error}): copy or save the checkpoint again"
            ) from error
        except TypeError as error:
            raise _unknown_keyword(error) or error from None
        model._check_coverage(where, info, accept_mismatch)
        _align(model)
        return (model, info) if output_loading_info else model

    def _check_coverage(self, where: Any, info: dict[str, Any], accept_mismatch: bool) -> None:
        """Every weight of the model is in the checkpoint and the other way round, heads of other tasks excepted."""
        missing = sorted(
            k for k in info["missing_keys"] if not k.startswith(_CLASSIFIERS) and "selection_bias" not in k
        )
        unexpected = sorted(k for k in info["unexpected_keys"] if not k.startswith(("lm_head.", *_CLASSIFIERS)))
        mismatched = [] if accept_mismatch else sorted(info["mismatched_keys"])
        if mismatched:
            key, saved, built = mismatched[0]
            what = f"{len(mismatched)} tensors have another shape, such as {key}: {tuple(saved)}, not {tuple(built)}"
        elif missing:
            what = f"{len(missing)} tensors are missing, such as {missing[0]}"
        elif unexpected:
            what = f"{len(unexpected)} tensors have no place in the model, such as {unexpected[0]}"
        else:
            return
        raise ValueError(
            f"the weights in {where} do not match the config: {what}; load them with the config.json that they were "
            f"saved with, into the class that saved them (here: {type(self).__name__})"
        )


@torch.no_grad()
def _align(model: PreTrainedModel) -> None:
    """
    Copy weights that are not aligned in memory.

    Weights on the CPU are a view of the file, and MKL's matrix products sum in another order if a matrix does not
    begin at a multiple of 16 bytes: the same weights would give other logits from a file that also has other tensors.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _refuse_pickles(where: Any) -> None:
    folder = Path(where) if isinstance(where, str | Path) else None
    if folder is None or not folder.is_dir() or any(folder.glob("model*.safetensors")):
        return
    pickles = pickled_files(folder)
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when read: only safetensors are "
            "loaded. Convert old ModuleFormer weights with tools/convert_moduleformer.py"
        )


def _unknown_keyword(error: TypeError) -> ValueError | None:
    """transformers hands keywords that it does not know to the model's constructor: what to say of one."""
    found = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return None
    known = sorted({field.name for field in dataclasses.fields(ModMoEConfig)} | set(_LOADING_KEYWORDS))
    near = difflib.get_close_matches(found[1], known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "ModMoEConfig names the fields of the config"
    return ValueError(f"from_pretrained does not know the keyword {found[1]!r}; {hint}")
