"""Bases: tiny Llamas pre-trained from scratch on the commented corpus, by `transformers.Trainer`.

A base counts if it can calculate at all: `comment_right` of at least `GATE`. That comes late and the loss does not
show it (few tokens are results of steps), so it is measured; every base that was tried is told of.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, Trainer

from ra3_trl.testbed import fresh_model, make_tokenizer, pretraining, programs
from ra3_trl.versions import CHECKPOINTING

from .records import BaseRecipe
from .store import Store


GATE = 0.4
CAREFUL_DATA = 30_000  # added to the seed, so that no phase sees the programs of another
QUIET = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    "save_total_limit": 1, CHECKPOINTING: False,
}  # fmt: skip


def first_model(store: Store, recipe: BaseRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """What pre-training begins with: random weights, or another base's with rows for the tokens that it lacks."""
    if recipe.start is None:
        shape = {"rope_theta": recipe.rope_theta, "initializer_range": recipe.initializer_range}
        return fresh_model(tokenizer, recipe.seed, recipe.layers, recipe.width, **shape)
    pretrain(store, recipe.start)
    model = LlamaForCausalLM.from_pretrained(store.folder(recipe.start) / "model")
    torch.manual_seed(recipe.seed)
    model.resize_token_embeddings(len(tokenizer))
    return model


def last_checkpoint(folder: Path) -> str | None:
    """The last whole one: `Trainer` writes in place, its state last of all, so that a kill may leave a part."""
    steps = [int(path.parent.name.split("-")[-1]) for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(folder / f"checkpoint-{max(steps)}") if steps else None


def resume(trainer: Trainer, folder: Path) -> float:
    """Trains to the end, from the folder's last checkpoint if there is one; CPU seconds of this part of the run."""
    begin = time.process_time()
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return time.process_time() - begin


def pretrain(store: Store, recipe: BaseRecipe, save_steps: int = 250) -> dict[str, Any]:
    """`seconds` of the last sitting and the `losses` of 50 steps each; the checkpoint is in the folder `model`."""

    def work(folder: Path) -> dict[str, Any]:
        tokenizer = make_tokenizer(recipe.corpus)
        rest = (recipe.steps - recipe.careful_steps) * recipe.batch_size
        careful = programs(recipe.careful, CAREFUL_DATA + recipe.seed, recipe.careful_steps * recipe.batch_size)
        data = concatenate_datasets([careful, programs(recipe.corpus, recipe.seed, rest)])
        trainer = pretraining(
            first_model(store, recipe, tokenizer), tokenizer, data, folder / "run",
            max_steps=recipe.steps, per_device_train_batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps, seed=recipe.seed, save_steps=save_steps, logging_steps=50, **QUIET,
        )  # fmt: skip
        seconds = resume(trainer, folder / "run")
        trainer.save_model(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"seconds": seconds, "losses": losses}

    return store.get(recipe, work)
