"""RL post-training by TRL's `GRPOTrainer`: how soon and how far a checkpoint learns to state the last line right."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from ra3_trl.testbed.corpus import right_line, tasks

from .base import QUIET, resume
from .mid import load, model_folder
from .records import Curve, RlvrRecipe
from .store import Store


RLVR_DATA = 20_000  # as `CAREFUL_DATA`


def reinforce(store: Store, recipe: RlvrRecipe, save_steps: int = 10) -> dict[str, Any]:
    """`accuracy` before each update (of the samples that the update learns from) and `seconds` of the last sitting."""

    def work(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(model_folder(store, recipe.start))
        samples = recipe.prompts * recipe.generations
        args = GRPOConfig(
            output_dir=str(folder / "run"), seed=recipe.seed, max_steps=recipe.steps,
            learning_rate=recipe.learning_rate, lr_scheduler_type="constant",
            per_device_train_batch_size=samples, steps_per_generation=1,
            num_generations=recipe.generations, max_completion_length=recipe.completion_tokens, beta=0.0,
            temperature=1.0, logging_steps=1, save_steps=save_steps, **QUIET,
        )  # fmt: skip
        data = tasks(
            recipe.corpus, RLVR_DATA + recipe.seed, recipe.steps * recipe.prompts, "#" if recipe.forced else ""
        )
        trainer = GRPOTrainer(model, right_line, args, data, processing_class=tokenizer)
        seconds = resume(trainer, folder / "run")
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        return {"accuracy": rewards, "seconds": seconds}

    return store.get(recipe, work)


def curve(store: Store, recipe: RlvrRecipe) -> Curve:
    found = reinforce(store, recipe)["accuracy"]
    assert len(found) == recipe.steps and all(map(math.isfinite, found))
    return Curve(tuple(found), recipe.prompts * recipe.generations)
