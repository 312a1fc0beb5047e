"""What is measured with the whole teacher before pairs are trained: its principal directions, and the hybrids."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from safetensors.torch import save_file

from modmoe.data import MixtureDataset, PreparedData, collate_packed
from modmoe.distill.meta import HybridReport, evaluate_hybrids
from modmoe.distill.stages import CutModel, Stage
from modmoe.distill.stitch import principal_projection
from modmoe.models.safetensors_stream import open_safetensors
from modmoe.training.checkpoints.checkpoint import writing
from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.places import Places
from modmoe.training.distillation.student import PROJECTION
from modmoe.training.errors import ConfigError, RunError
from modmoe.training.precision import device_type

_PROJECTION_BLOCKS = 64
Tensors = dict[str, torch.Tensor]


def projection_basis(run: DistillRun, width: int) -> dict[str, str]:
    """What the projection follows from, beside the teacher."""
    data = run.data.model_dump(mode="json", exclude={"cache_dir", "workers"})
    return {"basis": json.dumps({"width": width, "seed": run.seed, "data": data})}


def has_projection(places: Places, basis: dict[str, str]) -> bool:
    """Whether it is there, and follows from this."""
    return places.projection.is_file() and open_safetensors(places.projection).metadata() == basis


@torch.no_grad()
def write_projection(places: Places, data: PreparedData, width: int, batch_size: int, basis: dict[str, str]) -> None:
    """Find the student's width of principal directions in the teacher's boundaries on the first training blocks."""
    teacher = CutModel.load(places.teacher).to(device_type())
    states = (
        boundary.flatten(0, 1)
        for batch in _batches(_first(data.train), batch_size)
        for boundary in teacher(**batch).boundaries
    )
    temporary = places.projection.with_suffix(".tmp")
    projection = principal_projection(states, width).cpu()
    with writing(places.projection, places.root):
        save_file({PROJECTION: projection}, temporary, metadata=basis)
        temporary.rename(places.projection)


def measure_hybrids(run: DistillRun, places: Places, data: PreparedData, stages: Iterable[Stage]) -> HybridReport:
    """
    Cross entropies on validation blocks of all domains, with the same number of each.

    Raises:
        ConfigError: if there is no validation text.
    """
    device = device_type()
    meta = CutModel.load(places.meta).to(device)
    batches = _batches(
        _validation(data, run.distillation.hybrids.blocks_per_domain), run.optimization.micro_batch_size
    )
    try:
        report = evaluate_hybrids(meta, (stage.to(device) for stage in stages), batches)
    except ValueError as error:
        raise ConfigError(f"distillation.hybrids: {error}; give at least one source validation text") from None
    content = dataclasses.asdict(report) | {"worse": report.worse, "settings": _settings(run)}
    temporary = places.hybrids.with_suffix(".tmp")
    with writing(places.hybrids, run.output_dir):
        temporary.write_text(json.dumps(content, indent=1))
        temporary.rename(places.hybrids)
    return report


def read_hybrids(run: DistillRun, places: Places) -> HybridReport | None:
    """What was measured; None if nothing was, or on other blocks, or the file is damaged."""
    try:
        content = json.loads(places.hybrids.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if content.get("settings") != _settings(run):
        return None
    hybrids = {int(stage): value for stage, value in content["hybrids"].items()}
    return HybridReport(content["num_tokens"], content["meta"], hybrids)


def hybrid_table(report: HybridReport) -> str:
    """One line per hybrid."""
    lines = [f"cross entropy over {report.num_tokens:,} tokens", f"  meta model alone       {report.meta:.4f}"]
    for stage, value in report.hybrids.items():
        lines.append(f"  with teacher stage {stage:<3} {value:.4f}  ({value - report.meta:+.4f})")
    return "\n".join(lines)


def check_hybrids(report: HybridReport, force: bool) -> None:
    """
    Raises:
        RunError: if a hybrid is worse than the meta model alone, unless forced.
    """
    try:
        report.check(force)
    except ValueError as error:
        raise RunError(
            f"{error} (distillation.meta.optimization, .layers_per_stage, .method, distillation.hybrids.force)"
        ) from None


def _settings(run: DistillRun) -> dict[str, Any]:
    return run.distillation.hybrids.model_dump(exclude={"force"})


def _first(train: Any) -> Iterator[Any]:
    examples = (train[i] for i in range(len(train))) if isinstance(train, MixtureDataset) else iter(train)
    return islice(examples, _PROJECTION_BLOCKS)


def _validation(data: PreparedData, blocks: int) -> Iterator[Any]:
    """Evenly over each domain's validation text."""
    for domain in data.validation.values():
        count = min(blocks, len(domain))
        yield from (domain[i * len(domain) // count] for i in range(count))


def _batches(examples: Iterator[Any], batch_size: int) -> Iterator[Tensors]:
    while chunk := list(islice(examples, batch_size)):
        yield {name: tensor.to(device_type()) for name, tensor in collate_packed(chunk).items()}
