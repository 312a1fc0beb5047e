#!/usr/bin/env python
"""
Does a model that learns a new domain forget the old ones?

    python experiments/extend.py

Per seed, a base model of Python and English learns C in three ways with equally many tokens: with an extension (4 FFN
and 2 attention experts in each layer, all else frozen), with LoRA of as many parameters, and with full fine-tuning. It
learns from C only, or from C and the old domains. With the old domains, the extension is also trained with
`domain_loss`, which teaches its routers which text they are for.

Learning rates were chosen on another seed, each as the best on C of two or three in short runs without `domain_loss`.
With `domain_loss`, the extension's learning rate and the coefficient of the loss were chosen on seed 0 among five
settings. So was the share of C, after 70 % had cost the old domains more than 0.5 %.

Writes docs/results/extend; what a seed's file there holds already is not measured again.
"""

from functools import partial
from pathlib import Path

from common import DOMAINS, MAX_BYTES, ROOT, Models, Results, Scorer, Values, main, mean_and_spread, run, train

NAME = "extend"


def mixture(c: float, python: float = 0.0, english: float = 0.0) -> str:
    """Sources of a run with their shares."""
    shares = {"c": c, "python": python, "english": english}
    sources = [
        f"{{name: {name}, embedded: {name}, weight: {share}, max_bytes: {MAX_BYTES.get(name, 'null')}}}"
        for name, share in shares.items()
        if share
    ]
    return f"[{', '.join(sources)}]"


RECIPES = {
    "C alone": mixture(c=1.0),
    "half C": mixture(c=0.5, python=0.4, english=0.1),
    "60 % C": mixture(c=0.6, python=0.25, english=0.15),
}
LEARNING_RATES = {"extension": 5e-3, "told": 3e-3, "lora": 1e-2, "full": 3e-3}
LORA_RANK = 20  # 660,480 parameters; the extension has 644,096
TITLES = {
    "extension": "extension",
    "told": "extension with domain_loss",
    "lora": "LoRA",
    "full": "full fine-tuning",
}
ARMS = [
    *[("C alone", method) for method in ("extension", "lora", "full")],
    *[("half C", method) for method in TITLES],
    *[("60 % C", method) for method in ("told", "lora")],
]


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

    def taught(self, recipe: str, method: str) -> Path:
        options = {"seed": self.seed, "data__sources": RECIPES[recipe], "finetuning__method": method}
        if method in ("extension", "told"):
            options |= {"finetuning__method": "extension", "finetuning__extensions": "[c]"}
        if method == "told":
            options["finetuning__domain_loss"] = "{sources: [c]}"
        if method == "lora":
            options["finetuning__lora"] = f"{{rank: {LORA_RANK}, alpha: {2 * LORA_RANK}}}"
        init = self.base() if method in ("lora", "full") else self.extended()
        rate = LEARNING_RATES[method]
        out = self.directory / f"{method}-{recipe.replace(' ', '')}-{rate:g}"
        return train(
            "finetune.py", "experiments/extend.yaml", out, init=init, optimization__learning_rate=rate, **options
        )


def measure_seed(seed: int, directory: Path) -> None:
    models, results = ExtendedModels(seed, directory), Results(NAME, seed)
    score = Scorer(models.base)
    results.measure("base", lambda: score(models.base()))
    for arm in ARMS:
        results.measure("/".join(arm), partial(lambda arm: score(models.taught(*arm)), arm))


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
    for recipe, method in ARMS:
        name = f"{recipe}/{method}"
        new = mean_and_spread((r[name]["c"] for r in results), "{:.3f}")
        old = [mean_and_spread(increase(r, name, domain) for r in results) for domain in DOMAINS[:2]]
        lines.append(f"| {recipe} | {TITLES[method]} | {new} | " + " | ".join(old) + " |")
    return "\n".join(lines) + "\n"


def increase(result: Values, name: str, domain: str) -> float:
    return 100 * (result[name][domain] / result["base"][domain] - 1)


def draw(results: list[Values], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = dict(zip(RECIPES, figure.subplots(1, 3, sharex=True, sharey=True), strict=True))
    colors = {method: f"C{number}" for number, method in enumerate(TITLES)}
    for recipe, method in ARMS:
        name = f"{recipe}/{method}"
        learned = [r[name]["c"] for r in results]
        forgotten = [increase(r, name, "python") for r in results]
        axes[recipe].scatter(learned, forgotten, label=TITLES[method], color=colors[method])
    for recipe, axis in axes.items():
        axis.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axis.set(title=recipe, xlabel="C, nats per token", yscale="symlog", ylim=(0, 150))
    axes["C alone"].set_ylabel("Python, % worse than before")
    axes["half C"].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(__doc__, NAME, measure_seed, table, draw)
