"""What every phase cost and reached, in one file, so that methods can be compared at equal tokens or equal seconds."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from modmoe.distill.meta import HybridReport
from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.output_dir import RESULTS
from modmoe.training.distillation.config import DistillRun
from modmoe.training.distillation.costs import cost_of
from modmoe.training.distillation.places import Places
from modmoe.training.distillation.teacher import teacher_parameters
from modmoe.training.monitoring.throughput import parameter_counts
from modmoe.training.run_config import RunConfig
from modmoe.training.status import FILE as STATUS_FILE

_LOSS = "/nats_per_token"


def write_results(
    run: DistillRun, places: Places, phases: dict[str, RunConfig], report: HybridReport | None, world_size: int
) -> dict[str, Any]:
    """
    Write `results.json`.

    Args:
        run: the distillation.
        places: of it.
        phases: name -> training run, finished.
        report: of the hybrids, if there were any.
        world_size: processes of a training run.

    Returns:
        its content.
    """
    entries = {name: _phase(phase, world_size) for name, phase in phases.items()}
    last = places.finetuning_run
    total, active = parameter_counts(AutoModelForCausalLM.from_pretrained(places.student))
    content = {
        "method": run.distillation.method,
        "teacher": run.teacher,
        "teacher_parameters": teacher_parameters(places),
        "student_parameters": total,
        "student_active_parameters": active,
        "seed": run.seed,
        "hybrids": None if report is None else {"meta": report.meta, "with_teacher_stage": report.hybrids},
        "phases": entries,
        "tokens": sum(entry["tokens"] for entry in entries.values()),
        # That each part of the student was trained on; stages are trained on the same ones.
        "student_tokens": entries["end to end"]["tokens"] + entries.get("stage 0", {"tokens": 0})["tokens"],
        "wall_seconds": round(sum(entry["wall_seconds"] for entry in entries.values()), 2),
        "cpu_seconds": round(sum(entry["cpu_seconds"] for entry in entries.values()), 2),
        # Of the last phase alone: a baseline has no other.
        "curve": _curve(last, phases["end to end"], world_size),
        "validation": entries["end to end"]["validation"],
    }
    temporary = places.results.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, places.results)
    return content


def results_table(content: dict[str, Any]) -> str:
    """A line per phase."""
    rows = [("phase", "tokens", "wall s", "CPU s", "validation, nats/token")]
    for name, entry in content["phases"].items():
        losses = "  ".join(f"{domain} {value:.3f}" for domain, value in entry["validation"].items())
        rows.append(
            (name, f"{entry['tokens']:,}", f"{entry['wall_seconds']:.0f}", f"{entry['cpu_seconds']:.0f}", losses)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]) for row in rows
    )


def _phase(run: RunConfig, world_size: int) -> dict[str, Any]:
    scores = json.loads((run.output_dir / RESULTS).read_text())
    # Of the metrics the last record may be of an earlier step.
    steps = json.loads((run.output_dir / STATUS_FILE).read_text())["step"]
    return {
        "tokens": steps * run.tokens_per_step(world_size),
        **cost_of(run.output_dir)._asdict(),
        "validation": {name: score["nats_per_token"] for name, score in scores.items()},
    }


def _curve(directory: Path, run: RunConfig, world_size: int) -> list[dict[str, Any]]:
    """Validation loss of each domain over the tokens of the last phase, in nats per token."""
    return [
        {
            "tokens": record["step"] * run.tokens_per_step(world_size),
            **{
                name.removeprefix("eval/").removesuffix(_LOSS): v for name, v in record.items() if name.endswith(_LOSS)
            },
        }
        for record in read_metrics(directory / "metrics.jsonl")
        if any(name.endswith(_LOSS) for name in record)
    ]
