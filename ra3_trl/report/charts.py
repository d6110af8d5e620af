"""All pictures of runs: which numbers are drawn against what, with bands over seeds, and how they look."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..analysis import Estimate
from .runs import MIDTRAINING, RLVR, TrainingRun


# What arms are usually called: each has its color and marker in every picture. The colors are Okabe and Ito's, which
# the colour-blind can tell apart.
ARMS = ("base", "ntp", "ntp_forced", "ra3", "resample", "ntp_tokens", "ntp_compute")
_COLORS = ("#666666", "#d55e00", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vP*X"
_INK, _MUTED, _FAINT = "#222222", "#666666", "#bbbbbb"
_LONG_TICKS = 48  # characters of all ticks that still stand beside one another
_HIGHER, _LOWER = "higher is better", "lower is better"


@dataclass(frozen=True)
class Measure:
    """A number of the log: its key, what it is called, its unit, which way is better, and whether it is a share."""

    key: str
    title: str
    unit: str
    better: str = ""
    share: bool = False

    @property
    def y_label(self) -> str:
        return ", ".join(filter(None, (self.unit, self.better)))


_HELD_OUT = (
    Measure("ce", "Held-out cross-entropy", "nats a code token", _LOWER),
    Measure("elbo", "Held-out negative ELBO", "nats a code token", _LOWER),
    Measure("bound_multi", "Held-out negative multi-sample bound", "nats a code token", _LOWER),
)
_TRAINING = {  # of each kind of run: what is logged
    MIDTRAINING: (
        Measure("estep/reward", "E-phase: reward", "nats", _HIGHER),
        Measure("estep/gain", "E-phase: gain of a latent", "nats", _HIGHER),
        Measure("estep/gate_weighted_gain", "E-phase: gain where it thinks", "nats", _HIGHER),
        Measure("estep/gain_over_other", "E-phase: gain over another document's", "nats", _HIGHER),
        Measure("estep/think_rate", "E-phase: P(think)", "mean probability", share=True),
        Measure("mstep/annotated_rate", "M-phase: boundaries with a latent", "share", share=True),
        Measure("mstep/code_loss", "M-phase: loss of code tokens", "nats a token", _LOWER),
    ),
    RLVR: (
        Measure("reward", "RLVR: reward", "", _HIGHER),
        Measure("pass_rate", "RLVR: share that passes", "share", _HIGHER, share=True),
        Measure("think_rate", "RLVR: latents for each line of code", "latents a line"),
        Measure("latent_length", "RLVR: length of a latent", "tokens"),
    ),
}
Styles = Mapping[str, tuple[str, str]]  # color and marker of each label
_DEMO = ("estep/gain", "estep/gain_over_other", "estep/think_rate", "mstep/code_loss")


@dataclass(frozen=True)
class Series:
    """A curve, or points side by side; `band` has lowest and highest of the 95 % interval at each, if there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    band: Sequence[tuple[float, float] | None]

    @classmethod
    def of(cls, label: str, x: Sequence[float], estimates: Sequence[Estimate]) -> Series:
        """Means with their intervals at the places `x`."""
        bands = [None if e.low is None or e.high is None else (e.low, e.high) for e in estimates]
        return cls(label, x, [e.mean for e in estimates], bands)


@dataclass(frozen=True)
class Chart:
    """A picture: its file's stem, what is shown, and the series.

    Args:
        ticks (`Sequence[str]`):
            Names of the places 0, 1, ... on the x axis, where points are drawn; `()` for curves.
        note (`str`):
            What bands and bars are, and which runs are not in it.
        values (`bool`):
            Whether each point has its number beside it.
        share (`bool`):
            Whether they are shares: the axis of points goes from 0 to 1, that of curves not beyond.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    ticks: Sequence[str] = ()
    note: str = ""
    values: bool = False
    share: bool = False

    def places(self) -> list[str]:
        """What the columns of a table of its numbers are."""
        return [tick.replace("-\n", "").replace("\n", " ") for tick in self.ticks] or ["first", "middle", "last"]

    def cells(self, series: Series) -> list[str]:
        """A row of that table."""
        last = len(series.x) - 1
        return [number(series.y[i], series.band[i]) for i in (range(last + 1) if self.ticks else (0, last // 2, last))]


def number(value: float | None, band: tuple[float, float] | None, digits: int = 3) -> str:
    """`0.123 [0.100, 0.146]`, and a dash for what was not measured."""
    if value is None:
        return "\u2013"
    interval = f" [{band[0]:.{digits}f}, {band[1]:.{digits}f}]" if band else ""
    return f"{value:.{digits}f}{interval}".replace("-", "\u2212")


def stem(text: str) -> str:
    """A file's name from words: `"E-phase: reward"` becomes `"e_phase_reward"`."""
    return re.sub(r"\W+", "_", text.lower()).strip("_")


def seeds_note(seeds: int) -> str:
    """What the bands of so many seeds are; nothing for one."""
    return "" if seeds < 2 else f"Means and 95 % intervals (Student's t) over {seeds} seeds."


def curve_over(label: str, runs: Sequence[Mapping[int, float]], share: bool = False) -> Series:
    """The mean of runs (the value by update of each) at the updates that all of them logged."""
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    return Series.of(label, steps, [Estimate.of([run[step] for run in runs], share) for step in steps])


def side_by_side(rows: Mapping[str, Sequence[Estimate]], width: float) -> list[Series]:
    """Points of each label at the places 0, 1, ..., spread over `width` of a place's room."""
    gap = width / max(len(rows) - 1, 1)
    return [
        Series.of(label, [place - width / 2 + gap * i for place in range(len(estimates))], estimates)
        for i, (label, estimates) in enumerate(rows.items())
    ]


def training_charts(runs: Sequence[TrainingRun], keys: Collection[str] | None = None) -> list[Chart]:
    """Charts of training runs of one kind, of all that is logged or of `keys`; those of one label are one curve. A
    chart says which labels have nothing of it in their log."""
    labels = list(dict.fromkeys(run.label for run in runs))
    charts = []
    for measure in (*_TRAINING[runs[0].kind], *held_out_measures(runs)):
        if keys is not None and measure.key not in keys:
            continue
        points = {label: [run.points(measure.key) for run in runs if run.label == label] for label in labels}
        curves = [curve_over(label, of_label, measure.share) for label, of_label in points.items() if all(of_label)]
        if curves := [curve for curve in curves if curve.x]:
            missing = [label for label in labels if label not in {curve.label for curve in curves}]
            note = " ".join(
                filter(None, (seeds_note(max(map(len, points.values()))), _missing_note(measure, missing)))
            )
            name, title = stem(measure.title), measure.title
            charts.append(Chart(name, title, "update", measure.y_label, curves, note=note, share=measure.share))
    return charts


def held_out_measures(runs: Sequence[TrainingRun]) -> list[Measure]:
    """What runs logged about held-out code; of each set of a dict of evaluation sets apart."""
    keys = dict.fromkeys(key for run in runs for entry in run.log for key in entry)
    names = [key.removeprefix("eval_").removesuffix("ce") for key in keys if re.fullmatch(r"eval_(.+_)?ce", key)]
    return [
        replace(of, key=f"eval_{name}{of.key}", title=of.title + (f": {name[:-1]}" if name else ""))
        for name in names
        for of in _HELD_OUT
    ]


def _missing_note(measure: Measure, missing: Sequence[str]) -> str:
    """Says whose log has nothing of it, and why."""
    if not missing:
        return ""
    lacking = {"eval": "no held-out evaluation", "estep": "no E-phase", "mstep": "no M-phase"}
    what = lacking.get(re.split("[_/]", measure.key)[0], f"no {measure.key}")
    return f"Not shown: {', '.join(missing)} ({what} in the log)."


def plot_run(logs: Mapping[str, list[dict]], held_out: Mapping[str, Mapping[str, float]], path: str | Path) -> None:
    """Draws phases of mid-training runs (their `log_history`, by name) and held-out numbers of models as a PNG.

    `held_out` has nats per code token: measure -> model -> value. Needs matplotlib (`pip install "ra3-trl[plots]"`).
    """
    charts = training_charts([TrainingRun(name, MIDTRAINING, log) for name, log in logs.items()], _DEMO)
    models = next(iter(held_out.values()))
    points = {model: [Estimate.of([of_measure[model]]) for of_measure in held_out.values()] for model in models}
    title, unit = "Held-out expert code", "nats a code token, lower is better"
    charts.append(Chart(stem(title), title, "", unit, side_by_side(points, 0.5), tuple(held_out), values=True))
    Path(path).write_bytes(draw(charts, columns=len(charts)))


def draw(
    charts: Sequence[Chart],
    columns: int = 3,
    size: tuple[float, float] = (4.6, 3.1),
    styles: Styles | None = None,
    names: Mapping[str, str] | None = None,
) -> bytes:
    """Draws charts of `size` inches in one PNG with one legend, at most `columns` a row. Needs matplotlib (`pip
    install "ra3-trl[plots]"`).

    Charts that stand on one page apart are drawn with the `styles` of all ([`choose_styles`]), so that a run looks the
    same in each. In the legend labels are called by their `names`.
    """
    import matplotlib  # an optional dependency, and slow to load

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, len(charts))
    rows = math.ceil(len(charts) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False
    )
    styles = {label: style for label, style in (styles or choose_styles(charts)).items() if label in _labels(charts)}
    for axis, chart in zip(axes.flat, charts, strict=False):
        _draw_chart(axis, chart, styles)
    for axis in axes.flat[len(charts) :]:
        axis.set_axis_off()
    handles = [plt.Line2D([], [], color=color, marker=marker, markersize=4) for color, marker in styles.values()]
    called = [(names or {}).get(label, label) for label in styles]
    legend = figure.legend(handles, called, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)  # labels are names of runs, which may hold dollars
    png = io.BytesIO()
    figure.savefig(png, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)
    return png.getvalue()


def _labels(charts: Sequence[Chart]) -> dict[str, None]:
    return dict.fromkeys(series.label for chart in charts for series in chart.series)


def choose_styles(charts: Sequence[Chart]) -> Styles:
    """Chooses color and marker of each label, the same in all charts; other labels than `ARMS` take what these
    leave."""
    labels = _labels(charts)
    free = (i for i in range(len(labels) + len(ARMS)) if i >= len(ARMS) or ARMS[i] not in labels)
    places = {label: ARMS.index(label) if label in ARMS else next(free) for label in labels}
    in_order = sorted(places.items(), key=lambda item: item[1])
    return {label: (_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]) for label, i in in_order}


def _draw_chart(axis: Any, chart: Chart, styles: Mapping[str, tuple[str, str]]) -> None:
    for series in chart.series:
        color, marker = styles[series.label]
        if chart.ticks:
            _draw_points(axis, series, color, marker, chart)
        else:
            _draw_curve(axis, series, color)
    if chart.ticks:
        turned = {"rotation": 35, "ha": "right"} if sum(map(len, chart.ticks)) > _LONG_TICKS else {}
        axis.set_xticks(range(len(chart.ticks)), chart.ticks, **turned)
        for place in range(1, len(chart.ticks)):
            axis.axvline(place - 0.5, color=_FAINT, linewidth=0.6)
        if chart.share:
            axis.set_ylim(-0.03, 1.09 if chart.values else 1.03)  # room for points at the ends, and for their numbers
            axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    else:
        axis.locator_params(axis="x", integer=True, nbins=6)  # there is no update 1.2
        axis.ticklabel_format(axis="y", useOffset=False)  # nor do ticks want a sum to be read
        if chart.share:
            _within_0_and_1(axis, chart)
        if any(y is not None and y < 0 for series in chart.series for y in series.y):  # where a gain turns is asked
            axis.axhline(0, color=_FAINT, linewidth=0.8, zorder=0)
    axis.set_title(chart.title, fontsize=10.5, color=_INK)
    axis.set_xlabel(chart.x_label, fontsize=9, color=_MUTED)
    axis.set_ylabel(chart.y_label, fontsize=9, color=_MUTED)
    axis.tick_params(labelsize=8.5, length=2.5, color=_FAINT, labelcolor=_MUTED)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color(_FAINT)


def _within_0_and_1(axis: Any, chart: Chart) -> None:
    """Cuts what matplotlib leaves around curves of shares; where they do not move, it shows all of a share's range."""
    values = {y for series in chart.series for y in series.y if y is not None}
    low, high = axis.get_ylim()
    room = 0.03 * (high - low)  # for a line at an end
    axis.set_ylim(*((max(low, -room), min(high, 1 + room)) if len(values) > 1 else (-0.03, 1.03)))


def _draw_points(axis: Any, series: Series, color: str, marker: str, chart: Chart) -> None:
    for x, y, band in zip(series.x, series.y, series.band, strict=True):
        if band is not None:
            axis.plot((x, x), band, color=color, linewidth=1.6, solid_capstyle="butt")
        if y is not None:
            axis.plot(x, y, marker, color=color, markersize=5)
            if chart.values:
                said = number(y, None, digits=2 if chart.share else 3)
                axis.annotate(
                    said,
                    (x, y if band is None else band[1]),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
    if chart.values:
        axis.margins(x=0.25, y=0.2)  # room for the numbers


def _draw_curve(axis: Any, series: Series, color: str) -> None:
    few = {"marker": "o", "markersize": 3} if len(series.x) < 30 else {}
    axis.plot(series.x, series.y, color=color, linewidth=1.6, **few)
    if any(series.band):
        low, high = zip(*(band or (y, y) for band, y in zip(series.band, series.y, strict=True)), strict=True)
        axis.fill_between(series.x, low, high, color=color, alpha=0.15, linewidth=0)
