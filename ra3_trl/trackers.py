"""Refuses trackers and a best metric that could not work, before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

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


def check_best_metric(metric: str | None, eval_sets: Iterable[str]) -> None:
    """Refuses a `metric_for_best_model` that no evaluation set has: transformers would at the first evaluation.

    Args:
        metric (`str`, *optional*):
            `metric_for_best_model`, with or without `eval_`.
        eval_sets (`Iterable[str]`):
            Keys of the dict of evaluation sets; none for a single set.

    Raises:
        `ValueError`: if the metric is of none of several sets.
    """
    names = list(eval_sets)
    if metric is None or not names or metric.removeprefix("eval_").startswith(tuple(f"{name}_" for name in names)):
        return
    choices = ", ".join(repr(f"eval_{name}_elbo") for name in names)
    raise ValueError(
        f"`metric_for_best_model` is {metric!r}, but each set of `eval_dataset` has its own: use {choices}."
    )
