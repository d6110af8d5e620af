"""Draws tables of `python -m benchmarks replication --json`, with --experiment or --domain or without, as a page.

A page may also hold what `ra3 report` reads: training runs and annotated corpora.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ra3_trl.analysis import Estimate
from ra3_trl.report.charts import ARMS, Chart, curve_over, number, seeds_note, side_by_side, stem
from ra3_trl.report.report import Section, make_sections, write_report
from ra3_trl.report.runs import Run, read_run, read_runs

from .replication.records import SHARES


_KEYS = {"bases", "runs", "seeds", "accuracy"}  # of any table; one also has `form`, or `experiment`
_CURVES = (
    ("estep/gate_weighted_gain", "E-phase: gain where it thinks", "nats"),
    ("estep/think_rate", "E-phase: P(think)", ""),
)
# Of the replication: arms side by side at each measure.
_MEASURES_OF_ARMS = (
    ("Thinks where it pays", "P(think), share", {
        "think_hard": "before\nhard lines", "think_easy": "before\neasy lines", "comment_right": "comments\nright",
    }),
    ("Held-out expert code", "nats a token, lower is better", {
        "ce": "cross-\nentropy", "elbo": "negative\nELBO", "bound_multi": "multi-sample\nbound",
    }),
    ("Hard lines right", "share", {
        "accuracy": "as it likes", "accuracy_forced": "comment\nforced", "accuracy_never": "comment\nbanned",
    }),
)  # fmt: skip
# Of an experiment: measures side by side at each arm.
_ARMS_OF_MEASURES = (
    ("Thinks, and is right", "share", {
        "think_hard": "P(think), hard lines", "think_easy": "P(think), easy lines", "comment_right": "comments right",
        "accuracy": "hard lines right",
    }),
    ("Held-out expert code", "nats a token, lower is better", {
        "ce": "cross-entropy", "elbo": "negative ELBO", "bound_multi": "multi-sample bound",
    }),
    ("Gain of a latent at the E-phase's end", "nats", {"gain": "gain"}),
)  # fmt: skip
# Of an experiment on a real checkpoint, `real_*` and `cold_start*`, in the same way.
_MEASURES_OF_CHECKPOINTS = (
    ("Assertions right", "share", {
        "right": "left to itself", "told_to_think": "told to think", "told_not_to": "told not to",
        "told_the_trace": "behind the true trace",
    }),
    ("Thinks where it pays", "P(think)", {
        "think_there": "before assertions", "think_elsewhere": "before other lines",
    }),
    ("Comments right", "share", {"comment_right": "greedy", "drawn_right": "drawn at temperature 1"}),
    ("What a comment brings to the assertion", "nats", {"gain": "its own", "gain_of_trace": "the true trace"}),
    ("Held-out expert code", "nats a token, lower is better", {
        "ce": "cross-entropy", "elbo": "negative ELBO", "bound": "multi-sample bound",
    }),
)  # fmt: skip
_ROWS = {
    "right": "assertions right",
    "told_to_think": "the same, told to think",
    "told_not_to": "the same, told not to",
    "told_the_trace": "the same, behind the true trace",
    "think_there": "P(think) before assertions",
    "think_elsewhere": "P(think) before other lines",
    "drawn_right": "comments right, drawn at temperature 1",
    "gain_of_trace": "nats that the true trace brings",
    "bound": "negative multi-sample bound, nats a token",
    "think_hard": "P(think) before hard lines",
    "think_easy": "P(think) before easy lines",
    "comment_right": "comments right",
    "ce": "cross-entropy, nats a token",
    "elbo": "negative ELBO",
    "bound_multi": "negative multi-sample bound",
    "gain": "nats that a latent brings",
    "accuracy": "hard lines right",
    "accuracy_forced": "the same, comment forced",
    "accuracy_never": "the same, comment banned",
    "transfer_accuracy": "assertions right, kinds not seen",
    "transfer_thinks": "goes on with a comment there",
    "transfer_comment_right": "comments right there",
    "mbpp_right": "MBPP's assertions right",
    "mbpp_gain": "nats of a comment before MBPP's assertions",
    "mbpp_gain_elsewhere": "nats of a comment before its other lines",
    "mbpp_best_pays": "MBPP's assertions with a comment that pays",
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
class ResultTable:
    """What `python -m benchmarks replication --json` wrote: estimates over seeds, by measure and arm."""

    label: str
    content: Mapping[str, Any]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(self.content["accuracy" if "accuracy" in self.content else "right"])

    def estimate(self, measure: str, arm: str) -> Estimate:
        estimate = Estimate(**self.content[measure][arm])
        if measure not in SHARES or estimate.low is None or estimate.high is None:
            return estimate
        return replace(estimate, low=max(estimate.low, 0.0), high=min(estimate.high, 1.0))  # of tables of before

    def learned(self, arm: str) -> bool:
        """Whether GRPO was run from an arm."""
        return all(run[arm]["curve"] for run in self.content["runs"])


def read_table(name: str, label: str) -> ResultTable | Run:
    """Reads a table by what it holds, and what is none as `ra3 report` does.

    Raises:
        `ValueError`: if it is not there, nothing that can be drawn, or damaged.
    """
    path = Path(name)
    if path.is_file():
        with suppress(json.JSONDecodeError, UnicodeDecodeError):  # rows of a corpus, or `read_run` says what is wrong
            content = json.loads(path.read_text("utf-8"))
            if isinstance(content, dict) and (set(content) >= _KEYS or "tables" in content):
                return ResultTable(label, content)
            if isinstance(content, dict) and set(content) >= {"experiment", "seeds"}:
                return ResultTable(label, of_checkpoints(content))
    return read_run(name, label)


def of_checkpoints(content: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment on a real checkpoint, which has its numbers by arm, in the form of the others, by measure."""
    arms = {name: arm["runs"] for name, arm in content.items() if isinstance(arm, dict) and "runs" in arm}
    table = {"experiment": content["experiment"], "seeds": content["seeds"], "bases": []}
    for _, unit, names in _MEASURES_OF_CHECKPOINTS:
        for key in (key for key in names if all(key in run for runs in arms.values() for run in runs)):
            share = unit in ("share", "P(think)")
            table[key] = {
                arm: asdict(Estimate.of(tuple(run[key] for run in runs), share)) for arm, runs in arms.items()
            }
    return table


def of_bases(tables: Sequence[ResultTable | Run]) -> list[ResultTable | Run]:
    """The tables one by one, where a file holds one for each base, as that of `--domain traces` does. A base that did
    not count has none."""
    found: list[ResultTable | Run] = []
    for table in tables:
        if isinstance(table, ResultTable) and "tables" in table.content:
            bases = table.content["tables"].items()
            found += [ResultTable(f"{table.label} {name}", one) for name, one in bases if set(one) >= _KEYS]
        else:
            found.append(table)
    return found


def table_charts(table: ResultTable) -> list[Chart]:
    """What is in a table. Of the replication also the curves of its E-phase and its RLVR."""
    content, arms = table.content, table.arms
    note = seeds_note(content["seeds"])

    def chart(title: str, unit: str, series: Sequence, ticks: Sequence[str] = ()) -> Chart:
        x_label = "" if ticks else "update"
        name, share = stem(f"{table.label} {title}"), unit.endswith("share")
        return Chart(name, title, x_label, unit, series, ticks, note, share=share)

    charts = []
    if "experiment" in content:
        for title, unit, names in _ARMS_OF_MEASURES if "accuracy" in content else _MEASURES_OF_CHECKPOINTS:
            there = {key: name for key, name in names.items() if key in content}
            ticks: Sequence[str] = arms
            rows = {name: [table.estimate(key, arm) for arm in arms] for key, name in there.items()}
            if set(arms) <= set(ARMS):  # each looks in all pictures as it does here
                ticks = tuple(there.values())
                rows = {arm: [table.estimate(key, arm) for key in there] for arm in arms}
            if there:
                charts.append(chart(title, unit, side_by_side(rows, 0.3), ticks))
        return charts
    for key, title, unit in _CURVES:
        logs = ([entry for entry in run["ra3"]["log"] if key in entry] for run in content["runs"] if "ra3" in run)
        points = [{step: entry[key] for step, entry in enumerate(log, 1)} for log in logs]
        if points and all(points):
            charts.append(chart(title, unit, [curve_over("ra3", points)]))
    for title, unit, names in _MEASURES_OF_ARMS:
        rows = {arm: [table.estimate(key, arm) for key in names] for arm in arms}
        charts.append(chart(title, unit, side_by_side(rows, 0.6), tuple(names.values())))
    learned = [arm for arm in arms if table.learned(arm)]
    curves = [
        curve_over(arm, [dict(enumerate(run[arm]["curve"])) for run in content["runs"]], True) for arm in learned
    ]
    return [*charts, *([chart("RLVR: tasks solved", "share", curves)] if curves else [])]


def table_section(table: ResultTable) -> Section:
    """A table with its charts, as a part of a page."""
    content, arms = table.content, list(table.arms)
    title = f"Experiment {content['experiment']}" if "experiment" in content else "Replication"
    title = f"Domain {content['domain']}" if "domain" in content else title
    bases = ", ".join(f"{base['comment_right']:.2f}" for base in content["bases"] if base["passed"])
    tried = f" Bases tried: {len(content['bases'])}; those in use have this share of their comments right: {bases}."
    about = (
        f"Seeds: {content['seeds']}.{tried if content['bases'] else ''} In brackets 95 % intervals over seeds "
        "(Student's t); what was never reached is counted."
    )
    rows = [(name, [_cell(table, key, arm) for arm in arms]) for key, name in _ROWS.items() if key in content]
    return Section(f"{title}: {table.label}", about, table_charts(table), arms, rows)


def _cell(table: ResultTable, key: str, arm: str) -> tuple[str, str]:
    """A mean and its interval; of what some runs of GRPO never reached, how many these are."""
    estimate, digits = table.estimate(key, arm), _DIGITS.get(key.rpartition("_to_")[0])
    digits = digits if digits is not None and table.learned(arm) else None
    band = None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)
    value, _, interval = number(estimate.mean, band, 3 if digits is None else digits).partition(" ")
    missed = 0 if digits is None else len(estimate.values) - estimate.n
    return value, " ".join(filter(None, (interval, f"({missed} never)" if missed else "")))


def named(section: Section, label: str) -> Section:
    """The section with its table's label before each chart's title."""
    return replace(section, charts=[replace(chart, title=f"{label}: {chart.title}") for chart in section.charts])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tables", nargs="+", metavar="TABLE", help="JSON file, or LABEL=FILE")
    parser.add_argument("--output_dir", default="report", help="folder of page and pictures (default: %(default)s)")
    parser.add_argument("--title", default="RA3 on a testbed", help="of the page (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the page and its pictures; returns where they are."""
    tables = of_bases(read_runs(args.tables, read_table))
    sections = [table_section(table) for table in tables if isinstance(table, ResultTable)]
    if len(sections) > 1:  # they stand together in the picture of all
        labels = (table.label for table in tables if isinstance(table, ResultTable))
        sections = [named(section, label) for section, label in zip(sections, labels, strict=True)]
    sections += make_sections([table for table in tables if not isinstance(table, ResultTable)])
    written = write_report(sections, Path(args.output_dir), args.title)
    return {"page": str(written[0]), "pictures": sum(path.suffix == ".png" for path in written)}
