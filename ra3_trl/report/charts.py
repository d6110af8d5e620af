"""Charts of runs: which numbers are drawn against what, with bands over seeds; and their pictures."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis import Estimate
from .runs import MIDTRAINING, RLVR, Experiment, Replication, TrainingRun


# Okabe and Ito's colors, which the colour-blind can tell apart.
_ARMS = ("base", "ntp", "ntp_forced", "ra3", "resample", "ntp_tokens", "ntp_compute")
_COLORS = ("#666666", "#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vP*X"
_INK, _MUTED, _FAINT = "#222222", "#666666", "#bbbbbb"
_COLUMNS, _PANEL = 3, (4.6, 3.1)  # of the overview, and inches of a chart
_TRAINING = {
    MIDTRAINING: (
        ("estep/reward", "E-phase: reward", "nats"),
        ("estep/gain", "E-phase: gain of a latent", "nats"),
        ("estep/gate_weighted_gain", "E-phase: gain where it thinks", "nats"),
        ("estep/think_rate", "E-phase: P(think)", ""),
        ("mstep/annotated_rate", "M-phase: boundaries with a latent", "share"),
        ("mstep/code_loss", "M-phase: loss of code tokens", "nats a token"),
        ("eval_ce", "Held-out cross-entropy", "nats a code token"),
        ("eval_elbo", "Held-out negative ELBO", "nats a code token"),
        ("eval_bound_multi", "Held-out negative multi-sample bound", "nats a code token"),
    ),
    RLVR: (
        ("reward", "RLVR: reward", ""),
        ("pass_rate", "RLVR: share that passes", ""),
        ("think_rate", "RLVR: latents for each line of code", ""),
        ("latent_length", "RLVR: length of a latent", "characters"),
    ),
}
_ROWS = (
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
_OF_EXPERIMENTS = (
    ("Thinks, and is right", "share", {
        "think_hard": "P(think), hard lines", "think_easy": "P(think), easy lines", "comment_right": "comments right",
        "accuracy": "hard lines right",
    }),
    ("Held-out expert code", "nats a token, lower is better", {
        "ce": "cross-entropy", "elbo": "negative ELBO", "bound_multi": "multi-sample bound",
    }),
    ("Gain of a latent at the E-phase's end", "nats", {"gain": "gain"}),
)  # fmt: skip
_LONG_TICKS = 48  # characters of all of them that stand beside one another


@dataclass(frozen=True)
class Series:
    """A curve, or points side by side; `band` has lowest and highest of the 95 % interval at each, if there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float] | None]


@dataclass(frozen=True)
class Chart:
    """A picture.

    Args:
        name (`str`):
            Stem of its file.
        title, x_label, y_label (`str`):
            What is shown.
        series (`Sequence[Series]`):
            What is drawn.
        ticks (`Sequence[str]`):
            Names of the places 0, 1, ... on the x axis, where points are drawn; `()` for curves.
        note (`str`):
            What bands and bars are.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    ticks: Sequence[str] = ()
    note: str = ""

    def places(self) -> list[str]:
        """What the columns of a table of its numbers are."""
        return [tick.replace("-\n", "").replace("\n", " ") for tick in self.ticks] or ["first", "middle", "last"]

    def cells(self, series: Series) -> list[str]:
        """A row of that table."""
        last = len(series.x) - 1
        return [
            number(series.y[i], series.band[i]) for i in (range(len(series.x)) if self.ticks else (0, last // 2, last))
        ]


def number(value: float | None, band: tuple[float, float] | None, digits: int = 3) -> str:
    """`0.123 [0.100, 0.146]`, and a dash for what was not measured."""
    if value is None:
        return "\u2013"
    interval = f" [{band[0]:.{digits}f}, {band[1]:.{digits}f}]" if band else ""
    return f"{value:.{digits}f}{interval}".replace("-", "\u2212")


def curve_over(label: str, runs: Sequence[Mapping[int, float]]) -> Series:
    """The mean of runs at the updates that all of them logged.

    Args:
        label (`str`):
            What the runs are called.
        runs (`Sequence[Mapping[int, float]]`):
            The value by update of each run.
    """
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    found = [Estimate.of([run[step] for run in runs]) for step in steps]
    return Series(label, steps, [one.mean for one in found], [_interval(one) for one in found])


def _interval(one: Estimate) -> tuple[float, float] | None:
    return None if one.low is None else (one.low, one.high)


def training_charts(runs: Sequence[TrainingRun]) -> list[Chart]:
    """Charts of training runs of one kind; those of the same label become one curve with a band."""
    labels = list(dict.fromkeys(run.label for run in runs))
    charts = []
    for key, title, unit in _TRAINING[runs[0].kind]:
        by_label = {label: [run.points(key) for run in runs if run.label == label] for label in labels}
        series = [curve_over(label, points) for label, points in by_label.items() if all(points)]
        if series := [one for one in series if one.x]:
            charts.append(Chart(_stem(title), title, "update", unit, series, note=_note(map(len, by_label.values()))))
    return charts


def _note(seeds: Iterable[int]) -> str:
    most = max(seeds)
    return "" if most < 2 else f"Means and 95 % intervals (Student's t) over {most} seeds."


def replication_charts(found: Replication) -> list[Chart]:
    """What is in the table of the replication, and curves of its E-phase and its RLVR."""
    table, runs = found.table, found.table["runs"]
    arms, note = list(table["accuracy"]), _note([table["seeds"]])
    charts = []

    def named(title: str) -> str:
        return _stem(f"{found.label} {title}")

    for key, title, unit in _TRAINING[MIDTRAINING][2:4]:  # gain where it thinks, and P(think)
        points = [dict(enumerate((one[key] for one in run["ra3"]["log"] if key in one), 1)) for run in runs]
        if all(points):
            charts.append(Chart(named(title), title, "update", unit, [curve_over("ra3", points)], note=note))
    for title, unit, measures in _ROWS:
        spread = 0.6 / max(len(arms) - 1, 1)
        series = []
        for i, arm in enumerate(arms):
            values = [table[measure][arm] for measure in measures]
            places = [place - 0.3 + spread * i for place in range(len(measures))]
            band = [None if value["low"] is None else (value["low"], value["high"]) for value in values]
            series.append(Series(arm, places, [value["mean"] for value in values], band))
        charts.append(Chart(named(title), title, "", unit, series, tuple(measures.values()), note))
    curves = [curve_over(arm, [dict(enumerate(run[arm]["curve"])) for run in runs]) for arm in arms]
    title = "RLVR: tasks solved"
    return [*charts, Chart(named(title), title, "update", "share", curves, note=note)]


def experiment_charts(found: Experiment) -> list[Chart]:
    """The measures of an experiment beside the table, over its arms, of which a sweep's are in their order."""
    table = found.table
    arms, note = tuple(table["accuracy"]), _note([table["seeds"]])
    charts = []
    for title, unit, measures in _OF_EXPERIMENTS:
        known = {key: label for key, label in measures.items() if key in table}
        spread = 0.3 / max(len(known) - 1, 1)
        series = []
        for i, (key, label) in enumerate(known.items()):
            values = [table[key][arm] for arm in arms]
            places = [place - 0.15 + spread * i for place in range(len(arms))]
            band = [None if value["low"] is None else (value["low"], value["high"]) for value in values]
            series.append(Series(label, places, [value["mean"] for value in values], band))
        if series:
            charts.append(Chart(_stem(f"{found.label} {title}"), title, "", unit, series, arms, note))
    return charts


def _stem(text: str) -> str:
    """A file's name from words: `"E-phase: reward"` becomes `"e_phase_reward"`."""
    return re.sub(r"\W+", "_", text.lower()).strip("_")


def draw_chart(chart: Chart) -> bytes:
    """A chart as PNG. Needs matplotlib (`pip install "ra3-trl[plots]"`)."""
    return _png([chart], 1, (6.4, 4.0))


def draw_overview(charts: Sequence[Chart]) -> bytes:
    """All charts in one PNG, three a row."""
    return _png(charts, min(_COLUMNS, len(charts)), _PANEL)


def _png(charts: Sequence[Chart], columns: int, size: tuple[float, float]) -> bytes:
    import matplotlib  # an optional dependency, and slow to load

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = math.ceil(len(charts) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False
    )
    styles = _styles(charts)
    for axis, chart in zip(axes.flat, charts, strict=False):
        _draw(axis, chart, styles)
    for axis in axes.flat[len(charts) :]:
        axis.set_axis_off()
    shown = [plt.Line2D([], [], color=color, marker=marker, markersize=4) for color, marker in styles.values()]
    legend = figure.legend(shown, list(styles), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    found = io.BytesIO()
    figure.savefig(found, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)
    return found.getvalue()


def _styles(charts: Sequence[Chart]) -> dict[str, tuple[str, str]]:
    """Color and marker of each label, the same in all charts; the replication's arms have theirs in any report."""
    labels = dict.fromkeys(one.label for chart in charts for one in chart.series)
    free = (i for i in range(len(labels) + len(_ARMS)) if i >= len(_ARMS) or _ARMS[i] not in labels)
    places = {label: _ARMS.index(label) if label in _ARMS else next(free) for label in labels}
    in_order = sorted(places.items(), key=lambda item: item[1])
    return {label: (_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]) for label, i in in_order}


def _draw(axis: Any, chart: Chart, styles: Mapping[str, tuple[str, str]]) -> None:
    for one in chart.series:
        color, marker = styles[one.label]
        if chart.ticks:
            for x, y, band in zip(one.x, one.y, one.band, strict=True):
                if band is not None:
                    axis.plot((x, x), band, color=color, linewidth=1.6, solid_capstyle="butt")
                if y is not None:
                    axis.plot(x, y, marker, color=color, markersize=5)
            continue
        few = {"marker": "o", "markersize": 3} if len(one.x) < 30 else {}
        axis.plot(one.x, one.y, color=color, linewidth=1.6, **few)
        if any(one.band):
            low, high = zip(*(band or (y, y) for band, y in zip(one.band, one.y, strict=True)), strict=True)
            axis.fill_between(one.x, low, high, color=color, alpha=0.15, linewidth=0)
    if chart.ticks:
        turned = {"rotation": 35, "ha": "right"} if sum(map(len, chart.ticks)) > _LONG_TICKS else {}
        axis.set_xticks(range(len(chart.ticks)), chart.ticks, **turned)
        for place in range(1, len(chart.ticks)):
            axis.axvline(place - 0.5, color=_FAINT, linewidth=0.6)
    axis.set_title(chart.title, fontsize=10.5, color=_INK)
    axis.set_xlabel(chart.x_label, fontsize=9, color=_MUTED)
    axis.set_ylabel(chart.y_label, fontsize=9, color=_MUTED)
    axis.tick_params(labelsize=8.5, length=2.5, color=_FAINT, labelcolor=_MUTED)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color(_FAINT)
