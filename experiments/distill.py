#!/usr/bin/env python
"""
What does module-to-module distillation gain over training the student from scratch?

    python experiments/distill.py

One dense teacher (configs/distill/teacher.yaml). Per seed a student of configs/distill/quickstart.yaml is trained
module by module and then end to end: by labels, and for fewer steps by the teacher's logits as well, which takes as
many CPU seconds. The baselines train all of it end to end: from fresh weights, with the teacher's logits, and from the
teacher's weights; once on as many tokens as each part of the student with the teacher's logits has seen, and once for
as many CPU seconds as all phases of the distillation take together, by what a step of each took on seed 0. "meta"
trains the modules in a fitted meta model and through it, by labels, logits and hidden states, which is nearer to the
paper (seed 0).

How modules are taught was chosen in probes on seed 0 (docs/decisions.md); the baselines have had none.

Writes docs/results/distill; what a seed's file there holds already is not measured again.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from common import Results, Values, main, mean_and_spread, train

NAME = "distill"
PAIR_STEPS = 300  # of configs/distill/quickstart.yaml
# Pairs took 460 CPU seconds, and these end-to-end steps 630 with labels or with logits.
LABEL_STEPS, LOGIT_STEPS = 1270, 700
STEPS = PAIR_STEPS + LOGIT_STEPS
# Of other methods, 1,000 steps took 496 (scratch), 534 (upcycle) and 866 seconds (logit_kd).
LONGER = {"scratch": 2195, "upcycle": 2041, "logit_kd": 1258}
LOGITS = {"finetuning__teacher": "{weight: 0.5}"}
META = {
    "distillation__meta__method": "fit",
    "distillation__meta__optimization": "{steps: 400, learning_rate: 1e-3}",
    "distillation__pairs__local": "false",
}
TITLES = {
    "modules": "module by module, then end to end",
    "modules_kd": "the same, end to end with the teacher's logits",
    "meta": "the same, in and through a fitted meta model",
    "scratch": "from scratch",
    "logit_kd": "teacher's logits",
    "upcycle": "from the teacher's weights",
    "scratch, equal compute": "from scratch, equal CPU seconds",
    "logit_kd, equal compute": "teacher's logits, equal CPU seconds",
    "upcycle, equal compute": "from the teacher's weights, equal CPU seconds",
}
DOMAIN = "python"


def measure_seed(seed: int, directory: Path) -> None:
    results = Results(NAME, seed)
    teacher = partial(train, "pretrain.py", "configs/distill/teacher.yaml", directory.parent / "teacher")

    def student(name: str, method: str, steps: int, **options: Any) -> dict[str, Any]:
        out = directory / name
        options |= {"distillation__method": method, "optimization__steps": steps, "seed": seed, "teacher": teacher()}
        train("distill.py", "configs/distill/quickstart.yaml", out, **options)
        content = json.loads((out / "results.json").read_text())
        del content["teacher"]  # a path
        return content

    def with_logits() -> dict[str, Any]:
        for part in ("teacher", "stages"):  # which are the same
            if (directory / "modules" / part).exists():
                shutil.copytree(directory / "modules" / part, directory / "modules-kd" / part, dirs_exist_ok=True)
        return student("modules-kd", "modules", LOGIT_STEPS, **LOGITS)

    def scores_of_the_teacher() -> dict[str, float]:
        scores = json.loads((teacher().parent / "results.json").read_text())
        return {domain: score["nats_per_token"] for domain, score in scores.items()}

    results.measure("teacher", scores_of_the_teacher)
    results.measure("modules", lambda: student("modules", "modules", LABEL_STEPS))
    results.measure("modules_kd", with_logits)
    for method in ("scratch", "logit_kd", "upcycle"):
        results.measure(method, partial(student, f"distill-{method}", method, STEPS))

    for method, steps in LONGER.items():
        results.measure(f"{method}, equal compute", partial(student, f"distill-{method}-longer", method, steps))
    if seed == 0:  # half an hour
        results.measure("meta", lambda: student("meta", "modules", LOGIT_STEPS, **LOGITS, **META))


def table(results: list[Values]) -> str:
    lines = [
        f"Validation loss in nats per token, mean ± standard deviation over {len(results)} seeds. Tokens are those "
        "that every part of the student was trained on; seconds are of the CPU, over all phases, but for runs that "
        "were killed in between. Pairs have 300 steps, or about 460 of these seconds. The teacher is at "
        + ", ".join(f"{loss:.3f} ({domain})" for domain, loss in results[0]["teacher"].items())
        + ".",
        "",
        "| training | million tokens | CPU s | Python | English | C | end-to-end tokens to scratch's last loss, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        measured = [r for r in results if name in r]
        if not measured:
            continue
        runs = [r[name] for r in measured]
        if len(runs) < len(results):
            title += f" ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        losses = [
            mean_and_spread((run["validation"][d] for run in runs), "{:.3f}") for d in ("python", "english", "c")
        ]
        shares = [tokens_to_scratch(r, name) for r in measured]
        reached = "never" if None in shares else mean_and_spread(shares, "{:.0f}")
        tokens = mean_and_spread((run["student_tokens"] / 1e6 for run in runs), "{:.2f}")
        known = [run["cpu_seconds"] for run in runs if run["cpu_seconds"]]
        seconds = mean_and_spread(known, "{:.0f}") if known else "not known"
        seconds += f" ({len(known)} of {len(runs)})" if 0 < len(known) < len(runs) else ""
        lines.append(f"| {title} | {tokens} | {seconds} | " + " | ".join(losses) + f" | {reached} |")
    return "\n".join(lines) + "\n"


def tokens_to_scratch(result: Values, name: str) -> float | None:
    """End-to-end tokens after which a run is as good as scratch at its end, in % of scratch's; None: it never is."""
    target, total = result["scratch"]["curve"][-1][DOMAIN], result["scratch"]["curve"][-1]["tokens"]
    reached = [point["tokens"] for point in result[name]["curve"] if point[DOMAIN] <= target]
    return 100 * reached[0] / total if reached else None


def draw(results: list[Values], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for number, (name, title) in enumerate(TITLES.items()):
        for i, result in enumerate(r for r in results if name in r):
            run, look = result[name], {"color": f"C{number}", "label": None if i else title, "alpha": 0.8}
            loss = [point[DOMAIN] for point in run["curve"][1:]]
            tokens = [point["tokens"] for point in run["curve"][1:]]
            before = run["student_tokens"] - tokens[-1]
            by_tokens.plot([(before + t) / 1e6 for t in tokens], loss, **look)
            if not run["cpu_seconds"]:
                continue
            last = run["phases"]["end to end"]["cpu_seconds"]
            before = run["cpu_seconds"] - last
            by_seconds.plot([before + last * t / tokens[-1] for t in tokens], loss, **look)
    by_tokens.set(xlabel="million tokens that every part of the student has seen", ylabel="Python, nats per token")
    by_seconds.set(xlabel="CPU seconds, all phases")
    by_tokens.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(__doc__, NAME, measure_seed, table, draw)
