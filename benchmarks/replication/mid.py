"""Mid-training of a base by `RA3MidTrainer`, with the E-phase or without (next-token prediction)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ra3_trl.experimental.hindsight import HindsightConfig, HindsightTrainer
from ra3_trl.testbed import programs
from ra3_trl.testbed.behaviour import MAX_LATENT

from .base import QUIET, pretrain, resume
from .records import BaseRecipe, MidRecipe
from .store import Store


MID_DATA = 10_000  # as `CAREFUL_DATA`
_LOGGED = (
    "estep/gain",
    "estep/gate_weighted_gain",
    "estep/think_rate",
    "estep/reward",
    "estep/gate_held",
    "estep/hindsight/gain",
    "estep/hindsight/log_ratio",
    "mstep/annotated_rate",
    "mstep/effective_size",
    "mstep/code_loss",
)


def load(folder: Path):
    """Model and tokenizer of a checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def model_folder(store: Store, recipe: BaseRecipe | MidRecipe) -> Path:
    """The checkpoint that a recipe gives, trained if it is not there."""
    (pretrain if isinstance(recipe, BaseRecipe) else midtrain)(store, recipe)
    return store.folder(recipe) / "model"


def config(recipe: MidRecipe, folder: Path, **settings) -> HindsightConfig:
    """The settings of a run."""
    think = recipe.annotation_think_prob
    annotation = {} if think is None else {"annotation": "resample", "prior_alpha": None if think == -1 else 1 - think}
    return HindsightConfig(
        output_dir=str(folder), seed=recipe.seed, e_steps=recipe.e_steps, m_steps=recipe.m_steps,
        e_learning_rate=recipe.e_learning_rate, learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size, num_latents=recipe.num_latents, max_latent_length=MAX_LATENT,
        horizon=recipe.horizon, penalty=recipe.penalty, kl_coef=recipe.kl_coef, packing=False, max_length=384,
        log_latents_steps=0, code_loss_tolerance=10.0,
        **QUIET | {"abstraction_head": False} | annotation | dict(recipe.settings) | settings,
    )  # fmt: skip


def midtrain(store: Store, recipe: MidRecipe, save_steps: int = 20) -> dict[str, Any]:
    """`seconds` of the last sitting, `tokens` (of programs and of latents spliced in) seen in all updates, and the
    `log`, one entry an update; the checkpoint is in `model`."""

    def work(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(model_folder(store, recipe.base))
        args = config(recipe, folder / "run", save_steps=save_steps, logging_steps=1)
        trainer = HindsightTrainer(
            model, args, programs(recipe.corpus, MID_DATA + recipe.seed, recipe.programs), None, tokenizer
        )
        seconds = resume(trainer, folder / "run")
        trainer.save_model(folder / "model")
        log = [{name: entry[name] for name in _LOGGED if name in entry} for entry in trainer.state.log_history]
        tokens = trainer.state.num_input_tokens_seen
        return {"seconds": seconds, "tokens": tokens, "log": [entry for entry in log if entry]}

    return store.get(recipe, work)
