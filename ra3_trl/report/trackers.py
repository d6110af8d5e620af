"""Whether the trackers that `report_to` names are there, asked before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from transformers.integrations import get_available_reporting_integrations


# What to install for each name that transformers knows.
_PACKAGES = {
    "azure_ml": "azureml-core",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Passes when every tracker of `report_to` can be used.

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
    installed = {*get_available_reporting_integrations(), *(["flyte"] if find_spec("flytekit") else [])}
    for name in names:
        if name not in _PACKAGES:
            raise ValueError(
                f"`report_to` is {name!r}; use 'none', 'all' or some of {', '.join(map(repr, _PACKAGES))}."
            )
        if name not in installed:
            raise ValueError(
                f"`report_to` is {name!r}, which is not installed: `pip install {_PACKAGES[name]}`, or leave it out "
                "(`report_to='none'`)."
            )
