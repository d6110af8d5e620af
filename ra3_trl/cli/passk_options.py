"""What the options of `ra3 evaluate` and `ra3 compare` stand for: how samples are drawn, where programs run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from ..evaluation import Checkpoint, EvaluationSettings
from ..sandbox import Judge, Limits, Sandbox, SandboxError


def read_settings(options: argparse.Namespace) -> EvaluationSettings:
    """The settings of samples that the options make."""
    return EvaluationSettings(**{field.name: vars(options)[field.name] for field in fields(EvaluationSettings)})


def checkpoint_of(name: str, options: argparse.Namespace) -> Checkpoint:
    """A checkpoint that is named on the command line."""
    return Checkpoint(name, options.model_revision, options.dtype, options.trust_remote_code)


@contextmanager
def open_judge(limits: Limits, slots: int | None) -> Iterator[Judge]:
    """Opens a judge; a sandbox that does not work is an `OSError`, which the command line shows without traceback."""
    try:
        with Judge(Sandbox(slots, limits)) as judge:
            yield judge
    except SandboxError as error:
        raise OSError(str(error)) from error
