"""The page and the pictures of `ra3 report`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import write_whole
from ..markdown import cell
from .charts import Chart, draw, training_charts
from .page import render
from .runs import MIDTRAINING, RLVR, AnnotatedCorpus, Run, TrainingRun
from .show import Runs, highlight


_ABOUT = {
    MIDTRAINING: "Means over an update's batch; gains and rewards in nats, as the E-phase sees them.",
    RLVR: "Means over an update's completions.",
}


@dataclass(frozen=True)
class Line:
    """A line of an annotated program; `gain` in nats, of a latent whose gain was measured."""

    number: int
    runs: Runs
    latent: bool = False
    gain: float | None = None


@dataclass(frozen=True)
class Program:
    """An annotated program."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Section:
    """A part of the page: words, pictures, a table, annotated programs.

    A row of the table is a name and, for each of `columns`, a value and its interval.
    """

    title: str
    about: str = ""
    charts: Sequence[Chart] = ()
    columns: Sequence[str] = ()
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    programs: Sequence[Program] = ()

    def markdown(self) -> str:
        """The table with its title, in Markdown."""
        lines = [f"## {cell(self.title)}", "", cell(self.about, 2000), ""]
        lines += [f"| | {' | '.join(map(cell, self.columns))} |", f"|---|{'---|' * len(self.columns)}"]
        rows = ((name, [" ".join(filter(None, texts)) for texts in cells]) for name, cells in self.rows)
        return "\n".join([*lines, *(f"| {name} | {' | '.join(texts)} |" for name, texts in rows)]) + "\n"


def make_sections(runs: Sequence[Run], programs: int = 6) -> list[Section]:
    """Makes the parts of a report: runs of one kind stand together; of each corpus `programs` programs are shown."""
    sections = []
    for kind, about in _ABOUT.items():
        if of_kind := [run for run in runs if isinstance(run, TrainingRun) and run.kind == kind]:
            sections.append(Section(kind[0].upper() + kind[1:], about, training_charts(of_kind)))
    return sections + [_corpus_section(run, programs) for run in runs if isinstance(run, AnnotatedCorpus)]


def _corpus_section(corpus: AnnotatedCorpus, most: int) -> Section:
    """How much a corpus holds, and its first programs with latents."""
    programs: list[Program] = []
    gains: list[float] = []
    latents = 0
    for i, row in enumerate(corpus, 1):
        latents += len(row["latents"])
        gains += [latent["gain"] for latent in row["latents"] if latent["gain"] is not None]
        if row["latents"] and len(programs) < most:
            programs.append(_program(f"Program {i}", row))
    about = f"{len(corpus.rows):,} programs with {latents:,} latents"
    if gains:
        mean, helpful = fmean(gains), fmean(gain > 0 for gain in gains)
        about += f"; where gains were measured, {mean:+.2f} nats a latent, above 0 for {helpful:.0%}"
    return Section(f"Annotated: {corpus.label}", about.replace("-", "\u2212") + ".", programs=programs)


def _program(title: str, row: Mapping[str, Any]) -> Program:
    gains = {latent["line"]: latent["gain"] for latent in row["latents"]}
    lines = enumerate(highlight("program.py", row["annotated_text"]), 1)
    return Program(title, [Line(n, runs, n in gains, gains.get(n)) for n, runs in lines])


def write_report(sections: Sequence[Section], folder: Path, title: str) -> list[Path]:
    """Writes the page, a picture of each chart and one of all, and tables in Markdown, into `folder`.

    Each file is whole or what it was before.

    Raises:
        `ValueError`: without matplotlib.
    """
    charts = [chart for section in sections for chart in section.charts]
    try:
        pictures = {chart.name: draw([chart], size=(6.4, 4.0)) for chart in charts}
        overview = {"overview.png": draw(charts)} if charts else {}
    except ImportError as error:
        raise ValueError('pictures need matplotlib: pip install "ra3-trl[plots]".') from error
    encoded = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    files = {"report.html": render("report.html.jinja", title=title, sections=sections, pictures=encoded).encode()}
    if tables := [section.markdown() for section in sections if section.rows]:
        files["tables.md"] = "\n".join(tables).encode()
    files |= {f"{name}.png": picture for name, picture in pictures.items()} | overview
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]
