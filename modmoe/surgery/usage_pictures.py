"""Pictures of a usage report: load, specialisation, co-activation.

Letters: R routers of one side, E experts (the largest number among them), D domains.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from modmoe.surgery.usage import RouterUsage, UsageReport

SIDE_TITLES = {"attn": "attention experts", "ffn": "FFN experts"}

PICTURE_FILES = (
    *(f"load_{side}.png" for side in SIDE_TITLES),
    "specialisation.png",
    *(f"coactivation_{side}.png" for side in SIDE_TITLES),
)

# Tell each other apart for the colour-blind as well (Okabe and Ito).
_DOMAIN_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B8A800")
# What is not on a scale: dead experts, pairs never expected, places without an expert in layers that have fewer.
_GREY = "#d8d8d8"
# Ratios are shown from 2 ** -3 to 2 ** 3, on a logarithmic scale that is white at 1.
_DOUBLINGS = 3
# Pairs of experts that fewer tokens are expected to choose say nothing.
_FEWEST_EXPECTED = 5


class Picture(NamedTuple):
    """One PNG file."""

    name: str
    title: str
    caption: str
    png: bytes


def draw_pictures(report: UsageReport) -> list[Picture]:
    """All pictures that the report has something to show for."""
    sides = [side for side in SIDE_TITLES if _routers(report, side)]
    pictures = [_load(report, side) for side in sides]
    if len(report.domains) > 1:
        pictures.append(_specialisation(report, sides))
    pictures += [_co_activation(report, side) for side in sides if max(r.top_k for r in _routers(report, side)) > 1]
    return pictures


def domain_colours(domains: Sequence[str]) -> dict[str, str]:
    """A colour for each domain, as #rrggbb."""
    if len(domains) <= len(_DOMAIN_COLOURS):
        return dict(zip(domains, _DOMAIN_COLOURS, strict=False))
    return {name: to_hex(colormaps["hsv"](i / len(domains))) for i, name in enumerate(domains)}


def _load(report: UsageReport, side: str) -> Picture:
    routers = _routers(report, side)
    grids = {name: _grid([r.on(name).load * r.num_experts for r in routers]) for name in report.domains}
    figure, axes, cell = _panels(len(grids), min(len(grids), 3), *next(iter(grids.values())).shape)
    for axis, (name, grid) in zip(axes, grids.items(), strict=False):
        dead = _grid([r.on(name).dead(report.dead_below) for r in routers]) == 1
        image = _draw_ratios(axis, np.where(dead, np.nan, grid))
        _mark_dead(axis, dead, cell)
        if cell > 0.4:
            dark = np.abs(np.log2(grid, where=grid > 0, out=np.zeros_like(grid))) > 0.6 * _DOUBLINGS
            _write_values(axis, np.where(dead, np.nan, grid), dark, "{:.1f}")
        _label(axis, f"{name} ({report.tokens[name]:,} tokens)", routers)
    _draw_ratio_bar(figure, axes, image, "load / even load")
    title = f"Load of the {SIDE_TITLES[side]}"
    figure.suptitle(title, fontsize=11)
    caption = (
        "Share of the (token, expert) pairs that each expert gets, relative to an even share: white is even, red is "
        f"more, blue less. Grey with a cross: dead (below {report.dead_below:g} of an even share); grey without one: "
        "no expert."
    )
    return Picture(f"load_{side}.png", title, caption, _png(figure))


def _specialisation(report: UsageReport, sides: list[str]) -> Picture:
    colours = domain_colours(report.domains)
    tall, wide = max(len(_routers(report, side)) for side in sides), max(r.num_experts for r in report.routers)
    figure, axes, cell = _panels(len(sides), len(sides), tall, wide, legend=0.28 * len(report.domains) + 0.75)
    for axis, side in zip(axes, sides, strict=False):
        routers = _routers(report, side)
        axis.imshow(_domain_image(report, routers, list(colours.values())), aspect="auto", interpolation="nearest")
        dead = _grid([r.on().dead(report.dead_below) for r in routers]) == 1
        _mark_dead(axis, dead, cell)
        if cell > 0.4:
            strengths = _grid([router.specialisation.strengths for router in routers])
            _write_values(axis, np.where(dead, np.nan, strengths), strengths > 0.5, "{:.2f}")
        _label(axis, SIDE_TITLES[side], routers)
    title = "Which domain an expert belongs to"
    figure.suptitle(title, fontsize=11)
    _draw_legend(figure, colours)
    caption = (
        "Colour: the domain with the largest share of the expert's tokens, domains counted equally. Strength: how "
        "much the choice of the expert tells about the domain, KL(p(domain | expert) || uniform) / log(number of "
        "domains): white serves all domains alike, full colour a single one. Grey with a cross: dead on all of them."
    )
    return Picture("specialisation.png", title, caption, _png(figure))


def _domain_image(report: UsageReport, routers: list[RouterUsage], colours: list[str]) -> np.ndarray:
    """(R, E, 3) in 0..1."""
    wide = max(router.num_experts for router in routers)
    image = np.full((len(routers), wide, 3), to_rgb(_GREY))
    for row, router in enumerate(routers):
        special, dead = router.specialisation, router.on().dead(report.dead_below)
        for expert in range(router.num_experts):
            full = np.array(to_rgb(colours[int(special.homes[expert])]))
            blend = _blend(full, float(special.strengths[expert]))
            image[row, expert] = to_rgb(_GREY) if dead[expert] else blend
    return image


def _blend(colour: np.ndarray, strength: float) -> np.ndarray:
    # The root makes weak preferences visible; the legend shows the same scale.
    weight = math.sqrt(min(max(strength, 0.0), 1.0))
    return 1 - weight * (1 - colour)


def _draw_legend(figure: Any, colours: dict[str, str]) -> None:
    """A bar from white to full colour for each domain, below the panels."""
    strengths = np.linspace(0, 1, 256) ** 2
    image = np.array([[_blend(np.array(to_rgb(colour)), s) for s in strengths] for colour in colours.values()])
    width, height = figure.get_size_inches()
    # Inches from the left and lower edge; the layout of the panels leaves this strip free.
    bars = figure.add_axes((1.3 / width, 0.48 / height, min(2.4, width - 1.6) / width, 0.28 * len(colours) / height))
    bars.set_in_layout(False)
    bars.imshow(image, aspect="auto", interpolation="nearest", extent=(0, 1, len(colours) - 0.5, -0.5))
    bars.set_yticks(range(len(colours)), list(colours), fontsize=8)
    ticks = (0, 0.05, 0.25, 0.5, 1)
    bars.set_xticks([math.sqrt(t) for t in ticks], [f"{t:g}" for t in ticks], fontsize=7)
    bars.set_xlabel("specialisation", fontsize=8)


def _co_activation(report: UsageReport, side: str) -> Picture:
    routers = [router for router in _routers(report, side) if router.top_k > 1]
    size = 2.2 if len(routers) <= 8 or max(router.num_experts for router in routers) > 48 else 1.5
    columns = min(len(routers), int(13 / size))
    rows = math.ceil(len(routers) / columns)
    figure, axes = _subplots(rows, columns, columns * (size + 0.1) + 1.2, rows * (size + 0.3) + 0.6)
    for axis, router in zip(axes, routers, strict=False):
        sums = router.on()
        known = sums.expected_together >= _FEWEST_EXPECTED
        image = _draw_ratios(axis, sums.co_activation.where(known, math.nan).numpy())
        axis.set_title(f"layer {router.layer}", fontsize=8)
        ticks = range(0, router.num_experts, math.ceil(router.num_experts / 8))
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.tick_params(labelsize=6, length=2, pad=1)
    for axis in axes[len(routers) :]:
        axis.set_visible(False)
    figure.supxlabel("expert", fontsize=8)
    figure.supylabel("expert", fontsize=8)
    _draw_ratio_bar(figure, axes, image, "together / by chance")
    title = f"Co-activation of the {SIDE_TITLES[side]}"
    figure.suptitle(title, fontsize=11)
    caption = (
        "How many tokens chose both the row's and the column's expert, on all domains together, over what their loads "
        "let expect: white is chance, red attracts, blue avoids. Grey: the expert itself, and pairs of which fewer "
        f"than {_FEWEST_EXPECTED} tokens are expected."
    )
    return Picture(f"coactivation_{side}.png", title, caption, _png(figure))


def _draw_ratios(axis: Any, ratios: np.ndarray) -> Any:
    """(rows, columns) of ratios as a map; grey where they are NaN."""
    with np.errstate(divide="ignore"):
        doublings = np.log2(ratios).clip(-_DOUBLINGS, _DOUBLINGS)
    axis.set_facecolor(_GREY)
    limits = {"vmin": -_DOUBLINGS, "vmax": _DOUBLINGS}
    return axis.imshow(doublings, aspect="auto", cmap="RdBu_r", interpolation="nearest", **limits)


def _draw_ratio_bar(figure: Any, axes: list[Any], image: Any, label: str) -> None:
    ticks = range(-_DOUBLINGS, _DOUBLINGS + 1)
    # Of one width whatever the height of the figure: 0.14 inches.
    bar = figure.colorbar(image, ax=axes, ticks=list(ticks), pad=0.01, aspect=figure.get_figheight() / 0.2)
    bar.ax.set_yticklabels([f"1/{2**-t}" if t < 0 else str(2**t) for t in ticks], fontsize=7)
    bar.set_label(label, fontsize=8)


def _routers(report: UsageReport, side: str) -> list[RouterUsage]:
    return [router for router in report.routers if router.side == side]


def _grid(rows: Sequence[Tensor]) -> np.ndarray:
    """(R, E); NaN where a layer has fewer experts."""
    grid = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for i, row in enumerate(rows):
        grid[i, : len(row)] = row.numpy()
    return grid


def _mark_dead(axis: Any, dead: np.ndarray, cell: float) -> None:
    rows, experts = np.nonzero(dead)
    axis.scatter(experts, rows, marker="x", s=(20 * cell) ** 2, c="#555555", linewidths=0.8)


def _write_values(axis: Any, grid: np.ndarray, dark: np.ndarray, form: str) -> None:
    """Numbers in the cells, in white where the cell is dark; none where they are NaN."""
    for (row, column), value in np.ndenumerate(grid):
        if not math.isnan(value):
            colour = "white" if dark[row, column] else "#333333"
            axis.text(column, row, form.format(value), color=colour, fontsize=7, ha="center", va="center")


def _label(axis: Any, title: str, routers: list[RouterUsage]) -> None:
    wide = max(router.num_experts for router in routers)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("expert", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)
    axis.set_xticks(range(0, wide, math.ceil(wide / 16)))
    rows = range(0, len(routers), math.ceil(len(routers) / 24))
    axis.set_yticks(rows, [str(routers[row].layer) for row in rows])
    axis.tick_params(labelsize=7, length=2)


def _panels(count: int, columns: int, rows: int, wide: int, legend: float = 0.0) -> tuple[Any, list[Any], float]:
    """A figure with `count` maps of (rows, wide) cells, its axes, and the smaller side of a cell in inches."""
    cell_width, cell_height = min(max(6.0 / wide, 0.05), 0.45), min(max(7.5 / rows, 0.05), 0.45)
    lines = math.ceil(count / columns)
    width = columns * (max(wide * cell_width, 1.8) + 0.7) + 1.0
    height = lines * (max(rows * cell_height, 0.6) + 0.75) + 0.4
    figure, axes = _subplots(lines, columns, width, height + legend)
    figure.get_layout_engine().set(rect=(0, legend / (height + legend), 1, height / (height + legend)))
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes, min(cell_width, cell_height)


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and its axes row by row; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten().tolist()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()
