"""What a real checkpoint writes behind held-out programs: its comment, and the assertion."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ra3_trl import Policy
from ra3_trl.analysis import shares

from ..common import load
from .assertion import is_right
from .real import checkpoint
from .records import TraceMeasureRecipe, TraceMeasures, TraceTask
from .store import Store
from .traces import ASSERTION, answer, tasks


COMMENT_TOKENS, TOKENS = 26, 44  # of a comment about integers, and of one with the assertion
SAMPLES = 8
_AT_ONCE = 50


@dataclass(frozen=True)
class Solved:
    """What was written behind a program: `# x = 3, y = 7, x = 6`, newline, `assert result == 6`."""

    right: bool
    thinks: bool
    comment_right: bool


def judged(text: str, asked: TraceTask) -> Solved:
    """Judges what was written: by the first assertion in it, and by its first line."""
    first = text.split("\n")[0]
    return Solved(is_right(text, repr(asked.value)), first.startswith("#"), first.strip() == asked.trace)


@torch.no_grad()
def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[TraceTask],
    opening: str = "",
    tokens: int | None = None,
    device: str = "cpu",
) -> list[Solved]:
    """What the model writes behind each program by itself, greedily; `opening` is put there first, as its own."""
    found = []
    for begin in range(0, len(asked), _AT_ONCE):
        part = asked[begin : begin + _AT_ONCE]
        batch = tokenizer(
            [one.prompt + opening for one in part], return_tensors="pt", padding=True, padding_side="left"
        ).to(device)
        with torch.autocast(device, torch.bfloat16):
            out = model.generate(
                **batch, max_new_tokens=tokens or TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [judged(opening + text, one) for text, one in zip(said, part, strict=True)]
    return found


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[TraceTask],
    draws: int,
    tokens: int | None = None,
    device: str = "cpu",
) -> list[list[str]]:
    """Comments behind each program, `draws` of them at temperature 1, whether the model would think there or not."""
    torch.manual_seed(0)
    found = []
    for one in asked:
        batch = tokenizer([f"{one.prompt}#"] * draws, return_tensors="pt").to(device)
        out = model.generate(
            **batch, max_new_tokens=tokens or COMMENT_TOKENS, do_sample=True, top_k=0, temperature=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append([f"#{text}".split("\n")[0].strip() for text in said])
    return found


def variety(comments: list[list[str]], asked: list[TraceTask]) -> dict[str, Any]:
    """Of the comments drawn behind programs: how many are different, right, and the same; the first of some."""
    counts = Counter(comment for row in comments for comment in row)
    distinct, most, share = shares(counts)
    right = [comment == one.trace for row, one in zip(comments, asked, strict=True) for comment in row]
    pairs = list(zip(comments, asked, strict=True))[:SAMPLES]
    return {
        "distinct": distinct,
        "drawn_right": fmean(right),
        "most_frequent": {"text": most, "share": share},
        "samples": [{"text": row[0], "trace": one.trace} for row, one in pairs],
    }


def gates(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[TraceTask]) -> tuple[float, float]:
    """Mean P(think), of the think prefix's tokens, before the assertions and before the other lines but the first."""
    policy = Policy.open(model, tokenizer=tokenizer, use_cpu=model.device.type == "cpu", bf16=True)
    there, elsewhere = [], []
    with policy.inference():
        for i, one in enumerate(asked):
            (document,) = policy.segment(f"{one.prompt}{answer(one)}\n", i)
            *others, last = policy.engine.trunk(document).gate_logps_A[list(document.boundaries)].exp().tolist()
            elsewhere += others
            there.append(last)
    return fmean(there), fmean(elsewhere)


def measure(store: Store, recipe: TraceMeasureRecipe) -> TraceMeasures:
    """All measures of a checkpoint, which is trained if it is not there."""

    def work(folder: Path) -> dict[str, Any]:
        return asdict(observe(*load(str(checkpoint(store, recipe.start))), recipe))

    return TraceMeasures(**store.get(recipe, work))


def observe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: TraceMeasureRecipe) -> TraceMeasures:
    """All measures of a model, where it is."""
    model.eval()
    asked = tasks(recipe.task_seed, recipe.tasks, recipe.corpus)
    others = tasks(recipe.drawn_seed, recipe.drawn, recipe.corpus)
    device = model.device.type
    written = {
        opening: solve(model, tokenizer, asked, opening, recipe.tokens, device) for opening in ("", "#", ASSERTION)
    }
    free = written[""]
    drawn = variety(draw(model, tokenizer, others, recipe.draws, recipe.comment_tokens, device), others)
    there, elsewhere = gates(model, tokenizer, asked)
    return TraceMeasures(
        right=fmean(one.right for one in free),
        thinks=fmean(one.thinks for one in free),
        comment_right=fmean(one.comment_right for one in free),
        told_to_think=fmean(one.right for one in written["#"]),
        told_not_to=fmean(one.right for one in written[ASSERTION]),
        think_there=there,
        think_elsewhere=elsewhere,
        **drawn,
    )
