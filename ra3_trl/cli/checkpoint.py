"""What the commands that look at a trained checkpoint share: its options, and settings from it and from flags."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from ..config import RA3Config


def add_model_options(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """`--model_revision` and `--dtype`, the latter with a default."""
    model = parser.add_argument_group("model")
    model.add_argument("--model_revision", default="main", help="branch, tag or commit (default: %(default)s)")
    model.add_argument(
        "--dtype", default=dtype, choices=("auto", "bfloat16", "float16", "float32"),
        help="of weights (default: %(default)s)",
    )  # fmt: skip


def add_settings(
    parser: argparse.ArgumentParser, title: str, names: Sequence[str], of_the_checkpoint: Collection[str]
) -> None:
    """A flag for each field of [`RA3Config`] in `names`; left out, those `of_the_checkpoint` are the checkpoint's."""
    group = parser.add_argument_group(title)
    hints, by_name = get_type_hints(RA3Config), {field.name: field for field in fields(RA3Config)}
    for name in names:
        kind = next((t for t in (int, float, str) if hints[name] in (t, t | None)), str)
        own = "the checkpoint's, else " if name in of_the_checkpoint else ""
        text = f"{by_name[name].metadata.get('help', 'Seed of the draws.')} (default: {own}{by_name[name].default})"
        group.add_argument(f"--{name}", type=kind, help=text.replace("%", "%%"))


def make_config(
    options: argparse.Namespace,
    saved: dict[str, Any],
    names: Sequence[str],
    of_the_checkpoint: Sequence[str],
    output_dir: str,
    **fixed: Any,
) -> RA3Config:
    """The settings `saved` with a checkpoint, changed by the flags that were given, for a trainer that won't train."""
    settings = {name: saved[name] for name in of_the_checkpoint if name in saved}
    if "proposal" in settings and (options.proposal is not None or options.annotation == "policy"):
        own = options.proposal in (None, "causal")
        for name in ("proposal", "proposal_template", *(["proposal_kl_coef"] if own else [])):  # they go together
            settings.pop(name, None)
    if "function" in settings.get("proposal", ""):
        raise ValueError(
            f"the checkpoint was trained with `proposal` {settings['proposal']!r}, and its function is not at hand; "
            "give another `--proposal`, such as causal."
        )
    settings |= {name: vars(options)[name] for name in names if vars(options)[name] is not None}
    # With an E-step chunks leave room for latents; against no latent one latent a boundary is enough.
    return RA3Config(
        output_dir=output_dir, report_to="none", e_steps=1, m_steps=0, baseline="no_think",
        model_init_kwargs={"dtype": options.dtype, "revision": options.model_revision}, **settings, **fixed,
    )  # fmt: skip
