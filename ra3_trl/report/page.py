"""The page of `ra3 show --html`: one file that loads nothing and runs no script."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from .show import ShownFile, ShownLatent, visible


TEMPLATE = Path(__file__).parent / "page.html.jinja"
GAIN_SCALE = 3.0  # nats at which the shade of a gain is full


def render_page(shown: ShownFile) -> str:
    """The page as HTML; everything that comes from the file or the model is escaped.

    Args:
        shown ([`ShownFile`]):
            What to show.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"visible": visible, "shade": _shade, "minus": _minus, "sign": _sign}
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(shown=shown, rows=shown.rows(), summary=shown.summary(), scale=GAIN_SCALE)


def _shade(gain: float) -> str:
    """Strength of a gain's shade, 0 to 1."""
    return f"{min(abs(gain) / GAIN_SCALE, 1):.2f}"


def _minus(value: float) -> str:
    """A number with its sign, as typeset: `-0.5` is `"−0.50"`."""
    return f"{value:+.2f}".replace("-", "\u2212")


def _sign(latent: ShownLatent) -> str:
    return "up" if latent.gain > 0 else "down"


def write_page(shown: ShownFile, path: Path) -> None:
    """Writes the page aside and renames it: `path` is the whole page or what it was before.

    Args:
        shown ([`ShownFile`]):
            What to show.
        path (`Path`):
            A file in a folder that is there.
    """
    aside = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        aside.write_text(render_page(shown), "utf-8", newline="\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
