"""A real checkpoint, prepared on programs with traces, and its mid-training by `RA3MidTrainer`.

Of the method nothing is set here that is not an arm's own: what is measured are the package's defaults.
"""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.config_fields import own_fields

from ..common import default_model, load
from .base import QUIET, last_checkpoint, resume
from .records import PreparedRecipe, TraceMidRecipe, TrainingRecipe
from .store import Store
from .traces import programs


MID_DATA = 2  # added to the seed of mid-training; 1 are the preparation's programs
SAVE_STEPS = 25
_SET = {"max_length": 256, "lr_scheduler_type": "cosine", **QUIET, "bf16": True}  # task and machine


def defaults() -> tuple[tuple[str, Any], ...]:
    """The package's settings with their defaults, in the order of their names."""
    names = own_fields(RA3Config)
    return tuple(sorted((entry.name, entry.default) for entry in fields(RA3Config) if entry.name in names))


def on_base(recipe: TraceMidRecipe, base: PreparedRecipe, seed: int) -> TraceMidRecipe:
    """Mid-training of this base with this seed, by the defaults as they are now where there is an E-phase; for
    next-token prediction they are of no account."""
    latents = recipe.e_steps or dict(recipe.settings).get("annotation")
    return replace(recipe, base=base, seed=seed, defaults=defaults() if latents else ())


def config(recipe: TrainingRecipe, folder: Path, **settings: Any) -> RA3Config:
    """The settings of a run that shape it, and `settings`."""
    return RA3Config(
        output_dir=str(folder), seed=recipe.seed, learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size, warmup_steps=recipe.warmup_steps, **_SET | settings,
    )  # fmt: skip


def checkpoint(store: Store, recipe: PreparedRecipe | TraceMidRecipe) -> Path:
    """The folder of the checkpoint that a recipe gives, trained if it is not there."""
    (prepare if isinstance(recipe, PreparedRecipe) else midtrain)(store, recipe)
    return store.folder(recipe) / "model"


def prepare(store: Store, recipe: PreparedRecipe, save_steps: int = SAVE_STEPS) -> dict[str, Any]:
    """As [`midtrain`], by next-token prediction on programs with traces. A checkpoint that was put into the entry's
    `model` is taken as it is."""

    def work(folder: Path) -> dict[str, Any]:
        if (folder / "model" / "config.json").exists():
            return {"seconds": 0.0, "resumed_at": recipe.steps, "updates": recipe.steps, "log": []}
        # The head and the log as they were in the first such run: a checkpoint remembers both, and goes on only so.
        args = config(
            recipe, folder / "run", e_steps=0, m_steps=recipe.steps, abstraction_head=False, logging_steps=5,
            save_steps=save_steps,
        )  # fmt: skip
        data = programs(recipe.corpus, recipe.data_seed, recipe.steps * recipe.batch_size)
        return trained(load(recipe.model or default_model()), args, data, folder)

    return store.get(recipe, work)


def midtrain(store: Store, recipe: TraceMidRecipe, save_steps: int = SAVE_STEPS) -> dict[str, Any]:
    """`seconds` of the last sitting by the clock on the wall and the update it was `resumed_at`, `updates` in all, and
    the `log`, an entry an update; the checkpoint is in `model`."""

    def work(folder: Path) -> dict[str, Any]:
        settings = {"e_steps": recipe.e_steps, "m_steps": recipe.m_steps} | dict(recipe.settings)
        args = config(
            recipe, folder / "run", save_steps=save_steps, max_latent_length=recipe.max_latent_length, **settings
        )
        data = programs(recipe.corpus, MID_DATA + recipe.seed, recipe.programs)
        return trained(load(str(checkpoint(store, recipe.base))), args, data, folder)

    return store.get(recipe, work)


def trained(
    start: tuple[PreTrainedModel, PreTrainedTokenizerBase], args: RA3Config, data: Dataset, folder: Path
) -> dict[str, Any]:
    """Trains to the end, from the last checkpoint if there is one; what [`midtrain`] tells of it."""
    model, tokenizer = start
    trainer = RA3MidTrainer(model, args, data, None, tokenizer)
    last = last_checkpoint(folder / "run")
    begin = time.perf_counter()
    resume(trainer, folder / "run")
    seconds = time.perf_counter() - begin
    trainer.save_model(folder / "model")
    log = [
        {name: value for name, value in entry.items() if "/" in name or name in ("step", "loss")}
        for entry in trainer.state.log_history
    ]
    return {
        "seconds": seconds,
        "resumed_at": int(last.split("-")[-1]) if last else 0,
        "updates": trainer.state.global_step,
        "log": log,
    }
