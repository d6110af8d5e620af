"""RL post-training by TRL's `GRPOTrainer`: how soon and how far a checkpoint learns to state the last line right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from ra3_trl.testbed.corpus import right_line, tasks

from .. import common
from . import traces
from .assertion import assertion_reward
from .base import QUIET, resume
from .mid import load, model_folder
from .real import checkpoint
from .records import Curve, PreparedRecipe, RlvrRecipe, TraceCorpus, TraceMidRecipe
from .store import Store


RLVR_DATA = 20_000  # as `CAREFUL_DATA`
_ROWS = 16  # most of a pass


@dataclass(frozen=True)
class TraceRlvrRecipe:
    """GRPO from a real checkpoint on programs whose assertion it is to write; `forced` puts `#` behind each prompt."""

    start: PreparedRecipe | TraceMidRecipe
    seed: int
    forced: bool = False
    steps: int = 20
    prompts: int = 8
    generations: int = 8
    learning_rate: float = 2e-5
    completion_tokens: int = 44
    corpus: TraceCorpus = field(default_factory=TraceCorpus)
    version: int = 1


class Reinforced(Protocol):
    """What any recipe of GRPO sets."""

    @property
    def seed(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def prompts(self) -> int: ...
    @property
    def generations(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def completion_tokens(self) -> int: ...


def reinforce(store: Store, recipe: RlvrRecipe, save_steps: int = 10) -> dict[str, Any]:
    """`accuracy` before each update (of the samples that the update learns from) and `seconds` of the last sitting."""

    def work(folder: Path) -> dict[str, Any]:
        start = load(model_folder(store, recipe.start))
        opening = "#" if recipe.forced else ""
        data = tasks(recipe.corpus, RLVR_DATA + recipe.seed, recipe.steps * recipe.prompts, opening)
        return _learned(start, recipe, data, right_line, folder, save_steps=save_steps)

    return store.get(recipe, work)


def reinforce_traces(store: Store, recipe: TraceRlvrRecipe, save_steps: int = 4) -> dict[str, Any]:
    """As [`reinforce`], from a real checkpoint, in bfloat16; rewarded by the sandbox's verdict."""

    def work(folder: Path) -> dict[str, Any]:
        start, samples = common.load(str(checkpoint(store, recipe.start))), recipe.prompts * recipe.generations
        # All are drawn together and learned from in passes, whose logits are large.
        rows = math.gcd(samples, _ROWS)
        passes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": samples // rows}
        settings = {"steps_per_generation": samples // rows, "save_steps": save_steps, "bf16": True}
        return _learned(start, recipe, trace_prompts(recipe), assertion_reward, folder, **passes, **settings)

    return store.get(recipe, work)


def trace_prompts(recipe: TraceRlvrRecipe) -> Dataset:
    """Programs up to their assertion, other ones than those of any training; columns as [`assertion_reward`] reads."""
    asked = traces.tasks(RLVR_DATA + recipe.seed, recipe.steps * recipe.prompts, recipe.corpus)
    opening = "#" if recipe.forced else ""
    rows = [{"prompt": one.prompt + opening, "program": one.prompt, "opening": opening} for one in asked]
    return Dataset.from_list(rows)


def _learned(
    start: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    recipe: Reinforced,
    data: Dataset,
    reward: Callable[..., Any],
    folder: Path,
    **settings: Any,
) -> dict[str, Any]:
    model, tokenizer = start
    samples = recipe.prompts * recipe.generations
    batch = {"per_device_train_batch_size": samples, "steps_per_generation": 1}
    args = GRPOConfig(
        output_dir=str(folder / "run"), seed=recipe.seed, max_steps=recipe.steps,
        learning_rate=recipe.learning_rate, lr_scheduler_type="constant",
        num_generations=recipe.generations, max_completion_length=recipe.completion_tokens, beta=0.0,
        temperature=1.0, logging_steps=1, **QUIET | batch | settings,
    )  # fmt: skip
    trainer = GRPOTrainer(model, reward, args, data, processing_class=tokenizer)
    seconds = resume(trainer, folder / "run")
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {"accuracy": rewards, "seconds": seconds}


def curve(store: Store, recipe: RlvrRecipe | TraceRlvrRecipe) -> Curve:
    of_run = reinforce(store, recipe) if isinstance(recipe, RlvrRecipe) else reinforce_traces(store, recipe)
    found = of_run["accuracy"]
    assert len(found) == recipe.steps and all(map(math.isfinite, found))
    return Curve(tuple(found), recipe.prompts * recipe.generations)
