"""Does module-to-module distillation help a V-MoE on small images? scikit-learn's digits, five seeds, one command.

    OMP_NUM_THREADS=1 python experiments/distill_digits.py

A dense ViT is trained once. Then, for each seed, a V-MoE of half its depth learns

    scratch          end to end from labels
    teacher's ends   the same, but embedding, positions, final norm and classifier begin as the teacher's
    logit KD         end to end from labels and the teacher's logits
    m2mKD            with the teacher's ends stage by stage inside a meta model that is fitted to the teacher, then end
                     to end from labels
    m2mKD + logits   the same, then end to end from labels and the teacher's logits

The first three run twice: for as many end-to-end steps as the others, and for as much computation as these need in
all. The second one is what m2mKD has to beat: it tells what modules are worth beyond the weights that they begin with.
Computation is counted, not timed: parameters that a token passes through, once forward, once backward to what came in
and once to the weights, in units of a student's step from labels. The teacher's own training is counted for nobody.

Teacher's stages that are worse inside the meta model than the meta model alone are reported, not refused: a meta model
that is fitted for longer teaches no better here, and is paid for.

Each method has the learning rate that is best on the validation images, with a seed of its own. Test images
are looked at once, after training. Work that is done is kept in --out, seed by seed, and not done again.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

from modmoe import ModMoEForImageClassification, ModMoEVisionConfig
from modmoe.distill.assembly import assemble
from modmoe.distill.meta import FIT, MetaFit, build_meta, evaluate_hybrids
from modmoe.distill.objective import Objective, class_targets
from modmoe.distill.pair import StagePair
from modmoe.distill.ranges import even_ranges, stage_specs
from modmoe.distill.stages import CutModel, cut
from modmoe.distill.student import build_student_stage, initialize_ends
from modmoe.losses.distillation import forward_kl

Batch = dict[str, torch.Tensor]
LossOf = Callable[[Batch], torch.Tensor]

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 10,
    "hidden_size": 64,
    "num_attention_heads": 4,
    # About 1 / sqrt(width): with 0.02, made for wide models, all of this learns slowly.
    "initializer_range": 0.1,
}
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
TUNING_SEED = 100
STEPS, COMPUTATION, BOTH = "equal end-to-end steps", "equal computation", "both"


@dataclass(frozen=True)
class Plan:
    """How much of everything; steps are optimizer steps."""

    num_seeds: int = 5
    num_stages: int = 3
    teacher_blocks: int = 6
    student_blocks: int = 3
    num_experts: int = 4
    batch_size: int = 32
    teacher_steps: int = 1500
    meta_steps: int = 50
    module_steps: int = 40
    """Of each pair, one after another."""
    end_to_end_steps: int = 200
    temperature: float = 1.0
    hidden_weight: float = 10.0
    """In the pairs' objective, of what leaves a stage."""
    teacher_rate: float = 1e-3
    module_rate: float = 4e-3
    """Learning rate of meta model and pairs."""
    rates: tuple[float, ...] = (2e-3, 4e-3)
    """Learning rates to choose from for training end to end."""
    curve_points: int = 10


@dataclass(frozen=True)
class Method:
    """How a student is trained end to end, and what it begins with."""

    alpha: float = 0.0
    """Weight of the teacher's logits."""
    start: Literal["fresh", "ends", "modules"] = "fresh"


METHODS = {
    "scratch": Method(),
    "teacher's ends": Method(start="ends"),
    "logit KD": Method(alpha=0.5),
    "m2mKD": Method(start="modules"),
    "m2mKD + logits": Method(alpha=0.5, start="modules"),
}
COMPARED = (("m2mKD", ("scratch", "teacher's ends")), ("m2mKD + logits", ("logit KD",)))


class Digits:
    """1797 images of 8 x 8 pixels: 1000 to train on, 297 to choose with, 500 to test with."""

    def __init__(self) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        pixels = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
        labels = torch.tensor(digits.target)[order]
        bounds = {"train": slice(0, 1000), "validation": slice(1000, 1297), "test": slice(1297, None)}
        self.parts = {name: {"pixel_values": pixels[s], "labels": labels[s]} for name, s in bounds.items()}

    def batches(self, steps: int, size: int, seed: int) -> Iterator[Batch]:
        """Training images, epoch by epoch in random order, each moved by up to one pixel to a side."""
        generator = torch.Generator().manual_seed(seed)
        part = self.parts["train"]
        waiting = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(waiting) < size:
                waiting = torch.randperm(len(part["labels"]), generator=generator)
            chosen, waiting = waiting[:size], waiting[size:]
            padded = F.pad(part["pixel_values"][chosen], (1, 1), value=-1.0)
            columns = torch.arange(8) + torch.randint(0, 3, (size, 1), generator=generator)
            moved = padded.gather(-1, columns[:, None, None].expand(-1, 1, 8, -1))
            yield {"pixel_values": moved, "labels": part["labels"][chosen]}


@torch.no_grad()
def evaluate(model: nn.Module, part: Batch) -> dict[str, float]:
    """Cross entropy in nats and accuracy; of a model or a cut one."""
    training = model.training
    logits = model.eval()(**part).logits
    model.train(training)
    accuracy = (logits.argmax(-1) == part["labels"]).float().mean().item()
    return {"loss": F.cross_entropy(logits, part["labels"]).item(), "accuracy": accuracy}


@dataclass
class Run:
    """What all trainings share; the bar counts trainings."""

    digits: Digits
    plan: Plan
    bar: tqdm

    def train(
        self, module: nn.Module, loss_of: LossOf, steps: int, rate: float, seed: int, watch: bool = False
    ) -> list[tuple[float, float]]:
        """
        AdamW, a tenth of the steps to warm up, then down to 0 along a cosine.

        Returns:
            with `watch`, cross entropy on validation images after each part of the steps: (share, loss).
        """
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
        every = max(1, steps // self.plan.curve_points)
        curve = []
        module.train()
        for step, batch in enumerate(self.digits.batches(steps, self.plan.batch_size, seed), 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step / steps)
            optimizer.zero_grad()
            loss_of(batch).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if watch and (step % every == 0 or step == steps):
                curve.append((step / steps, evaluate(module, self.digits.parts["validation"])["loss"]))
        module.eval()
        self.bar.update()
        return curve


def schedule(share: float) -> float:
    """Factor on the learning rate, at a share of all steps."""
    return min(share / 0.1, 0.5 * (1 + math.cos(math.pi * max(0.0, share - 0.1) / 0.9)))


def get_teacher(run: Run, directory: Path) -> PreTrainedModel:
    """Trained from labels, or read if that was done before."""
    if not (directory / "config.json").is_file():
        run.bar.set_description_str("teacher")
        torch.manual_seed(0)
        config = ViTConfig(**SIZES, num_hidden_layers=run.plan.teacher_blocks, intermediate_size=128)
        teacher = ViTForImageClassification(config)
        run.train(teacher, labels_of(teacher), run.plan.teacher_steps, run.plan.teacher_rate, seed=0)
        half_done = directory.with_suffix(".tmp")
        teacher.save_pretrained(half_done)
        os.replace(half_done, directory)
    return ViTForImageClassification.from_pretrained(directory).eval()


def student_config(plan: Plan) -> ModMoEVisionConfig:
    """Half of the teacher's depth, and as wide: a token uses two experts that are together as wide as its FFN."""
    return ModMoEVisionConfig(
        **SIZES,
        num_hidden_layers=plan.student_blocks,
        intermediate_size=64,
        num_experts=plan.num_experts,
        num_experts_per_tok=2,
    )


def labels_of(model: PreTrainedModel) -> LossOf:
    """The loss from labels alone."""
    return lambda batch: model(**batch).loss


def taught(student: PreTrainedModel, teacher: PreTrainedModel, alpha: float, temperature: float) -> LossOf:
    """(1 - alpha) CE + alpha tau^2 KL(teacher || student), and router losses."""

    def loss_of(batch: Batch) -> torch.Tensor:
        output = student(**batch)
        with torch.no_grad():
            wanted = teacher(batch["pixel_values"]).logits
        kl = temperature**2 * forward_kl(output.logits, wanted, temperature).mean()
        return output.loss + alpha * (kl - output.cross_entropy)

    return loss_of if alpha else labels_of(student)


@dataclass
class Modules:
    """A student that was taught module by module; losses and accuracies on validation images."""

    student: Path
    compute: float
    """What it took, in student's steps from labels."""
    meta: dict[str, float]
    hybrids: dict[int, float]
    """Stage -> cross entropy of the meta model with the teacher's stage in it."""
    assembled: dict[str, float]
    """Of the student before it is trained end to end."""


def teach_modules(run: Run, teacher: PreTrainedModel, seed: int, directory: Path) -> Modules:
    """Fit a meta model, train every pair inside it, put the stages together."""
    plan, config = run.plan, student_config(run.plan)
    whole = cut(teacher, plan.num_stages)
    meta = build_meta(whole, seed=seed)
    fit = MetaFit(meta, FIT, whole, targets_of=class_targets)
    torch.manual_seed(seed)
    run.train(fit, lambda batch: fit(**batch)["loss"], plan.meta_steps, plan.module_rate, seed)
    validation = run.digits.parts["validation"]
    report = evaluate_hybrids(meta, whole.stages, [validation], class_targets)
    objective = Objective(alpha=0.5, temperature=plan.temperature, hidden_weight=plan.hidden_weight)
    specs = stage_specs(even_ranges(config.num_hidden_layers, plan.num_stages), config.hidden_size)
    saved = []
    for spec in specs:
        stage = build_student_stage(config, spec, seed)
        initialize_ends(stage, whole.frame)
        pair = StagePair(meta, stage, objective, whole.stages[spec.index], targets_of=class_targets)
        run.train(pair, lambda batch, p=pair: p(**batch)["loss"], plan.module_steps, plan.module_rate, seed)
        saved.append(directory / f"stage_{spec.index}")
        pair.save(saved[-1])
    assemble(saved, directory / "student")
    student = ModMoEForImageClassification.from_pretrained(directory / "student")
    return Modules(
        directory / "student",
        compute_of_modules(plan, whole, meta, student),
        evaluate(meta, validation),
        report.hybrids,
        evaluate(student, validation),
    )


def compute_of_modules(plan: Plan, teacher: CutModel, meta: CutModel, student: ModMoEForImageClassification) -> float:
    """Computation of the meta model's fit and of all pairs, in student's steps from labels."""
    taught, stood = ([size(stage) for stage in model.stages] for model in (teacher, meta))
    others = plan.num_stages - 1
    # Teacher's signals, meta model in training, stages of the teacher that stand in half of the time, frozen.
    total = plan.meta_steps * (sum(taught) + 3 * sum(stood) + 2 * 0.5 * sum(taught) * others / plan.num_stages)
    learns = student.num_active_parameters() / plan.num_stages
    for index in range(plan.num_stages):
        teacher_net = sum(stood) - stood[index] + taught[index]
        total += plan.module_steps * (teacher_net + 3 * learns + 2 * sum(stood[index + 1 :]))
    return total / (3 * student.num_active_parameters())


def compute_of_a_step(method: str, teacher: PreTrainedModel, student: ModMoEForImageClassification) -> float:
    """Of an end-to-end step, in student's steps from labels: the teacher, if it takes part, is run forward."""
    return 1 + (size(teacher) / (3 * student.num_active_parameters()) if METHODS[method].alpha else 0)


def size(module: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def build_student(
    plan: Plan, teacher: PreTrainedModel, method: Method, seed: int, modules: Modules
) -> ModMoEForImageClassification:
    """What a method begins with."""
    if method.start == "modules":
        return ModMoEForImageClassification.from_pretrained(modules.student)
    torch.manual_seed(seed)
    student = ModMoEForImageClassification(student_config(plan))
    if method.start == "ends":
        whole = stage_specs([(0, plan.student_blocks)], SIZES["hidden_size"])[0]
        stage = build_student_stage(student.config, whole, seed)
        initialize_ends(stage, cut(teacher, 1).frame)
        student.load_state_dict(stage.state_dict())
    return student


def end_to_end(
    run: Run, teacher: PreTrainedModel, method: str, steps: int, rate: float, seed: int, modules: Modules
) -> dict[str, Any]:
    """
    Train a student.

    Returns:
        losses and accuracies on validation and test images, steps and the curve.
    """
    student = build_student(run.plan, teacher, METHODS[method], seed, modules)
    loss_of = taught(student, teacher, METHODS[method].alpha, run.plan.temperature)
    begin = time.process_time()
    curve = run.train(student, loss_of, steps, rate, seed + 1000, watch=True)
    parts = {name: evaluate(student, run.digits.parts[name]) for name in ("validation", "test")}
    return parts | {"steps": steps, "rate": rate, "curve": curve, "cpu_seconds": time.process_time() - begin}


def tune(run: Run, teacher: PreTrainedModel, directory: Path) -> dict[str, dict[str, float]]:
    """Method -> learning rate -> cross entropy on validation images, with a seed of its own."""
    run.bar.set_description_str("learning rates")
    modules = teach_modules(run, teacher, TUNING_SEED, directory)
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        for rate in run.plan.rates:
            result = end_to_end(run, teacher, method, run.plan.end_to_end_steps, rate, TUNING_SEED, modules)
            found.setdefault(method, {})[str(rate)] = result["validation"]["loss"]
    return found


def run_seed(
    run: Run, teacher: PreTrainedModel, rates: dict[str, float], seed: int, directory: Path
) -> dict[str, Any]:
    """All methods with one seed."""
    run.bar.set_description_str(f"seed {seed}")
    modules = teach_modules(run, teacher, seed, directory)
    student = ModMoEForImageClassification.from_pretrained(modules.student)
    short = run.plan.end_to_end_steps
    rows = []
    for name, method in METHODS.items():
        step = compute_of_a_step(name, teacher, student)
        before, views = 0.0, {STEPS: short, COMPUTATION: short + round(modules.compute / step)}
        if method.start == "modules":
            before, views = modules.compute, {BOTH: short}
        for view, steps in views.items():
            result = end_to_end(run, teacher, name, steps, rates[name], seed, modules)
            result["curve"] = [(before + share * steps * step, loss) for share, loss in result["curve"]]
            rows.append({"method": name, "view": view, "compute": before + steps * step} | result)
    measured = {name: value for name, value in asdict(modules).items() if name != "student"}
    return {"seed": seed, "modules": measured, "rows": rows}


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds; made and written at once, whole or not at all, if there is none."""
    if not path.is_file():
        write(path, json.dumps(make(), indent=1))
    return json.loads(path.read_text())


def write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_done = path.with_suffix(".tmp")
    half_done.write_text(text + "\n")
    os.replace(half_done, path)


def trainings_left(plan: Plan, out: Path) -> int:
    """How many trainings have to be run; a meta model and every pair are one each."""
    modules = 1 + plan.num_stages
    count = 0 if (out / "teacher").is_dir() else 1
    count += 0 if (out / "tuning.json").is_file() else modules + len(METHODS) * len(plan.rates)
    views = sum(1 if method.start == "modules" else 2 for method in METHODS.values())
    seeds = [seed for seed in range(plan.num_seeds) if not (out / f"seed_{seed}.json").is_file()]
    return count + len(seeds) * (modules + views)


def main(plan: Plan, out: Path, results: Path) -> None:
    """
    Everything, in order; what is done already is read from `out`.

    Raises:
        ValueError: if `out` holds work of another plan.
    """
    if kept(out / "plan.json", lambda: asdict(plan)) != json.loads(json.dumps(asdict(plan))):
        raise ValueError(
            f"{out} holds the work of another plan ({out / 'plan.json'}): remove it, or give another --out"
        )
    with tqdm(total=trainings_left(plan, out), unit="training") as bar:
        run = Run(Digits(), plan, bar)
        teacher = get_teacher(run, out / "teacher")
        tuning = kept(out / "tuning.json", lambda: tune(run, teacher, out / "tuning"))
        rates = {method: float(min(losses, key=losses.__getitem__)) for method, losses in tuning.items()}
        seeds = [
            kept(out / f"seed_{seed}.json", lambda s=seed: run_seed(run, teacher, rates, s, out / f"seed_{s}"))
            for seed in range(plan.num_seeds)
        ]
        taught = {name: evaluate(teacher, run.digits.parts[name]) for name in ("validation", "test")}
    content = {"plan": asdict(plan), "teacher": taught, "tuning": tuning, "summary": summary(seeds), "seeds": seeds}
    write(results / "distill_digits.json", json.dumps(content, indent=1))
    write(results / "distill_digits.md", table(content))
    draw(seeds, results / "distill_digits.png")


def summary(seeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method and view: means and standard deviations over seeds."""
    rows = []
    for number, first in enumerate(seeds[0]["rows"]):
        same = [seed["rows"][number] for seed in seeds]
        row = {name: first[name] for name in ("method", "view", "steps", "compute", "rate")}
        for part, name in (("validation", "loss"), ("test", "loss"), ("test", "accuracy")):
            values = [entry[part][name] for entry in same]
            row[f"{part}_{name}"] = {"mean": statistics.fmean(values), "spread": spread(values), "values": values}
        row["cpu_seconds"] = statistics.fmean(entry["cpu_seconds"] for entry in same)
        rows.append(row)
    return rows


def spread(values: list[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plus_minus(values: dict[str, float], digits: int, factor: float = 1.0) -> str:
    """Mean and spread."""
    return f"{factor * values['mean']:.{digits}f} ± {factor * values['spread']:.{digits}f}"


def table(content: dict[str, Any]) -> str:
    """The results in Markdown."""
    plan, seeds, teacher = content["plan"], content["seeds"], content["teacher"]
    lines = [
        "# Distilling a ViT into a V-MoE, module by module: digits",
        "",
        f"`experiments/distill_digits.py`; {len(seeds)} seeds, mean ± standard deviation; 500 test images. "
        "Computation is in student's steps from labels and has everything in it but the teacher's training.",
        "",
        "| method | compared at | end-to-end steps | computation | learning rate | test accuracy, % | test loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["summary"]:
        accuracy = plus_minus(row["test_accuracy"], 1, 100)
        lines.append(
            f"| {row['method']} | {row['view']} | {row['steps']} | {row['compute']:.0f} | {row['rate']:g} | "
            f"{accuracy} | {plus_minus(row['test_loss'], 3)} |"
        )
    lines += ["", "Difference in test loss, seed by seed, from baselines that see the same targets:", ""]
    for method, baselines in COMPARED:
        ours = next(row for row in content["summary"] if row["method"] == method)
        for other in (row for row in content["summary"] if row["method"] in baselines):
            changes = [
                mine - theirs for mine, theirs in zip(*(r["test_loss"]["values"] for r in (ours, other)), strict=True)
            ]
            lines.append(
                f"- {method} against {other['method']}, {other['view']}: {statistics.fmean(changes):+.3f} ± "
                f"{spread(changes):.3f}, lower in {sum(change < 0 for change in changes)} of {len(changes)} seeds."
            )
    modules = [seed["modules"] for seed in seeds]
    hybrids = [f"{statistics.fmean(m['hybrids'][index] for m in modules):.3f}" for index in modules[0]["hybrids"]]
    meta, assembled = (
        {name: statistics.fmean(m[kind][name] for m in modules) for name in ("loss", "accuracy")}
        for kind in ("meta", "assembled")
    )
    lines += [
        "",
        f"Teacher: {100 * teacher['test']['accuracy']:.1f} % of test images, loss {teacher['test']['loss']:.3f}. Loss "
        f"on validation images: teacher {teacher['validation']['loss']:.3f}; meta model alone {meta['loss']:.3f}, "
        f"with a stage of the teacher in it {', '.join(hybrids)}; assembled student before it is trained end to end "
        f"{assembled['loss']:.3f} ({100 * assembled['accuracy']:.1f} %).",
        "",
        f"Meta model: {plan['meta_steps']} steps; each of {plan['num_stages']} pairs: {plan['module_steps']} steps.",
        "",
        "![validation loss](distill_digits.png)",
    ]
    return "\n".join(lines)


def draw(seeds: list[dict[str, Any]], path: Path) -> None:
    """Validation loss over computation: mean of all seeds, and from the lowest to the highest."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = dict(zip(METHODS, ("tab:gray", "tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True))
    for number, first in enumerate(seeds[0]["rows"]):
        curves = torch.tensor([seed["rows"][number]["curve"] for seed in seeds])
        x, y = curves[0, :, 0], curves[:, :, 1]
        name, short = first["method"], first["view"] == STEPS
        axes.plot(x, y.mean(0), color=colours[name], linestyle=":" if short else "-", label=None if short else name)
        axes.fill_between(x, y.amin(0), y.amax(0), color=colours[name], alpha=0.15, linewidth=0)
    axes.set(xlabel="computation (student's steps from labels)", ylabel="validation loss (nats)", yscale="log")
    axes.legend(title="dotted: as many end-to-end steps only", frameon=False)
    half_done = path.with_suffix(".tmp.png")
    figure.savefig(half_done, dpi=120)
    os.replace(half_done, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distill_digits"), help="work in progress")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where table, curve and numbers go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()  # of transformers, for every model that is read or written
    main(Plan(), arguments.out, arguments.results)
