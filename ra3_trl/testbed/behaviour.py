"""What a model does on the testbed's programs: where it thinks, and what it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import torch

from ..generation import ThinkLogitsProcessor
from .corpus import Corpus, Example, examples, is_hard, is_right, programs


MAX_LATENT = 16  # `7*4=8+9=7-2=5` has 13 tokens
_NEW_TOKENS = MAX_LATENT + 8  # for each hard line: a comment with `#` and newline, and `assert c==5`
_BOUNDARIES_AT_ONCE = 64


@dataclass(frozen=True)
class Behaviour:
    """A model on held-out programs.

    Args:
        think_hard, think_easy (`float`):
            Mean P(think) before hard and before easy lines.
        comments (`float`):
            Share of comments, forced before hard lines and sampled, whose steps are all right.
        right (`dict[str, float]`):
            Share of hard lines that are right when sampled, by the think knob: `"never"`, `"auto"`, `"always"`.
        written (`dict[str, list[str]]`):
            What the model went on with, by the think knob, for each of `cases`.
    """

    think_hard: float
    think_easy: float
    comments: float
    right: dict[str, float]
    written: dict[str, list[str]]
    cases: list[Example]


@torch.no_grad()
def think_probs(model, tokenizer, texts: list[str]) -> Iterator[tuple[str, float]]:
    """Each line but a text's first, and the probability of the think prefix (one token here) before it."""
    think, newline = tokenizer.convert_tokens_to_ids(["#", "\n"])
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        probs = model(input_ids=ids).logits[0].softmax(-1)[:, think]
        lines = text.splitlines()
        ends = (ids[0] == newline).nonzero().flatten().tolist()[:-1]  # nothing follows the last
        yield from zip(lines[1:], probs[ends].tolist(), strict=True)


def gates(model, tokenizer, texts: list[str]) -> tuple[float, float]:
    """Mean probability of the think prefix before hard and before easy lines."""
    hard, easy = [], []
    for line, prob in think_probs(model, tokenizer, texts):
        (hard if is_hard(line) else easy).append(prob)
    return fmean(hard), fmean(easy)


@torch.no_grad()
def complete(model, tokenizer, prompts: list[str], think: str | None, seed: int, lines: int = 1) -> list[str]:
    """A sampled completion of each prompt with tokens for so many hard lines, temperature 1, with `think` as in
    [`ThinkLogitsProcessor`], or nothing of the kind."""
    torch.manual_seed(seed)
    found = []
    for begin in range(0, len(prompts), _BOUNDARIES_AT_ONCE):
        batch = tokenizer(
            prompts[begin : begin + _BOUNDARIES_AT_ONCE], return_tensors="pt", padding=True, padding_side="left"
        )
        knobs = [ThinkLogitsProcessor(tokenizer, think, max_latent_length=MAX_LATENT)] if think else []
        out = model.generate(
            **batch, max_new_tokens=lines * _NEW_TOKENS, do_sample=True, top_k=0, logits_processor=knobs,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def observe(model, tokenizer, corpus: Corpus, seed: int, texts: int, tasks: int) -> Behaviour:
    """Looks at what a model does on so many programs and tasks of a corpus; both follow from the seed."""
    cases = list(examples(corpus, seed + 1, tasks))
    prompts, answers = [case.prompt for case in cases], [case.answer for case in cases]
    written = {
        think: complete(model, tokenizer, prompts, think, seed, corpus.hard_lines)
        for think in ("auto", "always", "never")
    }
    right = {think: fmean(map(is_right, said, answers)) for think, said in written.items()}
    comments = [text.split("\n")[0] for text in written["always"]]
    hard, easy = gates(model, tokenizer, list(programs(corpus, seed, texts)["text"]))
    right_comments = fmean(comment == case.comment for comment, case in zip(comments, cases, strict=True))
    return Behaviour(hard, easy, right_comments, right, written, cases)
