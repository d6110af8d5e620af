"""`ra3_config.json`: the settings of a run, beside its weights, with a version and migrations from older ones.

Version 4 holds what [`RA3Config`] needs to do the run again: its own fields and the training ones of `_TRAINING`; and,
apart, those of an experimental trainer. No path, no token, nothing of the machine. Version 3 weighed latents in
another way; version 2 had other names and more fields; version 1 is what checkpoints of before kept in
`ra3_state.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from .files import find_file, read_versioned, require_form


RA3_CONFIG, VERSION = "ra3_config.json", 4
_STATE = "ra3_state.json"
_TRAINING = (
    "seed", "data_seed", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "train_sampling_strategy", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs",
    "max_steps", "bf16", "fp16", "activation_checkpointing", "dataloader_drop_last",
)  # fmt: skip
# The first may hold a token; whose code runs is for the user to say, not for a file; a chat template is saved with the
# tokenizer.
_OF_THE_MACHINE = {"model_init_kwargs", "trust_remote_code", "dataset_num_proc", "chat_template_path"}


def settings_of(args: Any, own: Iterable[str]) -> dict[str, Any]:
    """Values of the fields `own` and of the training fields as JSON knows them; infinity is `"inf"`."""
    values = {name: getattr(args, name) for name in (*own, *_TRAINING) if name not in _OF_THE_MACHINE}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return {name: "inf" if value == math.inf else value for name, value in values.items()}


def write_settings(settings: dict[str, Any], folder: str | Path, experimental: dict[str, Any] | None = None) -> None:
    """Writes `ra3_config.json` into `folder`; `experimental` are the fields of an experimental configuration."""
    content = {"version": VERSION, "ra3_trl": metadata.version("ra3-trl"), "settings": settings}
    content |= {"experimental": experimental} if experimental else {}
    Path(folder, RA3_CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")


Content = dict[str, dict[str, Any]]  # "settings" and "experimental"


def _from_1(content: Content) -> Content:
    """Facts of the run that are no settings go; there was no abstraction head. `m_steps` and `em_iterations` were not
    kept and become the defaults."""
    facts = {"world_size", "train_dataset", "reward_funcs", "prompts", "proposal_func", "dataloader_num_workers"}
    settings = {name: value for name, value in content["settings"].items() if name not in facts}
    return {"settings": settings | {"abstraction_head": False}, "experimental": {}}


def _from_2(content: Content) -> Content:
    """Fields that no run used go; sites are boundaries; the prior has one name; proposals are experimental."""
    settings = dict(content["settings"])
    for name in ("gate_coef", "gate_kl_coef", "entropy_coef", "head_learning_rate"):
        settings.pop(name, None)
    for former, name in (("max_sites", "max_boundaries"), ("eval_max_sites", "eval_max_boundaries")):
        if former in settings:
            settings[name] = settings.pop(former)
    think = settings.pop("annotation_think_prob", None)
    if think is not None:
        settings["prior_alpha"] = None if think == -1 else 1 - think
    elif settings.get("e_steps") == 0:  # without it such a run was next-token prediction
        settings["annotation"] = None
    proposals = {name: settings.pop(name) for name in list(settings) if name.startswith("proposal")}
    return {"settings": settings, "experimental": proposals if proposals.get("proposal", "causal") != "causal" else {}}


def _from_3(content: Content) -> Content:
    """What an E-phase raised was the ELBO, of two latents or more: its baseline without latent goes. So does
    `latent_weight`: P(think) alone was `exploration=0`, as was the prior of annotation by the gate; a weight of 1 is
    no more."""
    settings = dict(content["settings"])
    settings.pop("baseline", None)
    by_gate = settings.pop("latent_weight", None) == "gate" or settings.get("prior_alpha", 0.7) is None
    then = {
        "objective": "elbo", "exploration": 0.0 if by_gate else 0.05, "prior_alpha": 0.7,
        "boundary_selection": "random", "boundary_budget": 0.5, "num_latents": 4, "e_learning_rate": 1e-5,
        "same_latent_tolerance": 1.0,
    }  # fmt: skip
    settings = then | settings
    if settings.get("e_steps", 20) and settings["num_latents"] == 1:
        settings["num_latents"] = 2
    return content | {"settings": settings}


_MIGRATIONS: dict[int, Callable[[Content], Content]] = {1: _from_1, 2: _from_2, 3: _from_3}


def _read(name: str, **place: Any) -> Content | None:
    path = find_file(name, RA3_CONFIG, **place) or find_file(name, _STATE, **place)
    if path is None:
        return None
    with read_versioned(path, name, VERSION, "take another revision") as file:
        file.setdefault("experimental", {})
        require_form(file, {"settings": dict[str, Any], "experimental": dict[str, Any]})
        content = {"settings": file["settings"], "experimental": file["experimental"]}
        for older in range(file["version"], VERSION):
            content = _MIGRATIONS[older](content)
    return content


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
    content = _read(name, **place)
    if content is None:
        return None
    return {field: math.inf if value == "inf" else value for field, value in content["settings"].items()}


def read_experimental(name: str, **place: Any) -> dict[str, Any]:
    """The fields of an experimental configuration that a checkpoint was trained with; empty where there are none."""
    return (_read(name, **place) or {}).get("experimental", {})
