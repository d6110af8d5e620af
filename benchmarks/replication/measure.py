"""What a checkpoint does on held-out programs: where it thinks, what it says, how likely it finds the code."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PrinterCallback

from ra3_trl.experimental.hindsight import HindsightTrainer
from ra3_trl.testbed import complete, examples, observe, programs, think_probs
from ra3_trl.testbed.corpus import boundaries, comments_before, fillings, is_hard

from .mid import config, load, model_folder
from .records import FillRecipe, Fills, LatentUse, MeasureRecipe, Measures, MidRecipe, UseRecipe
from .store import Store


def measure(store: Store, recipe: MeasureRecipe) -> Measures:
    """All measures of a checkpoint, which is trained if it is not there."""

    def work(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(model_folder(store, recipe.start))
        model.eval()
        seen = observe(model, tokenizer, recipe.corpus, recipe.seed, recipe.programs, recipe.tasks)
        found = Measures(
            seen.think_hard,
            seen.think_easy,
            seen.comments,
            **bounds(model, tokenizer, recipe),
            accuracy=seen.right["auto"],
            accuracy_forced=seen.right["always"],
            accuracy_never=seen.right["never"],
        )
        return asdict(found)

    return Measures(**store.get(recipe, work))


@torch.no_grad()
def text_logp(model, tokenizer, context: str, text: str) -> float:
    """Log-probability of `text` behind `context`, which end and begin with whole tokens."""
    begin = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + text, return_tensors="pt")["input_ids"]
    logps = model(input_ids=ids).logits[0, begin - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, ids[0, begin:, None]).sum())


def fills(store: Store, recipe: FillRecipe) -> Fills:
    """What a checkpoint fills in, and what its policy makes of the right comment."""

    def work(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(model_folder(store, recipe.start))
        model.eval()
        prompts, comments = zip(*fillings(recipe.corpus, recipe.seed, recipe.tasks), strict=True)
        said = complete(model, tokenizer, list(prompts), None, recipe.seed)
        logps, gains = [], []
        for case in examples(recipe.corpus, recipe.seed + 1, recipe.tasks):
            thought, lines = f"{case.comment}\n", f"{case.answer}\n"
            logps.append(text_logp(model, tokenizer, case.prompt + thought[0], thought[1:]))
            without = text_logp(model, tokenizer, case.prompt, lines)
            gains.append(text_logp(model, tokenizer, case.prompt + thought, lines) - without)
        right = fmean(text.split("\n")[0] == comment for text, comment in zip(said, comments, strict=True))
        return asdict(Fills(right, fmean(logps), fmean(gains)))

    return Fills(**store.get(recipe, work))


def bounds(model, tokenizer, recipe: MeasureRecipe) -> dict[str, float]:
    """Cross-entropy and negative bounds by `trainer.evaluate()`, horizon 1."""
    found = evaluated(model, tokenizer, recipe, horizon=1, eval_num_latents=recipe.num_latents)
    return {name: found[f"eval_{name}"] for name in ("ce", "elbo", "bound_multi")}


def evaluated(model, tokenizer, recipe: MeasureRecipe | UseRecipe, horizon: int, **settings) -> dict[str, float]:
    """`trainer.evaluate()` on the recipe's programs."""
    base = recipe.start.base if isinstance(recipe.start, MidRecipe) else recipe.start
    with TemporaryDirectory() as folder:
        args = config(MidRecipe(base, recipe.seed, horizon=horizon), Path(folder), **settings)
        held_out = programs(recipe.corpus, recipe.seed, recipe.programs)
        trainer = HindsightTrainer(model, args, None, held_out, tokenizer)
        trainer.remove_callback(PrinterCallback)
        return trainer.evaluate()


def latent_use(store: Store, recipe: UseRecipe) -> LatentUse:
    """How a checkpoint uses latents; it is trained if it is not there."""
    hard = recipe.corpus.hard_lines

    def work(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(model_folder(store, recipe.start))
        model.eval()
        texts = list(programs(recipe.corpus, recipe.seed, recipe.programs)["text"])
        probs = [prob for line, prob in think_probs(model, tokenizer, texts) if is_hard(line)]
        prompts = [case.prompt for case in examples(recipe.corpus, recipe.seed + 1, recipe.tasks)]
        said = complete(model, tokenizer, prompts, "auto", recipe.seed, hard)
        comments = [comment for text in said for comment in comments_before(text, hard)]
        found = evaluated(model, tokenizer, recipe, horizon=recipe.horizon, eval_num_latents=1)
        return {
            **{name: fmean(probs[k::hard]) for k, name in enumerate(("think_first", "think_second", "think_third"))},
            "ce_policy": found["eval_ce_policy"],
            "program_latents": found["eval_policy_latent_rate"] * boundaries(recipe.corpus),
            "task_latents": len(comments) / recipe.tasks,
            "task_latent_tokens": sum(len(comment) + 1 for comment in comments) / recipe.tasks,
        }

    return LatentUse(**store.get(recipe, work))
