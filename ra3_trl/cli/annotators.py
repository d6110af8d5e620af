"""`ra3 annotate --annotator`: who proposes latents in the policy's place, and what became of the proposals."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..policy import Annotation, Tally
from ..policy.traces import TraceAnnotator
from ..sandbox import SandboxError


ANNOTATORS = ("policy", "trace")
KEEP = ("resample", "all")
# Where nothing else is said: a trace has some 40 tokens, and an untrained gate would keep none.
SETTINGS = {"max_latent_length": 96, "prior_alpha": 0.5}
_FORMATS = ("python", "python_tags")
_WIDTH = 40


def check_annotator(options: argparse.Namespace) -> None:
    """Refuses what can't work.

    Raises:
        `ValueError`: with field, value and cure.
    """
    if options.annotator not in ANNOTATORS:
        raise ValueError(f"`annotator` is {options.annotator!r}; use one of {', '.join(map(repr, ANNOTATORS))}.")
    if options.keep not in KEEP:
        raise ValueError(f"`keep` is {options.keep!r}; use one of {', '.join(map(repr, KEEP))}.")
    if options.report and not Path(options.report).resolve().parent.is_dir():
        raise ValueError(f"`report` is {options.report!r}; name a file in a folder that is there.")
    if options.annotator == "policy":
        for name in ("keep", "report"):
            if vars(options)[name] not in ("resample", None):
                raise ValueError(
                    f"`{name}` is {vars(options)[name]!r}, but the policy's own latents are chosen by `annotation`; "
                    "name an `annotator`, such as trace, or leave it out."
                )
    elif options.proposal:
        raise ValueError(
            f"`annotator` is {options.annotator!r} and `proposal` {options.proposal!r}, which is how the policy "
            "proposes; leave one of the two out."
        )


def check_format(options: argparse.Namespace, action_format: str) -> None:
    """
    Raises:
        `ValueError`: if an annotator can't read texts of a format.
    """
    if options.annotator != "policy" and action_format not in _FORMATS:
        raise ValueError(
            f"`action_format` is {action_format!r}, but the annotator {options.annotator!r} runs Python; use one of "
            f"{', '.join(map(repr, _FORMATS))}."
        )


def origin_of(options: argparse.Namespace) -> dict[str, Any]:
    """What shapes the result, where it is not the policy that proposes."""
    return {} if options.annotator == "policy" else {"annotator": options.annotator, "keep": options.keep}


@contextmanager
def opened_annotation(options: argparse.Namespace) -> Iterator[Annotation | None]:
    """The annotator at work, nothing where the policy proposes; at the end, of whatever kind, it tells what became of
    the proposals."""
    if options.annotator == "policy":
        yield None
        return
    try:
        annotator = TraceAnnotator()
    except SandboxError as error:
        raise ValueError(f"`annotator` is 'trace', which runs programs: {error}") from error
    annotation = Annotation(annotator, keep_all=options.keep == "all")
    try:
        yield annotation
    finally:
        annotator.close()
        print("\n".join(said(annotation.tally)))
        if options.report:
            write_whole(options.report, (json.dumps(annotation.tally.report(), indent=1) + "\n").encode())


def said(tally: Tally) -> list[str]:
    """Lines that tell a tally."""
    report = tally.report()
    lines = [f"{report['texts']:,} texts, {report['proposed']:,} proposals, {report['kept']:,} kept."]
    for title, counts in (("Not kept", report["dropped"]), ("No proposal", report["none"])):
        lines += (
            [f"{title}: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items())] if counts else []
        )
    if report["mean_gain"] is not None:
        lines.append(f"Nats that they bring the student, {report['mean_gain']:+.2f} on average:")
        edges, most = report["gains"]["edges"], max(report["gains"]["counts"])
        names = [f"below {edges[0]:g}", *(f"from {edge:g}" for edge in edges)]
        for name, count in zip(names, report["gains"]["counts"], strict=True):
            lines.append(f"{name:>10} {count:>7,} {'#' * -(-_WIDTH * count // most)}")
    for title in ("best", "worst"):
        for example in report[title]:
            comment, line = (
                example[part].strip()[:70].encode("ascii", "backslashreplace").decode() for part in ("comment", "line")
            )
            lines.append(f"{title} {example['gain']:+.2f}: # {comment}  |  {line}")
    return lines
