"""Pages that are one file, load nothing and run no script: that of `ra3 show --html`, and what others share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..files import write_whole
from .show import ShownFile, visible


GAIN_SCALE = 3.0  # nats at which the shade of a gain is full


def render_page(shown: ShownFile) -> str:
    """Renders a file as HTML; everything that comes from the file or the model is escaped."""
    return render(
        "page.html.jinja",
        shown=shown,
        rows=shown.rows(),
        summary=shown.summary(),
        sameness=shown.sameness(),
        scale=GAIN_SCALE,
    )


def render(template: str, **values: Any) -> str:
    """Renders a template of this folder as HTML; all values are escaped."""
    loader = PackageLoader(__package__, "")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"visible": visible, "shade": _shade, "minus": _minus}
    return environment.get_template(template).render(**values)


def _shade(gain: float) -> str:
    """Strength of a gain's shade, 0 to 1."""
    return f"{min(abs(gain) / GAIN_SCALE, 1):.2f}"


def _minus(value: float) -> str:
    """A number with its sign, as typeset: `-0.5` is `"−0.50"`."""
    return f"{value:+.2f}".replace("-", "\u2212")


def write_page(shown: ShownFile, path: Path) -> None:
    """Writes the page of a file, whole or not at all."""
    write_whole(path, render_page(shown).encode())
