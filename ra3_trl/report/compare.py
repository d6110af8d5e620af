"""The table and the picture of `ra3 compare`, from what it writes to compare.json."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..markdown import cell


_KINDS = (("pass@k", ""), ("plus_pass@k", " (EvalPlus)"))
_CE = (
    ("ce", "cross-entropy", ".4f"),
    ("ce_never", "cross-entropy, latents banned", ".4f"),
    ("ce_policy", "cross-entropy, own latents", ".4f"),
    ("elbo", "negative ELBO", ".4f"),
    ("bound_multi", "negative multi-sample bound", ".4f"),
    ("bits_per_byte", "bits per byte", ".4f"),
    ("think_rate", "P(think) at a boundary", ".3f"),
)
_MEANS = (
    ("think_rate", "latents per line of code", ".3f"),
    ("latents_per_sample", "latents per sample", ".2f"),
    ("tokens_per_sample", "tokens per sample", ".1f"),
    ("finished", "ended by themselves", ".0%"),
    ("num_samples", "samples per problem", "d"),
    ("think", "--think", "s"),
)
_INK, _FIRST, _OTHERS, _FAINT = "#222222", "#666666", "#0072b2", "#a0a0a0"  # the blue is Okabe and Ito's
_WIDEST, _NAME_WIDTH = 4, 22  # panels side by side, characters of a line of a name


def comparison_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows: what a number is, and a cell for each model; rows without any number are left out.

    Args:
        comparison (`Mapping`):
            What `ra3 compare` writes to compare.json.
    """
    models = list(comparison["models"].values())
    rows = []
    for kind, k, label in _estimates(comparison):
        found = [model[kind][k] for model in models]
        rows.append([label, *(_interval(one, "") for one in found)])
        rows.append([f"{label}, less the first's", *(_interval(one.get("difference"), "+") for one in found)])
    entropies = [model.get("cross_entropy") or {} for model in models]
    rows += [[label, *(_number(one.get(key), form) for one in entropies)] for key, label, form in _CE]
    rows += [[label, *(_number(one.get(key), form) for one in models)] for key, label, form in _MEANS]
    kinds = sorted({name for one in models for name in one["verdicts"]}, key=lambda name: (name != "passed", name))
    rows += [[f"verdict {name}", *(str(one["verdicts"].get(name, 0)) for one in models)] for name in kinds]
    return [row for row in rows if set(row[1:]) != {"-"}]


def _estimates(comparison: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Where the estimates of pass@k stand, and what they are called."""
    first = next(iter(comparison["models"].values()))
    return [(kind, k, f"pass@{k}{plus}") for kind, plus in _KINDS for k in first.get(kind, {})]


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(number: Mapping[str, float] | None, sign: str) -> str:
    if number is None:
        return "-"
    value, low, high = (format(number[key], f"{sign}.3f") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def comparison_title(comparison: Mapping[str, Any]) -> str:
    """What is compared, and what the brackets are, in a sentence."""
    return (
        f"{comparison['task']}: {comparison['num_tasks']} problems; in brackets 95 % bootstrap intervals over "
        "problems, paired for differences"
    )


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(title=Text(comparison_title(comparison)), title_justify="left")
    table.add_column("")
    for name in comparison["models"]:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in comparison_rows(comparison):
        table.add_row(*map(Text, row))
    return table


def comparison_markdown(comparison: Mapping[str, Any], picture: str | None) -> str:
    """The same as a page in Markdown, with notes and the picture's file."""
    names = [cell(name) for name in comparison["models"]]
    lines = [f"# {cell(', '.join(comparison['models']), 500)}", "", f"{cell(comparison_title(comparison), 500)}.", ""]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {' | '.join(row)} |" for row in comparison_rows(comparison)]
    lines += ["", *(f"- {cell(note, 2000)}" for note in comparison["notes"])]
    lines += ["", f"![Points and intervals]({picture})"] if picture else []
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class _Panel:
    """One measure of all models; `None` where a model has it not."""

    title: str
    form: str
    numbers: Sequence[Mapping[str, Any] | None]


def plot_comparison(comparison: Mapping[str, Any], path: str | Path) -> None:
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
    widest = max(len(row) for row in rows)
    size = (2.0 + 2.4 * max(widest, 3), 0.8 + (0.8 + 0.42 * len(names)) * len(rows))
    figure = plt.figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    figure.suptitle(f"{comparison['task']}, {comparison['num_tasks']} problems", fontsize=11, parse_math=False)
    figure.supxlabel(_caption(names[0]), fontsize=7.5, color=_FIRST, parse_math=False)
    for part, panels in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axes = part.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel)
        axes[0].set_yticks(range(len(names)), [_wrapped(name) for name in names])
        axes[0].set_ylim(len(names) - 0.5, -0.6)
        for label in axes[0].get_yticklabels():
            label.set_parse_math(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _layout(comparison: Mapping[str, Any]) -> list[list[_Panel]]:
    """Panels in rows: pass@k of each kind, then what it cost; all in one row if they are few."""
    models = list(comparison["models"].values())
    rows = []
    for kind, _ in _KINDS:
        of_kind = [(k, label) for of, k, label in _estimates(comparison) if of == kind]
        found = [_Panel(label, ".3f", [model[kind][k] for model in models]) for k, label in of_kind]
        parts = math.ceil(len(found) / _WIDEST)
        rows += [found[len(found) * i // parts : len(found) * (i + 1) // parts] for i in range(parts)]
    entropies = [model.get("cross_entropy") or {} for model in models]
    small = [
        ("cross-entropy (nats a token)", ".3f", [one.get("ce") for one in entropies]),
        ("the same, own latents", ".3f", [one.get("ce_policy") for one in entropies]),
        ("tokens per sample", ".0f", [one.get("tokens_per_sample") for one in models]),
        ("latents per line of code", ".3f", [one.get("think_rate") for one in models]),
    ]
    rows.append([
        _Panel(title, form, [None if value is None else {"value": value} for value in values])
        for title, form, values in small
        if any(value is not None for value in values)
    ])  # fmt: skip
    few = sum(map(len, rows)) <= _WIDEST + 1
    return [sum(rows, [])] if few else rows


def _draw(axis, panel: _Panel) -> None:
    """A point for each model, with its interval if there is one, and a line through the first's."""
    for y, number in enumerate(panel.numbers):
        if number is None:
            axis.annotate(
                "not measured", (0.5, y), xycoords=axis.get_yaxis_transform(), ha="center", va="center", fontsize=7.5,
                color=_FAINT,
            )  # fmt: skip
            continue
        color, marker, face = _OTHERS if y else _FIRST, "D", None
        if "low" in number:
            axis.plot([number["low"], number["high"]], [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
            marker, face = "o", None if _leaves_out_0(number.get("difference")) else "white"
        axis.plot(
            number["value"], y, marker, markersize=6 if marker == "o" else 4.5, markeredgewidth=1.5, color=color,
            markerfacecolor=face or color,
        )  # fmt: skip
        axis.annotate(
            format(number["value"], panel.form), (number["value"], y), xytext=(0, 6.5), textcoords="offset points",
            ha="center", fontsize=8, color=_INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    if panel.numbers[0] is not None:
        axis.axvline(panel.numbers[0]["value"], color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axis.set_title(panel.title, fontsize=9, color=_INK)
    axis.margins(x=0.2)
    if any(number and "low" in number for number in panel.numbers):  # no share is below 0 or above 1
        low, high = axis.get_xlim()
        axis.set_xlim(max(low, -0.1), min(high, 1.1))
    axis.locator_params(axis="x", nbins=4)
    axis.tick_params(axis="y", labelsize=8, length=0)
    axis.tick_params(axis="x", labelsize=7.5, length=2.5, color=_FAINT, labelcolor=_FIRST)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(_FAINT)


def _leaves_out_0(number: Mapping[str, float] | None) -> bool:
    return number is not None and (number["low"] > 0 or number["high"] < 0)


def _caption(first: str) -> str:
    return (
        "Bars: 95 % bootstrap intervals over problems. Filled circles: the paired interval of the difference to "
        f"{textwrap.shorten(first, 40, placeholder='...')} (dashed) leaves out 0."
    )


def _wrapped(name: str) -> str:
    """A name in some short lines; of a very long one the middle is left out."""
    most = 2 * _NAME_WIDTH
    name = name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 + 1 :]}"
    return "\n".join(textwrap.wrap(name, _NAME_WIDTH))
