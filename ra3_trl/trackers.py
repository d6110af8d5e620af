"""Refuses trackers and a best metric that could not work, before anything is loaded or written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations


# Where the package to install is not called as the tracker is.
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Refuses trackers that transformers would find missing only after the model is loaded.

    Args:
        report_to (`str` or `list[str]`, *optional*):
            As in `TrainingArguments`: names of trackers, `"all"` for those that are installed, `"none"`.

    Raises:
        `ValueError`: for a name that is not known, or a tracker that is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name not in (None, "none", "all")]
    if not names:
        return
    # transformers has a callback for flyte and does not list it among what is installed.
    installed = {*get_available_reporting_integrations(), *(["flyte"] if find_spec("flytekit") else [])}
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            choices = ", ".join(map(repr, sorted(INTEGRATION_TO_CALLBACK)))
            raise ValueError(f"`report_to` is {name!r}; use 'none', 'all' or some of {choices}.")
        if name not in installed:
            raise ValueError(
                f"`report_to` is {name!r}, which is not installed: `pip install {_PACKAGES.get(name, name)}`, or "
                "leave it out (`report_to='none'`)."
            )


_OF_TRAINER = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def check_best_metric(metric: str | None, eval_dataset: Any, measured: Iterable[str]) -> None:
    """Refuses a `metric_for_best_model` that no evaluation has: transformers would at the first evaluation.

    Args:
        metric (`str`, *optional*):
            `metric_for_best_model`, with or without `eval_`.
        eval_dataset (`Any`):
            What is evaluated: `None`, a set, or a dict of sets.
        measured (`Iterable[str]`):
            What is measured on a set.

    Raises:
        `ValueError`: naming a metric that might have been meant.
    """
    if metric is None or eval_dataset is None:
        return
    sets = eval_dataset if isinstance(eval_dataset, dict) else ()
    prefixes, names = [f"{name}_" for name in sets] or [""], [*measured]
    name = metric.removeprefix("eval_")
    if any(name == prefix + of for prefix in prefixes for of in [*names, *_OF_TRAINER]):
        return
    if sets and name in names:
        choices = ", ".join(repr(f"eval_{prefix}{name}") for prefix in prefixes)
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, but each set of `eval_dataset` has its own: use {choices}."
        )
    near = difflib.get_close_matches(name, names, 1, cutoff=0.7) or ["elbo"]
    raise ValueError(
        f"`metric_for_best_model` is {metric!r}, which is not measured; use one of {', '.join(map(repr, names))}, "
        f"such as {f'eval_{prefixes[0]}{near[0]}'!r}. What a callback measures in `on_evaluate` is taken, if the "
        "callback is passed as one of `callbacks`."
    )
