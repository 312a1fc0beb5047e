"""A usage report as a directory: usage.json, usage.csv, pictures and a page that holds it all."""

import csv
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from modmoe.surgery.model_directory import check_place
from modmoe.surgery.usage import UsageReport
from modmoe.surgery.usage_page import render_page
from modmoe.surgery.usage_pictures import PICTURE_FILES, draw_pictures

REPORT_FILE = "usage.json"
TABLE_FILE = "usage.csv"
PAGE_FILE = "index.html"
_OURS = {REPORT_FILE, TABLE_FILE, PAGE_FILE, *PICTURE_FILES}


def check_output(directory: Path, *sources: Path) -> None:
    """
    Raises:
        ValueError: if the directory holds anything but an earlier report, lies below a file, or in one of `sources`.
    """
    check_place(directory, *sources)
    if directory.is_dir():
        try:
            UsageReport.load(directory / REPORT_FILE)
            foreign = [p.name for p in directory.iterdir() if p.name not in _OURS]
        except (ValueError, OSError):
            foreign = [p.name for p in directory.iterdir()]
        if foreign:
            raise ValueError(
                f"the output directory {directory} holds {min(foreign)}, which is not a usage report's: name a new one"
            )
    elif directory.exists():
        raise ValueError(f"the output directory {directory} is a file: name a new one")


def write_report(report: UsageReport, directory: Path) -> None:
    """
    Write all files. The directory appears complete or not at all, and replaces an earlier report.

    Raises:
        ValueError: see `check_output`.
    """
    check_output(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        written = Path(scratch) / "report"
        written.mkdir()
        report.save(written / REPORT_FILE)
        with (written / TABLE_FILE).open("w", newline="") as file:
            csv.writer(file).writerows(table(report))
        pictures = draw_pictures(report)
        for picture in pictures:
            (written / picture.name).write_bytes(picture.png)
        (written / PAGE_FILE).write_text(render_page(report, pictures))
        if directory.is_dir():
            directory.rename(Path(scratch) / "earlier")
        os.replace(written, directory)


def table(report: UsageReport) -> Iterator[list[str | int | float]]:
    """A header, then a row for each layer, side, expert and domain; the domain "*" is all of them together."""
    yield [
        "layer",
        "side",
        "expert",
        "domain",
        "tokens",
        "assignments",
        "load",
        "load_over_even",
        "mean_gate",
        "mean_gate_if_chosen",
        "mean_probability",
        "mean_output_norm",
        "reap",
        "dead",
        "share_of_expert",
        "domain_information",
        "specialisation",
    ]
    for router in report.routers:
        special = router.specialisation
        for number, domain in enumerate([*report.domains, None]):
            sums = router.on(domain)
            share = special.domain_shares[number] if domain is not None else special.domain_shares.sum(0)
            columns = (
                sums.assignments,
                sums.load,
                sums.load * router.num_experts,
                sums.mean_gate,
                sums.mean_gate_if_chosen,
                sums.mean_probability,
                sums.mean_output_norm,
                sums.reap,
                sums.dead(report.dead_below).int(),
                share,
                special.contributions,
                special.strengths,
            )
            for expert, figures in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
                yield [router.layer, router.side, expert, domain or "*", int(sums.tokens), *figures]
