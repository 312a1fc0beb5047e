#!/usr/bin/env python
"""
How many experts can go from a model that was specialised in one domain?

    python experiments/specialise_and_prune.py

Per seed a base model of Python and English is trained, then fine-tuned on Python with three router losses: that of
pretraining (mutual information), none, and load concentration. From each, experts are removed by four rankings. At
half of the experts, removal on the way with the unpruned model as a teacher ("recovery") is compared with training as
long after removal at once, and with training as long without removal.

Writes docs/results/specialise_and_prune; what a seed's file there holds already is not measured again.
"""

import itertools
import math
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Models, Results, Scorer, Values, main, mean_and_spread, run, train

from modmoe.surgery.expert_tensors import ExpertCheckpoint
from modmoe.surgery.prune import Denominator, Pruning, choose_pruning
from modmoe.surgery.usage import UsageReport

NAME = "specialise_and_prune"
ROUTER_LOSSES = {
    "mutual-information": None,
    "none": "{type: none, coefficient: 0}",
    "concentration": "{type: concentration, coefficient: 0.5, warmup_steps: %d}",
}
METRICS = ("frequency", "gate", "reap", "random")
RANDOM_DRAWS = 3
KEEPS = (0.75, 0.5, 0.375, 0.25)
# Once it is decided which experts go, nothing is to be gained from concentrating further.
FURTHER_LOSSES = {"mutual-information": "mutual-information", "concentration": "none"}
FURTHER_PRUNED = (0.5,)
FURTHER_METRIC = "frequency"
FURTHER = {"optimization__steps": 1000, "optimization__learning_rate": 3e-3}  # chosen on seed 0


class SpecialisedModels(Models):
    def specialised(self, loss: str) -> Path:
        return self._tune(loss, loss, self.base(), warmup_steps=100)

    def longer(self, loss: str) -> Path:
        return self._tune(f"{loss}-longer", FURTHER_LOSSES[loss], self.specialised(loss), **FURTHER)

    def recovered(self, loss: str, keep: float) -> Path:
        """Experts go on the way, and the specialised model teaches."""
        pruning = f"{{keep: {keep}, steps: 100, every: 10, metric: {FURTHER_METRIC}}}"
        init = self.specialised(loss)
        name = f"{loss}-recovered-{keep}"
        return self._tune(name, FURTHER_LOSSES[loss], init, finetuning__pruning=pruning, **FURTHER)

    def pruned_at_once(self, loss: str, keep: float) -> Path:
        """Experts go before training, and nobody teaches."""
        start = self.directory / f"{loss}-pruned-{keep}"
        if not start.exists():
            self.pruning(loss, keep, FURTHER_METRIC).write(start)
        return self._tune(f"{loss}-pruned-{keep}-trained", FURTHER_LOSSES[loss], start, **FURTHER)

    def _tune(self, name: str, loss: str, init: Path, warmup_steps: int = 0, **options: Any) -> Path:
        section = ROUTER_LOSSES[loss]
        if section is not None:
            options["finetuning__router_loss"] = section.replace("%d", str(warmup_steps))
        return train(
            "finetune.py", "experiments/specialise.yaml", self.directory / name, seed=self.seed, init=init, **options
        )

    def usage(self, loss: str) -> UsageReport:
        """How the specialised model uses its experts on Python's training text."""
        model, out = self.specialised(loss), self.directory / f"{loss}-usage"
        if not out.exists():
            amount = ("--tokens", "65536", "--sequence-length", "256")
            data = ("--data", "python=embedded:python")
            run(ROOT / "tools" / "expert_report.py", "--model", model, *data, *amount, "--out", out)
        return UsageReport.load(out / "usage.json")

    def pruning(self, loss: str, keep: float, metric: str, denominator: Denominator = "drop") -> Pruning:
        """What tools/prune.py would remove from the specialised model."""
        checkpoint = ExpertCheckpoint(self.specialised(loss))
        return choose_pruning(checkpoint, self.usage(loss), metric=metric, denominator=denominator, keep=keep)

    def random_pruning(self, loss: str, keep: float, draw: int) -> Pruning:
        """As many of each layer, drawn."""
        checkpoint, generator = ExpertCheckpoint(self.specialised(loss)), random.Random(f"{self.seed}/{draw}")
        kept = {
            place: sorted(generator.sample(range(pool.num_experts), math.ceil(keep * pool.num_experts)))
            for place, pool in checkpoint.pools.items()
        }
        return Pruning(checkpoint, kept, "drop")


def measure_seed(seed: int, directory: Path) -> None:
    models, results = SpecialisedModels(seed, directory), Results(NAME, seed)
    score = Scorer(models.base)
    results.measure("base", lambda: score(models.base()))
    for loss in ROUTER_LOSSES:
        results.measure(f"{loss}/all", partial(lambda loss: score(models.specialised(loss)), loss))
        results.measure(f"{loss}/use", partial(lambda loss: experts_in_use(models.usage(loss)), loss))
        for keep, metric in itertools.product(KEEPS, METRICS):
            for denominator in ("drop", "keep") if metric == "reap" else ("drop",):
                how = partial(pruned_score, models, score, loss, keep, metric, denominator)
                results.measure(f"{loss}/{metric}/{denominator}/{keep}", how)
    for loss in FURTHER_LOSSES:
        results.measure(f"{loss}/longer", partial(lambda loss: score(models.longer(loss)), loss))
    for keep in FURTHER_PRUNED:
        for loss in FURTHER_LOSSES:
            for name, train_it in (("recovery", models.recovered), ("at once", models.pruned_at_once)):
                how = partial(lambda train_it, *which: score(train_it(*which)), train_it, loss, keep)
                results.measure(f"{loss}/{name}/{keep}", how)


def experts_in_use(report: UsageReport) -> dict[str, float]:
    """Number of experts that would share the load evenly, exp of its entropy: mean of a side's routers."""
    sides: dict[str, list[float]] = {}
    for router in report.routers:
        sides.setdefault(router.side, []).append(float(torch.special.entr(router.on().load).sum().exp()))
    return {side: statistics.fmean(values) for side, values in sides.items()}


def pruned_score(
    models: SpecialisedModels, score: Scorer, loss: str, keep: float, metric: str, denominator: Denominator
) -> dict[str, float]:
    """Cross entropy on Python right after removal; at random the mean of some draws."""
    if metric == "random":
        prunings = [models.random_pruning(loss, keep, draw) for draw in range(RANDOM_DRAWS)]
    else:
        prunings = [models.pruning(loss, keep, metric, denominator)]
    scores = []
    for pruning in prunings:
        with tempfile.TemporaryDirectory() as directory:
            pruning.write(Path(directory) / "pruned")
            scores.append(score(Path(directory) / "pruned", ("python",))["python"])
    return {"python": statistics.fmean(scores)}


# ---- What is shown ----


def table(results: list[Values]) -> str:
    lines = [
        "Cross entropy on Python's validation text in nats per token: of the specialised model, then the change in % "
        f"when experts go; mean ± standard deviation over {len(results)} seeds.",
        "",
        "| router loss | ranking | all experts | " + " | ".join(f"{keep:.1%} kept" for keep in KEEPS) + " |",
        "|---|---|---|" + "---|" * len(KEEPS),
    ]
    for loss in ROUTER_LOSSES:
        for metric in (*METRICS, "reap, old denominator"):
            path = "reap/keep" if metric.startswith("reap,") else f"{metric}/drop"
            row = [
                mean_and_spread(increase(r, f"{loss}/{path}/{keep}", f"{loss}/all") for r in results) for keep in KEEPS
            ]
            whole = mean_and_spread((r[f"{loss}/all"]["python"] for r in results), "{:.3f}")
            lines.append(f"| {loss} | {metric} | {whole} | " + " | ".join(row) + " |")
    lines += [
        "",
        f"After {FURTHER['optimization__steps']} further steps (those after concentration without a router loss), in "
        "nats, against the specialised model before them and the unpruned model after them:",
        "",
        "| router loss | experts kept | how | nats | % against before | % against unpruned, as long |",
        "|---|---|---|---|---|---|",
    ]
    for loss in FURTHER_LOSSES:
        longer = mean_and_spread((r[f"{loss}/longer"]["python"] for r in results), "{:.3f}")
        gain = mean_and_spread(increase(r, f"{loss}/longer", f"{loss}/all") for r in results)
        lines.append(f"| {loss} | 100% | none goes | {longer} | {gain} | |")
        for keep in FURTHER_PRUNED:
            for how in ("recovery", "at once"):
                row = [
                    mean_and_spread(increase(r, f"{loss}/{how}/{keep}", f"{loss}/{against}") for r in results)
                    for against in ("all", "longer")
                ]
                nats = mean_and_spread((r[f"{loss}/{how}/{keep}"]["python"] for r in results), "{:.3f}")
                lines.append(f"| {loss} | {keep:.0%} | {how} | {nats} | " + " | ".join(row) + " |")
    lines += ["", "Experts that share the load (exp of its entropy; 16 FFN, 8 attention experts):", ""]
    lines += ["| router loss | FFN | attention |", "|---|---|---|"]
    for loss in ROUTER_LOSSES:
        used = [mean_and_spread((r[f"{loss}/use"][side] for r in results), "{:.1f}") for side in ("ffn", "attn")]
        lines.append(f"| {loss} | " + " | ".join(used) + " |")
    return "\n".join(lines) + "\n"


def increase(result: Values, name: str, against: str) -> float:
    return 100 * (result[name]["python"] / result[against]["python"] - 1)


def draw(results: list[Values], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, len(ROUTER_LOSSES), sharey=True)
    for axis, loss in zip(axes, ROUTER_LOSSES, strict=True):
        for metric in METRICS:
            curves = [[increase(r, f"{loss}/{metric}/drop/{keep}", f"{loss}/all") for keep in KEEPS] for r in results]
            plot(axis, [1.0, *KEEPS], [[0.0, *curve] for curve in curves], label=f"by {metric}", marker="o")
        for how, color in (("recovery", "C4"), ("at once", "C5")) if loss in FURTHER_LOSSES else ():
            points = [
                (keep, increase(r, f"{loss}/{how}/{keep}", f"{loss}/longer"))
                for keep in FURTHER_PRUNED
                for r in results
            ]
            axis.scatter(*zip(*points, strict=True), marker="*", color=color, label=f"{how}, all trained further")
        axis.axhline(2, color="grey", linestyle=":", linewidth=1)
        axis.set(title=f"router loss: {loss}", xlabel="share of the experts that stays", yscale="symlog")
        axis.invert_xaxis()
    axes[0].set_ylabel("cross entropy on Python, % worse")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METRICS) + 2)
    figure.savefig(path, dpi=120)


def plot(axis, x, curves: list[list[float]], label: str, marker: str) -> None:
    """The mean of the seeds, and their range."""
    mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    (line,) = axis.plot(x, mean, label=label, marker=marker)
    low, high = (list(map(side, zip(*curves, strict=True))) for side in (min, max))
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)


if __name__ == "__main__":
    main(__doc__, NAME, measure_seed, table, draw)
