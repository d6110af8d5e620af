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
from .charts import Chart, draw_chart, draw_overview, experiment_charts, number, replication_charts, training_charts
from .page import render
from .runs import MIDTRAINING, RLVR, AnnotatedCorpus, Experiment, Replication, Run, TrainingRun
from .show import Runs, highlight


PAGE, TABLES, OVERVIEW = "report.html", "tables.md", "overview.png"
_ABOUT = {
    MIDTRAINING: "Means over an update's batch; gains and rewards in nats, as the E-phase sees them.",
    RLVR: "Means over an update's completions.",
}
_MEASURES = {
    "think_hard": "P(think) before hard lines",
    "think_easy": "P(think) before easy lines",
    "comment_right": "comments right",
    "ce": "cross-entropy, nats a token",
    "elbo": "negative ELBO",
    "bound_multi": "negative multi-sample bound",
    "gain": "nats of a latent at the E-phase's end",
    "accuracy": "hard lines right",
    "accuracy_forced": "the same, comment forced",
    "accuracy_never": "the same, comment banned",
    "rlvr_steps_to_50": "GRPO updates to 50 %",
    "rlvr_steps_to_80": "GRPO updates to 80 %",
    "rlvr_steps_to_90": "GRPO updates to 90 %",
    "rlvr_samples_to_50": "samples to 50 %, the mid-training's own among them",
    "rlvr_samples_to_80": "the same to 80 %",
    "rlvr_samples_to_90": "the same to 90 %",
    "rlvr_last": "last level of GRPO",
}


_DIGITS = {"rlvr_steps": 1, "rlvr_samples": 0}  # of what may never be reached


@dataclass(frozen=True)
class Line:
    """A line of an annotated program; `gain` in nats, of a latent whose gain was measured."""

    number: int
    runs: Runs
    latent: bool = False
    gain: float | None = None

    @property
    def sign(self) -> str:
        return "" if self.gain is None else "up" if self.gain > 0 else "down"


@dataclass(frozen=True)
class Program:
    """An annotated program."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title, about (`str`):
            In words.
        charts (`Sequence[Chart]`):
            Pictures.
        table (`tuple`, *optional*):
            Names of the columns; and rows, each a name and cells of `(value, interval)`.
        programs (`Sequence[Program]`):
            Annotated programs.
    """

    title: str
    about: str = ""
    charts: Sequence[Chart] = ()
    table: tuple[Sequence[str], Sequence[tuple[str, Sequence[tuple[str, str]]]]] | None = None
    programs: Sequence[Program] = ()


def make_sections(runs: Sequence[Run], programs: int = 6) -> list[Section]:
    """What a report says of some runs: those of one kind stand together, and of one label are one curve.

    Args:
        runs (`Sequence[Run]`):
            What [`read_run`] read.
        programs (`int`, *optional*, defaults to `6`):
            Programs shown of each annotated corpus.
    """
    sections = []
    for kind in (MIDTRAINING, RLVR):
        of_kind = [run for run in runs if isinstance(run, TrainingRun) and run.kind == kind]
        if of_kind:
            sections.append(Section(kind[0].upper() + kind[1:], _ABOUT[kind], training_charts(of_kind)))
    for run in runs:
        if isinstance(run, Replication):
            sections.append(_table(run, f"Replication: {run.label}", replication_charts(run)))
        elif isinstance(run, Experiment):
            sections.append(_table(run, f"Experiment {run.table['experiment']}: {run.label}", experiment_charts(run)))
    return sections + [_corpus(run, programs) for run in runs if isinstance(run, AnnotatedCorpus)]


def _table(run: Replication | Experiment, title: str, charts: Sequence[Chart]) -> Section:
    table = run.table
    arms = list(table["accuracy"])
    bases = ", ".join(f"{base['comment_right']:.2f}" for base in table["bases"] if base["passed"])
    about = (
        f"Seeds: {table['seeds']}. Bases tried: {len(table['bases'])}; those in use have this share of their comments "
        f"right: {bases}. In brackets 95 % intervals over seeds (Student's t); what was never reached is counted."
    )
    rows = [
        (label, [_cell(table[key][arm], _DIGITS.get(key.rpartition("_to_")[0])) for arm in arms])
        for key, label in _MEASURES.items()
        if key in table
    ]
    return Section(title, about, charts, (arms, rows))


def _cell(found: Mapping[str, Any], digits: int | None) -> tuple[str, str]:
    """A mean and its interval; with `digits`, of what some runs never reached, how many these are."""
    band = None if found["low"] is None else (found["low"], found["high"])
    value, _, interval = number(found["mean"], band, 3 if digits is None else digits).partition(" ")
    missed = 0 if digits is None else len(found["values"]) - found["n"]
    return value, " ".join(filter(None, (interval, f"({missed} never)" if missed else "")))


def _corpus(run: AnnotatedCorpus, most: int) -> Section:
    """The first programs with latents."""
    chosen, placed, gains = [], 0, []
    for i, row in enumerate(run.rows):
        placed += len(row["latents"])
        gains += [latent["gain"] for latent in row["latents"] if latent["gain"] is not None]
        if row["latents"] and len(chosen) < most:
            chosen.append(_program(f"Program {i + 1}", row))
    about = f"{len(run.rows):,} programs with {placed:,} latents"
    if gains:
        mean, helpful = fmean(gains), fmean(gain > 0 for gain in gains)
        about += f"; where gains were measured, {mean:+.2f} nats a latent, above 0 for {helpful:.0%}"
    return Section(f"Annotated: {run.label}", about.replace("-", "\u2212") + ".", programs=chosen)


def _program(title: str, row: Mapping[str, Any]) -> Program:
    latents = {latent["line"]: latent["gain"] for latent in row["latents"]}
    rows = enumerate(highlight("program.py", row["annotated_text"]), 1)
    return Program(title, [Line(n, runs, n in latents, latents.get(n)) for n, runs in rows])


def table_markdown(section: Section) -> str:
    """A section's table with its title, in Markdown."""
    names, rows = section.table
    lines = [f"## {cell(section.title)}", "", cell(section.about, 2000), ""]
    lines += [f"| | {' | '.join(map(cell, names))} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {label} | {' | '.join(' '.join(filter(None, one)) for one in cells)} |" for label, cells in rows]
    return "\n".join(lines) + "\n"


def write_report(sections: Sequence[Section], folder: Path, title: str) -> list[Path]:
    """Writes the page, its pictures and all of them in one, and its tables in Markdown; each file is whole or what it
    was before.

    Args:
        sections (`Sequence[Section]`):
            What to say.
        folder (`Path`):
            Where; made if it is not there.
        title (`str`):
            The page's title.

    Raises:
        `ValueError`: without matplotlib.
    """
    charts = [chart for section in sections for chart in section.charts]
    try:
        pictures = {f"{chart.name}.png": draw_chart(chart) for chart in charts}
        overview = {OVERVIEW: draw_overview(charts)} if charts else {}
    except ImportError as error:
        raise ValueError('pictures need matplotlib: pip install "ra3-trl[plots]".') from error
    shown = [
        {
            "title": section.title,
            "about": section.about,
            "table": section.table,
            "programs": section.programs,
            "charts": [(c, base64.b64encode(pictures[f"{c.name}.png"]).decode()) for c in section.charts],
        }
        for section in sections
    ]
    page = {PAGE: render("report.html.jinja", title=title, sections=shown).encode()}
    tables = "\n".join(table_markdown(section) for section in sections if section.table)
    page |= {TABLES: tables.encode()} if tables else {}
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, content in (page | pictures | overview).items():
        write_whole(folder / name, content)
        written.append(folder / name)
    return written
