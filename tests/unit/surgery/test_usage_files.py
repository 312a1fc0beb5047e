"""The directory of a report: table, pictures and the page."""

import csv
import html.parser
import json
import shutil

import pytest
import torch

pytest.importorskip("matplotlib")

from modmoe.surgery import RouterUsage, UsageReport
from modmoe.surgery.routing_sums import RoutingSums
from modmoe.surgery.usage_files import check_output, write_report
from modmoe.surgery.usage_pictures import domain_colours, draw_pictures

PNG = b"\x89PNG"


def make(domains=("python", "english"), experts=((4, 6), (4, 3)), top_k=2, n=50) -> UsageReport:
    """Layers with their numbers of attention and FFN experts; the last expert of each is never chosen."""
    generator = torch.Generator().manual_seed(0)
    routers = []
    for layer, counts in enumerate(experts):
        for side, count in zip(("attn", "ffn"), counts, strict=True):
            sums = {}
            for domain in domains:
                logits = torch.randn(n, count, generator=generator)
                logits[:, -1] = -30
                gates, index = logits.softmax(-1).topk(min(top_k, count - 1))
                sums[domain] = RoutingSums.of(logits, index, gates, torch.rand(gates.shape, generator=generator))
            routers.append(RouterUsage(layer, side, f"layers.{layer}.{side}", top_k, sums))
    return UsageReport(routers, model={"path": "runs/<best>", "fingerprint": {}}, arguments={"batch_size": 8})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "deeper" / "out"
    write_report(make(), directory)
    return directory


def test_all_files_are_there(written):
    assert {p.name for p in written.iterdir()} == {
        "usage.json",
        "usage.csv",
        "index.html",
        "load_attn.png",
        "load_ffn.png",
        "specialisation.png",
        "coactivation_attn.png",
        "coactivation_ffn.png",
    }
    assert all(p.read_bytes()[:4] == PNG for p in written.glob("*.png"))
    assert not list(written.parent.glob(".*")), "scratch files are left"
    assert UsageReport.load(written / "usage.json").domains == ["python", "english"]


def test_the_table_has_a_row_for_each_expert_and_domain(written):
    report = make()
    with (written / "usage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (4 + 6 + 4 + 3) * 3
    for row in rows:
        domain = None if row["domain"] == "*" else row["domain"]
        where = {"layer": int(row["layer"]), "side": row["side"]}
        expert = int(row["expert"])
        assert float(row["load"]) == float(report.scores("frequency", domain, **where)[expert])
        assert float(row["mean_gate"]) == float(report.scores("gate", domain, **where)[expert])
        assert float(row["reap"]) == float(report.scores("reap", domain, **where)[expert])
        assert row["dead"] == ("1" if float(row["load_over_even"]) < 0.01 else "0")
    last = [row for row in rows if row["side"] == "attn" and row["expert"] == "3"]
    assert {row["dead"] for row in last} == {"1"}


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(written):
    text = (written / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.counts["img"] == 5
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text
    assert "runs/&lt;best&gt;" in text
    assert page.counts["tr"] == 2 + 4 + (4 + 6 + 4 + 3)  # two headers, the routers, the experts


def test_one_domain_has_no_specialisation_and_one_slot_no_co_activation():
    names = {picture.name for picture in draw_pictures(make(("python",), top_k=1))}
    assert names == {"load_attn.png", "load_ffn.png"}


def test_many_domains_have_colours_of_their_own():
    names = [f"d{i}" for i in range(12)]
    assert len(set(domain_colours(names).values())) == 12
    assert domain_colours(names[:2]).keys() == {"d0", "d1"}


def test_an_earlier_report_is_replaced_and_nothing_else(written, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(written, out)
    write_report(make(("python",), top_k=1), out)
    assert not (out / "specialisation.png").exists()
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (out / "photo.png").touch()
    with pytest.raises(ValueError, match=r"out holds photo\.png, which is not a usage report's: name a new one"):
        check_output(out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "usage.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match=r"holds usage\.json, which is not"):
        write_report(make(), foreign)
    assert json.loads((foreign / "usage.json").read_text()) == {"format": "another"}
    with pytest.raises(ValueError, match=r"usage\.json is a file"):
        check_output(foreign / "usage.json")
