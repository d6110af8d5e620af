"""Pages that are one file, load nothing and run no script: that of `ra3 show --html`, and what others share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .show import ShownFile, ShownLatent, visible


GAIN_SCALE = 3.0  # nats at which the shade of a gain is full


def render_page(shown: ShownFile) -> str:
    """The page as HTML; everything that comes from the file or the model is escaped.

    Args:
        shown ([`ShownFile`]):
            What to show.
    """
    return render(
        "page.html.jinja", shown=shown, rows=shown.rows(), summary=shown.summary(), scale=GAIN_SCALE, sign=_sign
    )


def render(template: str, **values: Any) -> str:
    """A template of this folder as HTML; all values are escaped."""
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


def _sign(latent: ShownLatent) -> str:
    return "up" if latent.gain > 0 else "down"


def write_page(shown: ShownFile, path: Path) -> None:
    """Writes the page; see [`write_whole`].

    Args:
        shown ([`ShownFile`]):
            What to show.
        path (`Path`):
            A file in a folder that is there.
    """
    write_whole(path, render_page(shown).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it: `path` is the whole of it or what it was before."""
    aside = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
