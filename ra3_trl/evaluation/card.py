"""Results of a benchmark in the metadata of a model card, where the Hub shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, metadata_update
from huggingface_hub.repocard_data import eval_results_to_model_index
from yaml import YAMLError

from ..files import DAMAGE, one_line
from .tasks import HUB


_NAMES = {"humaneval": "HumanEval", "mbpp": "MBPP"}


def card_results(results: dict[str, Any]) -> list[EvalResult]:
    """pass@k of what [`evaluate_passk`] returned, as a card's metadata have it; the metric's name has the settings."""
    task, run = results["task"], results["run"]
    settings = run["settings"]
    think = "" if settings["think"] is None else f", think {settings['think']}"
    how = f"{run['form']}{think}, temperature {settings['temperature']:g}, n={settings['num_samples']}"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=HUB.get(task, task) + plus,
            dataset_name=_NAMES.get(task, task) + plus,
            metric_type="pass@k",
            metric_name=f"pass@{k} ({how})",
            metric_value=round(estimate["value"], 4),
            verified=False,
        )
        for name, plus in (("pass@k", ""), ("plus_pass@k", "+"))
        for k, estimate in results.get(name, {}).items()
    ]


def add_to_card(results: dict[str, Any], folder: str | Path) -> bool:
    """Puts what [`evaluate_passk`] returned into the card of a checkpoint's folder, in the place of the same results;
    false if it has none.

    Raises:
        `ValueError`: if the card's metadata can't be read.
    """
    path = Path(folder, "README.md")
    if not path.is_file():
        return False
    new = card_results(results)
    again = {(entry.dataset_type, entry.metric_name) for entry in new}
    try:
        card = ModelCard.load(path)
        of_card = card.data.eval_results or []
        old = [entry for entry in of_card if (entry.dataset_type, entry.metric_name) not in again]
    except (YAMLError, *DAMAGE) as error:
        raise ValueError(
            f"the results are saved, but not in {path}, whose metadata can't be read ({one_line(error)}); correct "
            "them, or set `no_card`."
        ) from error
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    card.data.eval_results = old + new
    card.save(path)
    return True


def push_results(results: dict[str, Any], repo_id: str, token: str | None = None) -> str:
    """Puts results, as in [`add_to_card`], into the card of a Hub repository; returns the commit's address."""
    index = eval_results_to_model_index(repo_id.split("/")[-1], card_results(results))
    return metadata_update(repo_id, {"model-index": index}, overwrite=True, token=token)
