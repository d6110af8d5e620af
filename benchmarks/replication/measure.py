"""What a checkpoint does on held-out programs: where it thinks, what it says, how likely it finds the code."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PrinterCallback

from ra3_trl import RA3MidTrainer, ThinkLogitsProcessor

from .mid import MAX_LATENT, config, load, model_folder
from .records import MeasureRecipe, Measures, MidRecipe
from .store import Store
from .testbed import examples, first_line, is_hard, programs


_NEW_TOKENS = MAX_LATENT + 8  # a comment with `#` and newline, and `assert c==5`
_SITES_AT_ONCE = 64


@torch.no_grad()
def gates(model, tokenizer, texts: list[str]) -> tuple[float, float]:
    """Mean probability of the think prefix (one token here) before hard and before easy lines."""
    hard, easy = [], []
    think, newline = tokenizer.convert_tokens_to_ids(["#", "\n"])
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        probs = model(input_ids=ids).logits[0].softmax(-1)[:, think]
        lines = text.splitlines()
        ends = (ids[0] == newline).nonzero().flatten().tolist()[:-1]  # nothing follows the last
        for end, following in zip(ends, lines[1:], strict=True):
            (hard if is_hard(following) else easy).append(float(probs[end]))
    return fmean(hard), fmean(easy)


@torch.no_grad()
def complete(model, tokenizer, prompts: list[str], think: str, seed: int) -> list[str]:
    """A sampled completion of each prompt, temperature 1, with `think` as in [`ThinkLogitsProcessor`]."""
    torch.manual_seed(seed)
    found = []
    for begin in range(0, len(prompts), _SITES_AT_ONCE):
        batch = tokenizer(
            prompts[begin : begin + _SITES_AT_ONCE], return_tensors="pt", padding=True, padding_side="left"
        )
        knob = ThinkLogitsProcessor(tokenizer, think, max_latent_length=MAX_LATENT)
        out = model.generate(
            **batch, max_new_tokens=_NEW_TOKENS, do_sample=True, top_k=0, logits_processor=[knob],
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def measure(store: Store, recipe: MeasureRecipe) -> Measures:
    """All measures of a checkpoint, which is trained if it is not there."""

    def work(folder: Path) -> dict[str, Any]:
        model, tokenizer = load(model_folder(store, recipe.start))
        model.eval()
        texts = list(programs(recipe.corpus, recipe.seed, recipe.programs)["text"])
        cases = list(examples(recipe.corpus, recipe.seed + 1, recipe.tasks))
        prompts, answers = [case.prompt for case in cases], [case.answer for case in cases]
        said = {
            think: complete(model, tokenizer, prompts, think, recipe.seed) for think in ("auto", "always", "never")
        }
        right = {k: fmean(first_line(t) == a for t, a in zip(v, answers, strict=True)) for k, v in said.items()}
        comments = [text.split("\n")[0] for text in said["always"]]
        hard, easy = gates(model, tokenizer, texts)
        found = Measures(
            hard,
            easy,
            fmean(comment == case.comment for comment, case in zip(comments, cases, strict=True)),
            **bounds(model, tokenizer, recipe),
            accuracy=right["auto"],
            accuracy_forced=right["always"],
            accuracy_never=right["never"],
        )
        return asdict(found)

    return Measures(**store.get(recipe, work))


def bounds(model, tokenizer, recipe: MeasureRecipe) -> dict[str, float]:
    """Cross-entropy and negative bounds by `trainer.evaluate()`, horizon 1."""
    base = recipe.start.base if isinstance(recipe.start, MidRecipe) else recipe.start
    with TemporaryDirectory() as folder:
        args = config(MidRecipe(base, recipe.seed, horizon=1), Path(folder), eval_num_latents=recipe.num_latents)
        held_out = programs(recipe.corpus, recipe.seed, recipe.programs)
        trainer = RA3MidTrainer(model, args, None, held_out, tokenizer)
        trainer.remove_callback(PrinterCallback)
        found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in ("ce", "elbo", "bound_multi")}
