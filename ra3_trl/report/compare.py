"""The table and the picture of `ra3 compare`, from what it writes to compare.json."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..markdown import cell


_KINDS = (("pass@k", ""), ("plus_pass@k", " (EvalPlus)"))
# Of each number in a model's row: where it stands (`ce.` for `cross_entropy`), what it is called, how it is written.
_NUMBERS = (
    ("ce.ce", "cross-entropy", ".4f"),
    ("ce.ce_never", "cross-entropy, latents banned", ".4f"),
    ("ce.ce_policy", "cross-entropy, own latents", ".4f"),
    ("ce.elbo", "negative ELBO", ".4f"),
    ("ce.bound_multi", "negative multi-sample bound", ".4f"),
    ("ce.bits_per_byte", "bits per byte", ".4f"),
    ("ce.think_rate", "P(think) at a boundary", ".3f"),
    ("think_rate", "latents per line of code", ".3f"),
    ("latents_per_sample", "latents per sample", ".2f"),
    ("tokens_per_sample", "tokens per sample", ".1f"),
    ("finished", "ended by themselves", ".0%"),
    ("num_samples", "samples per problem", "d"),
    ("think", "--think", "s"),
)
_DRAWN = (
    ("ce.ce", "cross-entropy (nats a token)", ".3f"),
    ("ce.ce_policy", "the same, own latents", ".3f"),
    ("tokens_per_sample", "tokens per sample", ".0f"),
    ("think_rate", "latents per line of code", ".3f"),
)
_INK, _FIRST, _OTHERS, _FAINT = "#222222", "#666666", "#0072b2", "#a0a0a0"  # the blue is Okabe and Ito's
_WIDEST, _NAME_WIDTH = 4, 22  # panels side by side, characters of a line of a name
Comparison = Mapping[str, Any]  # what `ra3 compare` writes to compare.json


def comparison_rows(comparison: Comparison) -> list[list[str]]:
    """The table's rows: what a number is, and a cell for each model; rows without any number are left out."""
    models = list(comparison["models"].values())
    rows = []
    for label, numbers in _estimates(comparison):
        rows.append([label, *(_interval(number, "") for number in numbers)])
        rows.append([f"{label}, less the first's", *(_interval(number.get("difference"), "+") for number in numbers)])
    for key, label, form in _NUMBERS:
        rows.append([label, *("-" if value is None else format(value, form) for value in _values(comparison, key))])
    verdicts = {name for model in models for name in model["verdicts"]}
    for name in sorted(verdicts, key=lambda name: (name != "passed", name)):
        rows += [[f"verdict {name}", *(str(model["verdicts"].get(name, 0)) for model in models)]]
    return [row for row in rows if set(row[1:]) != {"-"}]


def _estimates(comparison: Comparison, kinds: tuple[tuple[str, str], ...] = _KINDS) -> list[tuple[str, list[Any]]]:
    """What each estimate of pass@k is called, and the models' numbers."""
    models = list(comparison["models"].values())
    return [(f"pass@{k}{plus}", [m[kind][k] for m in models]) for kind, plus in kinds for k in models[0].get(kind, {})]


def _values(comparison: Comparison, key: str) -> list[Any]:
    models, name = comparison["models"].values(), key.removeprefix("ce.")
    return [((model.get("cross_entropy") or {}) if key.startswith("ce.") else model).get(name) for model in models]


def _interval(number: Mapping[str, float] | None, sign: str) -> str:
    if number is None:
        return "-"
    value, low, high = (format(number[key], f"{sign}.3f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _title(comparison: Comparison) -> str:
    return (
        f"{comparison['task']}: {comparison['num_tasks']} problems; in brackets 95 % intervals over problems: "
        "Wilson's for a model, a paired bootstrap for differences"
    )


def comparison_table(comparison: Comparison) -> Table:
    """The table for a terminal."""
    table = Table(title=Text(_title(comparison)), title_justify="left")
    table.add_column("")
    for name in comparison["models"]:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in comparison_rows(comparison):
        table.add_row(*map(Text, row))
    return table


def comparison_markdown(comparison: Comparison, picture: str | None) -> str:
    """The same as a page in Markdown, with notes and the picture's file."""
    names = [cell(name) for name in comparison["models"]]
    lines = [f"# {cell(', '.join(comparison['models']), 500)}", "", f"{cell(_title(comparison), 500)}.", ""]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {' | '.join(row)} |" for row in comparison_rows(comparison)]
    lines += ["", *(f"- {cell(note, 2000)}" for note in comparison["notes"])]
    lines += ["", f"![Points and intervals]({picture})"] if picture else []
    return "\n".join(lines).rstrip() + "\n"


# ---- picture ----


def plot_comparison(comparison: Comparison, path: str | Path) -> None:
    """Draws a row for each model: pass@k with intervals, then cross-entropy, tokens and latents.

    Args:
        comparison (`Mapping`):
            What `ra3 compare` writes to compare.json.
        path (`str` or `Path`):
            The PNG to write. Needs matplotlib (`pip install "ra3-trl[plots]"`).
    """
    import matplotlib  # an optional dependency, and slow to load

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, names = _layout(comparison), list(comparison["models"])
    size = (2.0 + 2.4 * max(3, *map(len, rows)), 0.8 + (0.8 + 0.42 * len(names)) * len(rows))
    figure = plt.figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    # Names come from users: a `$` in one is no mathematics, and would end the drawing.
    figure.suptitle(f"{comparison['task']}, {comparison['num_tasks']} problems", fontsize=11, parse_math=False)
    figure.supxlabel(
        "Bars: 95 % intervals over problems (Wilson). Filled circles: the paired interval of the difference to "
        f"{textwrap.shorten(names[0], 40, placeholder='...')} (dashed) leaves out 0.",
        fontsize=7.5, color=_FIRST, parse_math=False,
    )  # fmt: skip
    for of_row, panels in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes = of_row.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, *panel)
        axes[0].set_yticks(range(len(names)), [_wrapped(name) for name in names])
        axes[0].set_ylim(len(names) - 0.5, -0.6)
        for label in axes[0].get_yticklabels():
            label.set_parse_math(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _layout(comparison: Comparison) -> list[list[tuple[str, str, list[Any]]]]:
    """Panels (title, form, numbers) in rows: pass@k of each kind, then what it cost; one row if they are few."""
    rows = []
    for kind in _KINDS:
        panels = [(label, ".3f", numbers) for label, numbers in _estimates(comparison, (kind,))]
        parts = math.ceil(len(panels) / _WIDEST)
        rows += [panels[len(panels) * i // parts : len(panels) * (i + 1) // parts] for i in range(parts)]
    costs = [(title, form, _values(comparison, key)) for key, title, form in _DRAWN]
    rows.append([
        (title, form, [None if value is None else {"value": value} for value in values])
        for title, form, values in costs
        if any(value is not None for value in values)
    ])  # fmt: skip
    return [sum(rows, [])] if sum(map(len, rows)) <= _WIDEST + 1 else rows


def _draw(axis: Any, title: str, form: str, numbers: list[Any]) -> None:
    """A point for each model, with its interval if there is one, and a line through the first's."""
    faint = {"ha": "center", "va": "center", "fontsize": 7.5, "color": _FAINT}
    for y, number in enumerate(numbers):
        if number is None:
            axis.annotate("not measured", (0.5, y), xycoords=axis.get_yaxis_transform(), **faint)
            continue
        color, marker, size, face = _OTHERS if y else _FIRST, "D", 4.5, _OTHERS if y else _FIRST
        if "low" in number:
            axis.plot([number["low"], number["high"]], [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
            difference = number.get("difference", {"low": 0, "high": 0})
            marker, size = "o", 6
            face = color if difference["low"] > 0 or difference["high"] < 0 else "white"
        axis.plot(number["value"], y, marker, markersize=size, markeredgewidth=1.5, color=color, markerfacecolor=face)
        axis.annotate(
            format(number["value"], form), (number["value"], y), xytext=(0, 6.5), textcoords="offset points",
            ha="center", fontsize=8, color=_INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    if numbers[0] is not None:
        axis.axvline(numbers[0]["value"], color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axis.set_title(title, fontsize=9, color=_INK)
    axis.margins(x=0.2)
    axis.locator_params(axis="x", nbins=4)
    if any(number and "low" in number for number in numbers):
        axis.set_xlim(-0.02, 1.02)  # all of a share's range, and room for the points at its ends
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    elif (values := [number["value"] for number in numbers if number is not None]) and len(set(values)) == 1:
        # Of one value matplotlib would make ticks of tiny fractions; a 0 gets room for its point.
        axis.set_xlim(*((0.9 * values[0], 1.1 * values[0]) if values[0] else (-0.05, 1)))
    axis.tick_params(axis="y", labelsize=8, length=0)
    axis.tick_params(axis="x", labelsize=7.5, length=2.5, color=_FAINT, labelcolor=_FIRST)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT)


def _wrapped(name: str) -> str:
    """A name in some short lines; of a very long one the middle is left out."""
    most = 2 * _NAME_WIDTH
    name = name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 + 1 :]}"
    return "\n".join(textwrap.wrap(name, _NAME_WIDTH))
