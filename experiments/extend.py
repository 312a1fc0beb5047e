#!/usr/bin/env python
"""
Does a model that learns a new domain forget the old ones?

    python experiments/extend.py

Per seed a base model of Python and English learns C in three ways at equal tokens: by an extension (4 FFN and 2
attention experts in each layer, all else frozen), by LoRA of as many parameters, and by full fine-tuning; from C alone
("lifelong"), and from half C and half old domains ("joint"). Learning rates were chosen on another seed, each the best
on C of two or three in short runs.

Writes docs/results/extend; what a seed's file there holds already is not measured again.
"""

from functools import partial
from pathlib import Path

from common import DOMAINS, ROOT, Models, Results, Scorer, Values, main, mean_and_spread, run, train

NAME = "extend"
C = "{name: c, embedded: c, max_bytes: 4000000, weight: 0.5}"
PYTHON = "{name: python, embedded: python, weight: 0.4}"
ENGLISH = "{name: english, embedded: english, weight: 0.1}"
RECIPES = {"lifelong": f"[{C}]", "joint": f"[{C}, {PYTHON}, {ENGLISH}]"}
LEARNING_RATES = {"extension": 5e-3, "lora": 1e-2, "full": 3e-3}
LORA_RANK = 20  # 660,480 parameters; the extension has 642,048
TITLES = {"extension": "extension", "lora": "LoRA", "full": "full fine-tuning"}


class ExtendedModels(Models):
    def extended(self) -> Path:
        """With experts that do nothing yet."""
        out = self.directory / "extended"
        if not out.exists():
            # As many slots as experts: each is used where it beats null.
            new = ("--experts", "4", "--top-k", "4", "--attn-experts", "2", "--attn-top-k", "2")
            new = (*new, "--name", "c", "--seed", str(self.seed))
            run(ROOT / "tools" / "extend.py", "--model", self.base(), *new, "--out", out)
        return out

    def taught(self, method: str, recipe: str, rate: float) -> Path:
        options = {"seed": self.seed, "finetuning__method": method, "data__sources": RECIPES[recipe]}
        if method == "extension":
            options["finetuning__extensions"] = "[c]"
        if method == "lora":
            options["finetuning__lora"] = f"{{rank: {LORA_RANK}, alpha: {2 * LORA_RANK}}}"
        init = self.extended() if method == "extension" else self.base()
        out = self.directory / f"{method}-{recipe}-{rate:g}"
        return train(
            "finetune.py", "experiments/extend.yaml", out, init=init, optimization__learning_rate=rate, **options
        )


def measure_seed(seed: int, directory: Path) -> None:
    models, results = ExtendedModels(seed, directory), Results(NAME, seed)
    score = Scorer(models.base)
    results.measure("base", lambda: score(models.base()))
    for method, rate in LEARNING_RATES.items():
        for recipe in RECIPES:
            how = partial(lambda *which: score(models.taught(*which)), method, recipe, rate)
            results.measure(f"{method}/{recipe}", how)


def table(results: list[Values]) -> str:
    lines = [
        "Cross entropy on validation text: of C in nats per token, of old domains its change in %; mean ± standard "
        f"deviation over {len(results)} seeds.",
        "",
        "| recipe | method | C | Python | English |",
        "|---|---|---|---|---|",
        f"| | before | {mean_and_spread((r['base']['c'] for r in results), '{:.3f}')} | "
        + " | ".join(mean_and_spread((r["base"][d] for r in results), "{:.3f}") + " nats" for d in DOMAINS[:2])
        + " |",
    ]
    for recipe in RECIPES:
        for method, title in TITLES.items():
            new = mean_and_spread((r[f"{method}/{recipe}"]["c"] for r in results), "{:.3f}")
            old = [
                mean_and_spread(increase(r, f"{method}/{recipe}", domain) for r in results) for domain in DOMAINS[:2]
            ]
            lines.append(f"| {recipe} | {title} | {new} | " + " | ".join(old) + " |")
    return "\n".join(lines) + "\n"


def increase(result: Values, name: str, domain: str) -> float:
    return 100 * (result[name][domain] / result["base"][domain] - 1)


def draw(results: list[Values], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, recipe in zip(figure.subplots(1, 2, sharex=True, sharey=True), RECIPES, strict=True):
        for method, title in TITLES.items():
            points = [r[f"{method}/{recipe}"]["c"] for r in results]
            forgotten = [(increase(r, f"{method}/{recipe}", "python")) for r in results]
            axis.scatter(points, forgotten, label=title)
        axis.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axis.set(title=recipe, xlabel="C, nats per token", yscale="symlog")
    figure.axes[0].set_ylabel("Python, % worse than before")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(__doc__, NAME, measure_seed, table, draw)
