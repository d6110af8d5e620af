"""Whether the metric that chooses the best checkpoint is one that an evaluation gives."""

from __future__ import annotations

from collections.abc import Iterable


def check_best_metric(metric: str | None, eval_sets: Iterable[str]) -> None:
    """Passes when `metric_for_best_model` names a metric of one of several evaluation sets.

    Args:
        metric (`str`, *optional*):
            `metric_for_best_model`, with or without `eval_`.
        eval_sets (`Iterable[str]`):
            Keys of the dict of evaluation sets.

    Raises:
        `ValueError`: if it is of none of them: `transformers` would find out at the first evaluation.
    """
    names = list(eval_sets)
    if metric is None or not names or metric.removeprefix("eval_").startswith(tuple(f"{name}_" for name in names)):
        return
    can = ", ".join(repr(f"eval_{name}_elbo") for name in names)
    raise ValueError(f"`metric_for_best_model` is {metric!r}, but each set of `eval_dataset` has its own: use {can}.")
