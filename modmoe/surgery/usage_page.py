"""A usage report as one HTML page: pictures and sortable tables, nothing loaded from elsewhere."""

import base64
import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from modmoe.surgery.usage import RouterUsage, UsageReport
from modmoe.surgery.usage_pictures import SIDE_TITLES, Picture, domain_colours

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; margin-bottom: .2em; } h2 { font-size: 1.15em; margin-top: 2em; }
p.note { color: #555; max-width: 60em; } img { max-width: 100%; height: auto; }
.scroll { overflow: auto; max-height: 34em; border: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { position: sticky; top: 0; background: #f4f4f4; cursor: pointer; user-select: none; }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
tr:hover td { background: #f8f8f0; } .chip { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""

_SCRIPT = """
for (const th of document.querySelectorAll("th")) th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], column = th.cellIndex;
  const up = th.getAttribute("aria-sort") === "descending";
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].textContent;
  const order = (a, b) => {
    const difference = parseFloat(value(a)) - parseFloat(value(b));
    return Number.isNaN(difference) ? value(a).localeCompare(value(b)) : difference;
  };
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
});
"""


class _Column(NamedTuple):
    title: str
    meaning: str


_ROUTER_COLUMNS = (
    _Column("layer", "number of the block"),
    _Column("side", "attention or FFN"),
    _Column("experts", "number of experts"),
    _Column("top-k", "experts per token"),
    _Column("max violation", "largest load / even load - 1; 0 is even"),
    _Column("dead", "experts with next to no load on all domains together"),
    _Column("H(m|x)", "entropy of the router on one token, nats, mean over tokens; 0 is always sure"),
    _Column("H(m)", "entropy of the mean over tokens, nats; log(experts) is even"),
    _Column("I(m;x)", "mutual information of token and expert, nats: H(m) - H(m|x)"),
    _Column("I(m;domain)", "mutual information of domain and chosen expert, nats, domains counted equally"),
    _Column("of largest", "the same as a share of log(number of domains)"),
)


def render_page(report: UsageReport, pictures: Sequence[Picture]) -> str:
    """The whole page."""
    source = "a model in memory" if report.model is None else str(report.model["path"])
    tokens = ", ".join(f"{html.escape(name)}: {count:,}" for name, count in report.tokens.items())
    figures = "".join(_figure(picture) for picture in pictures)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Expert usage</title><style>{_STYLE}</style></head><body>
<h1>Expert usage of {html.escape(source)}</h1>
<p class="note">Tokens measured &ndash; {tokens}. {html.escape(_arguments(report))}</p>
{figures}
<h2>Routers</h2>
<p class="note">On all domains together. Click a heading to sort, point at it for its meaning.</p>
{_table(_ROUTER_COLUMNS, [_router_row(router, report) for router in report.routers])}
<h2>Experts</h2>
{_table(_expert_columns(report), [row for router in report.routers for row in _expert_rows(router, report)])}
<script>{_SCRIPT}</script></body></html>
"""


def _arguments(report: UsageReport) -> str:
    return "; ".join(f"{name}: {value}" for name, value in (report.arguments or {}).items())


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    title = html.escape(picture.title)
    return (
        f'<h2>{title}</h2><p class="note">{html.escape(picture.caption)}</p>'
        f'<img alt="{title}" src="data:image/png;base64,{data}">\n'
    )


def _table(columns: Sequence[_Column], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f'<th title="{html.escape(c.meaning)}">{html.escape(c.title)}</th>' for c in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _router_row(router: RouterUsage, report: UsageReport) -> list[str]:
    sums, information = router.on(), router.specialisation.mutual_information
    most = math.log(len(report.domains))
    return [
        str(router.layer),
        SIDE_TITLES[router.side],
        str(router.num_experts),
        str(router.top_k),
        f"{sums.max_violation:.2f}",
        str(int(sums.dead(report.dead_below).sum())),
        f"{sums.token_entropy:.3f}",
        f"{sums.mean_entropy:.3f}",
        f"{sums.mutual_information:.3f}",
        f"{information:.4f}",
        f"{information / most:.1%}" if most else "",
    ]


def _expert_columns(report: UsageReport) -> list[_Column]:
    loads = [_Column(f"load, {name}", f"load / even load on {name}; 1 is even") for name in report.domains]
    return [
        _Column("layer", "number of the block"),
        _Column("side", "attention or FFN"),
        _Column("expert", "number of the expert"),
        _Column("load", "load / even load on all domains together; 1 is even"),
        *loads,
        _Column("mean gate", "over the tokens that chose the expert"),
        _Column("output norm", "norm of the expert's output before the gate, mean over the same tokens"),
        _Column("REAP", "gate * norm of the output, mean over the same tokens"),
        _Column("domain", "the one that the expert serves most"),
        _Column("specialisation", "0 serves all domains alike, 1 a single one"),
        _Column("dead", "next to no load on all domains together"),
    ]


def _expert_rows(router: RouterUsage, report: UsageReport) -> list[list[str]]:
    sums, special, count = router.on(), router.specialisation, router.num_experts
    dead, colours = sums.dead(report.dead_below), domain_colours(report.domains)
    rows = []
    for expert in range(count):
        home = report.domains[int(special.homes[expert])]
        chip = f'<span class="chip" style="background:{colours[home]}"></span>{html.escape(home)}'
        rows.append(
            [
                str(router.layer),
                SIDE_TITLES[router.side],
                str(expert),
                f"{sums.load[expert] * count:.3f}",
                *(f"{router.on(name).load[expert] * count:.3f}" for name in report.domains),
                f"{sums.mean_gate_if_chosen[expert]:.4f}",
                f"{sums.mean_output_norm[expert]:.4g}",
                f"{sums.reap[expert]:.4g}",
                "" if dead[expert] else chip,
                f"{special.strengths[expert]:.4f}",
                "dead" if dead[expert] else "",
            ]
        )
    return rows
