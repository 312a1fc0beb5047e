"""Trained stages become one student.

Stitches are dropped: `stitch` says why none can be folded, and why nothing is lost without those of kind "projection".
Keeping learned ones would put linear maps between blocks that no other tool or server knows; the end-to-end
fine-tuning that follows has to repair the joints anyway (m2mKD drops them too).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from modmoe.distill.pair import STITCHES
from modmoe.distill.ranges import StageSpec
from modmoe.distill.stages import check_complete, read_stage_file
from modmoe.distill.student import student_kind, whole_name
from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.safetensors_stream import SavedWeights, TensorSpec, WeightsWriter

# Fields of config.json that may differ between stages: who wrote it, and where it lay.
_INCIDENTAL = ("transformers_version", "_name_or_path")


def assemble(stages: Sequence[Path], directory: Path) -> bool:
    """
    Put trained stages together into a model directory that Auto classes load; memory holds one tensor at a time.

    Args:
        stages: directories that `StagePair.save` wrote, in any order.
        directory: of the model; made if need be.

    Returns:
        whether the model computes exactly what its stages compute one after another through their stitches.

    Raises:
        FileNotFoundError: if a directory holds no stage.
        ValueError: if stages are missing or come from different students.
    """
    found = sorted(((*read_stage_file(path), path) for path in stages), key=lambda entry: entry[0].index)
    specs = [spec for spec, _, _ in found]
    paths = [path for _, _, path in found]
    check_complete(specs)
    config = _common_config(paths)
    if specs[-1].stop != config.num_hidden_layers or specs[0].start != 0:
        raise ValueError(
            f"the stages hold blocks {specs[0].start} to {specs[-1].stop} (end excluded), and the student has "
            f"num_hidden_layers={config.num_hidden_layers}: train stages of one cut of it"
        )
    kinds = {rest.get("stitch", "linear") for _, rest, _ in found}
    exact = kinds == {"projection"}
    if exact:
        _check_one_projection(paths)
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(specs, paths, directory)
    config.architectures = [student_kind(config).whole.__name__]
    config.save_pretrained(directory)
    return exact or len(specs) == 1


def _write_weights(specs: list[StageSpec], paths: list[Path], directory: Path) -> None:
    sources = [
        (weights, name, whole_name(name, spec))
        for spec, weights in zip(specs, map(SavedWeights, paths), strict=True)
        for name in weights
    ]
    tensors: dict[str, TensorSpec] = {new: weights.spec(name) for weights, name, new in sources}
    with WeightsWriter(directory, tensors) as writer:
        for weights, name, new in sources:
            writer.write(new, weights[name])


def _common_config(paths: list[Path]) -> ModMoEConfig:
    first = _fields(paths[0])
    for path in paths[1:]:
        fields = _fields(path)
        differing = sorted(n for n in first.keys() | fields.keys() if first.get(n) != fields.get(n))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{paths[0]} has {name}={first.get(name)!r} and {path} has {fields.get(name)!r}: stages "
                "of one student have one config; train one of them again"
            )
    return AutoConfig.from_pretrained(paths[0])


def _fields(path: Path) -> dict[str, Any]:
    fields = json.loads((path / "config.json").read_text())
    return {name: value for name, value in fields.items() if name not in _INCIDENTAL}


def _check_one_projection(paths: list[Path]) -> None:
    """
    Raises:
        ValueError: if two boundaries go through different projections.
    """
    first: torch.Tensor | None = None
    for path in paths:
        for projection in load_file(path / STITCHES).values():
            if first is not None and not torch.equal(first, projection):
                raise ValueError(
                    f"the projection in {path / STITCHES} differs from that of an earlier stage, so that dropping "
                    "it is not exact: train all stages with one projection"
                )
            first = projection
