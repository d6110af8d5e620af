"""`ra3_config.json`: the settings of a run, beside its weights, with a version and migrations from older ones.

Version 2 holds what [`RA3Config`] needs to do the run again: its own fields and the training ones of `_TRAINING`. No
path, no token, nothing of the machine. Version 1 is what checkpoints of before kept in `ra3_state.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from .files import find_file, read_versioned


RA3_CONFIG, VERSION = "ra3_config.json", 2
_STATE = "ra3_state.json"
_TRAINING = (
    "seed", "data_seed", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "train_sampling_strategy", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs",
    "max_steps", "bf16", "fp16", "activation_checkpointing", "dataloader_drop_last",
)  # fmt: skip
_OF_THE_MACHINE = {"model_init_kwargs", "dataset_num_proc"}  # the first may hold a token


def settings_of(args: Any, own: list[str]) -> dict[str, Any]:
    """Values of the fields `own` and of the training fields as JSON knows them; infinity is `"inf"`."""
    values = {name: getattr(args, name) for name in (*own, *_TRAINING) if name not in _OF_THE_MACHINE}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # of an enumeration
    return {name: "inf" if value == math.inf else value for name, value in values.items()}


def write_settings(settings: dict[str, Any], folder: str | Path) -> None:
    """Writes `ra3_config.json` into `folder`."""
    content = {"version": VERSION, "ra3_trl": metadata.version("ra3-trl"), "settings": settings}
    Path(folder, RA3_CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")


def _from_1(settings: dict[str, Any]) -> dict[str, Any]:
    """Facts of the run that are no settings go; there was no abstraction head. `m_steps` and `em_iterations` were not
    kept and become the defaults."""
    facts = {"world_size", "train_dataset", "reward_funcs", "prompts", "proposal_func", "dataloader_num_workers"}
    return {name: value for name, value in settings.items() if name not in facts} | {"abstraction_head": False}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def read_settings(name: str, **place: Any) -> dict[str, Any] | None:
    """The settings a checkpoint was trained with, in the present version; `None` where it has none.

    Args:
        name (`str`):
            Folder or Hub id.
        **place:
            As for [`~ra3_trl.files.find_file`].

    Raises:
        `ValueError`: for a file that is damaged or of a newer version.
    """
    path = find_file(name, RA3_CONFIG, **place) or find_file(name, _STATE, **place)
    if path is None:
        return None
    with read_versioned(path, name, VERSION, "take another revision") as content:
        settings = dict(content["settings"])
        for older in range(content["version"], VERSION):
            settings = _MIGRATIONS[older](settings)
    return {name: math.inf if value == "inf" else value for name, value in settings.items()}
