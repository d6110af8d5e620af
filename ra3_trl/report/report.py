"""The page and the pictures of `ra3 report`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import write_whole
from ..markdown import cell
from .charts import Chart, choose_styles, draw, held_out_measures, training_charts
from .page import render
from .runs import MIDTRAINING, RLVR, AnnotatedCorpus, Run, TrainingRun
from .show import Runs, highlight
from .summary import changes_of, run_names, setting_rows, summary_rows


_AROUND = 4  # lines that are shown before and after a latent
_ABOUT = {
    MIDTRAINING: "Means over an update's batch; gains and rewards in nats, as the E-phase sees them.",
    RLVR: "Means over an update's completions.",
}


@dataclass(frozen=True)
class Line:
    """A line of an annotated program; `gain` in nats, of a latent whose gain was measured. With `skipped` it stands
    for so many lines that are left out."""

    number: int
    runs: Runs
    latent: bool = False
    gain: float | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Program:
    """An annotated program."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Section:
    """A part of the page: words, pictures, a table, annotated programs.

    A row of the table is a name and, for each of `columns`, a value and its interval, or what it is; a `folded` table
    is opened by a click.
    """

    title: str
    about: str = ""
    charts: Sequence[Chart] = ()
    columns: Sequence[str] = ()
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    programs: Sequence[Program] = ()
    folded: bool = False

    def markdown(self) -> str:
        """The table with its title, in Markdown."""
        lines = [f"## {cell(self.title)}", "", cell(self.about, 2000), ""]
        lines += [f"| | {' | '.join(map(cell, self.columns))} |", f"|---|{'---|' * len(self.columns)}"]
        rows = ((name, [_plain(" ".join(filter(None, texts))) for texts in cells]) for name, cells in self.rows)
        return "\n".join([*lines, *(f"| {cell(name)} | {' | '.join(texts)} |" for name, texts in rows)]) + "\n"


def _plain(text: str) -> str:
    """A value in a table, whose brackets stay as they are."""
    return " ".join(text.split()).replace("|", "&#124;")


def make_sections(runs: Sequence[Run], programs: int = 6) -> list[Section]:
    """Makes the parts of a report: runs of one kind stand together, with a summary before their charts; of each corpus
    `programs` programs are shown."""
    sections = []
    for kind, about in _ABOUT.items():
        if of_kind := [run for run in runs if isinstance(run, TrainingRun) and run.kind == kind]:
            name, names = kind[0].upper() + kind[1:], run_names(of_kind)
            sections.append(Section(f"{name}: summary", _summary_note(of_kind), (), names, summary_rows(of_kind)))
            sections.append(Section(name, about, training_charts(of_kind)))
            if settings := setting_rows(of_kind):
                note = "As each run's folder has them; those that differ between the runs stand first."
                sections.append(Section(f"{name}: settings", note, (), names, settings, folded=True))
    return sections + [_corpus_section(run, programs) for run in runs if isinstance(run, AnnotatedCorpus)]


def _summary_note(runs: Sequence[TrainingRun]) -> str:
    """What the table's arrows are, and which runs lack an evaluation."""
    if runs[0].kind == RLVR:
        return "From the first update to the last: means over an update's completions."
    note = "Held-out numbers: base → now."
    silent = [name for name, run in zip(run_names(runs), runs, strict=True) if not held_out_measures([run])]
    if silent:
        note += f" Without an evaluation in the log: {', '.join(silent)} (hold out documents, and evaluate)."
    before = [
        name
        for name, run in zip(run_names(runs), runs, strict=True)
        if name not in silent and any(change.base is None for change in changes_of(run))
    ]
    return note + (f" The base was not evaluated: {', '.join(before)} (`eval_on_start`)." if before else "")


def _corpus_section(corpus: AnnotatedCorpus, most: int) -> Section:
    """How much a corpus holds, and its first programs with latents."""
    programs: list[Program] = []
    gains: list[float] = []
    latents = 0
    for i, row in enumerate(corpus, 1):
        latents += len(row["latents"])
        gains += [latent["gain"] for latent in row["latents"] if latent["gain"] is not None]
        if row["latents"] and len(programs) < most:
            place = f", line {row['line']}" if row.get("line") else ""
            programs.append(_program(f"{row['path']}{place}" if row.get("path") else f"Program {i}", row))
    about = f"{len(corpus.rows):,} programs with {latents:,} latents"
    if gains:
        mean, helpful = fmean(gains), fmean(gain > 0 for gain in gains)
        about += f"; where gains were measured, {mean:+.2f} nats a latent, above 0 for {helpful:.0%}"
    numbers = [(f"{len(corpus.rows):,}", ""), (f"{latents:,}", "")]
    numbers += [(f"{fmean(gains):+.2f}", ""), (f"{fmean(gain > 0 for gain in gains):.0%}", "")] if gains else []
    columns = ("programs", "latents", "mean gain (nats)", "gains above 0")[: len(numbers)]
    return Section(
        f"Annotated: {corpus.label}",
        about.replace("-", "\u2212") + ".",
        (),
        columns,
        [(corpus.label, numbers)],
        programs,
    )


def _program(title: str, row: Mapping[str, Any]) -> Program:
    gains = {latent["line"]: latent["gain"] for latent in row["latents"]}
    texts = highlight("program.py", row["annotated_text"])
    lines = [Line(n, runs, n in gains, gains.get(n)) for n, runs in enumerate(texts, 1)]
    return Program(title, fold(lines))


def fold(lines: Sequence[Line]) -> list[Line]:
    """Leaves out long stretches without a latent, such as docstrings: of more than `2 * _AROUND + 2` lines all but
    `_AROUND` on either side, for which one line says how many they were."""
    shown: list[Line] = []
    for latent, group in groupby(lines, key=lambda line: line.latent):
        stretch = list(group)
        if latent or len(stretch) <= 2 * _AROUND + 2:
            shown += stretch
            continue
        left_out = stretch[_AROUND:-_AROUND]
        shown += [*stretch[:_AROUND], Line(left_out[0].number, (), skipped=len(left_out)), *stretch[-_AROUND:]]
    return shown


def write_report(sections: Sequence[Section], folder: Path, title: str) -> list[Path]:
    """Writes the page, a picture of each chart and one of all, and tables in Markdown, into `folder`.

    Each file is whole or what it was before.

    Raises:
        `ValueError`: without matplotlib.
    """
    charts = [chart for section in sections for chart in section.charts]
    styles = choose_styles(charts)
    try:
        pictures = {chart.name: draw([chart], size=(6.4, 4.0), styles=styles) for chart in charts}
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
