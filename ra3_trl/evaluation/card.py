"""Results of a benchmark in the metadata of a model card, where the Hub shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, metadata_update
from huggingface_hub.repocard_data import eval_results_to_model_index
from yaml import YAMLError


_NAMES = {"humaneval": "HumanEval", "mbpp": "MBPP"}
_HUB_IDS = {"humaneval": "openai/openai_humaneval", "mbpp": "google-research-datasets/mbpp"}


def card_results(results: dict[str, Any]) -> list[EvalResult]:
    """pass@k of a run, as a card's metadata have it; the settings stand in the metric's name.

    Args:
        results (`dict[str, Any]`):
            What `ra3 evaluate` wrote.
    """
    task, run = results["task"], results["run"]
    drawn = run["settings"]
    think = "" if drawn["think"] is None else f", think {drawn['think']}"
    how = f"{run['form']}{think}, temperature {drawn['temperature']:g}, n={drawn['num_samples']}"
    found = []
    for prefix, plus in (("", ""), ("plus_", "+")):
        for k, estimate in results.get(f"{prefix}pass@k", {}).items():
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=_HUB_IDS.get(task, task) + plus,
                    dataset_name=_NAMES.get(task, task) + plus,
                    metric_type="pass@k",
                    metric_name=f"pass@{k} ({how})",
                    metric_value=round(estimate["value"], 4),
                    verified=False,
                )
            )
    return found


def add_to_card(results: dict[str, Any], folder: Path) -> bool:
    """Puts a run's results into the card of a checkpoint's folder, in the place of the same ones; false if it has
    none.

    Raises:
        `ValueError`: if its metadata can't be read.
    """
    path = folder / "README.md"
    if not path.is_file():
        return False
    try:
        card = ModelCard.load(path)
    except (YAMLError, ValueError) as error:
        raise ValueError(
            f"the results are saved, but not in {path}, whose metadata can't be read ({error}); correct them, or set "
            "`no_card`."
        ) from error
    card.data.model_name = card.data.model_name or folder.resolve().name
    card.data.eval_results = _merged(card.data.eval_results or [], card_results(results))
    card.save(path)
    return True


def push_results(results: dict[str, Any], repo_id: str, token: str | None = None) -> str:
    """Puts a run's results into the card of a Hub repository: the commit's address."""
    index = eval_results_to_model_index(repo_id.split("/")[-1], card_results(results))
    return metadata_update(repo_id, {"model-index": index}, overwrite=True, token=token)


def _merged(old: list[EvalResult], new: list[EvalResult]) -> list[EvalResult]:
    """`old` without what `new` measured again, and `new`."""
    again = {(one.dataset_type, one.metric_name) for one in new}
    return [one for one in old if (one.dataset_type, one.metric_name) not in again] + new
