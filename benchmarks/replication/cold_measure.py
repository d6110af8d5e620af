"""What a checkpoint writes behind held-out programs of MBPP, and what its thoughts there are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ra3_trl import Policy
from ra3_trl.losses import compute_returns
from ra3_trl.policy.annotators import as_latent, boundary_lines
from ra3_trl.records import Latent

from ..common import load
from ..traces import ASSERTION
from .assertion import is_right
from .cold_data import ColdTask, cold_tasks
from .store import Store


SAMPLES = 8
_ANSWER_TOKENS = 24
_AT_ONCE = 32
_LENGTH = 448
_PAYS = 0.5  # nats


@dataclass(frozen=True)
class ColdMeasureRecipe:
    """What is measured, on the test split's functions, the same for all arms and seeds. `start`: name of the stage's
    entry in the store, `None` for the checkpoint `model` itself."""

    start: str | None = None
    tasks: int = 64
    draws: int = 2
    bounds: int = 16
    max_latent_length: int = 64
    model: str | None = None
    mbpp: str | None = None
    version: int = 2  # 1: without gains elsewhere


@dataclass(frozen=True)
class ColdMeasures:
    """A checkpoint on held-out programs, one for each function that has a trace. Shares are of all programs, greedy.

    Args:
        right, told_to_think, told_not_to (`float`):
            Assertions right: left to itself, with `#` forced, with the assertion forced.
        told_the_trace (`float`):
            Assertions right behind the true trace.
        thinks, comment_right (`float`):
            Programs that go on with a comment, and, told to think, with exactly the true trace.
        gain, gain_of_trace (`float`):
            Nats that a comment of its own, drawn at temperature 1, and the true trace bring to the assertion.
        gain_elsewhere (`float`):
            Nats that a comment of its own brings to another line, of two in each program.
        best_pays (`float`):
            Share of the assertions to which the best of its comments brings more than half a nat.
        think_there, think_elsewhere (`float`):
            Mean P(think) before the assertion and before the other lines.
        bound, elbo, ce (`float`):
            Of `Policy.evaluate`, nats per token of code: multi-sample bound and ELBO (negative), cross-entropy.
        samples (`list[dict[str, str]]`):
            What it wrote when told to think, `text` beside the true `trace`.
    """

    right: float
    told_to_think: float
    told_not_to: float
    told_the_trace: float
    thinks: float
    comment_right: float
    gain: float
    gain_of_trace: float
    gain_elsewhere: float
    best_pays: float
    think_there: float
    think_elsewhere: float
    bound: float
    elbo: float
    ce: float
    samples: list[dict[str, str]]


@torch.no_grad()
def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int
) -> list[str]:
    """What the model writes behind each prompt, greedily."""
    found = []
    for begin in range(0, len(prompts), _AT_ONCE):
        part = list(prompts[begin : begin + _AT_ONCE])
        batch = tokenizer(part, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def held_out(recipe: ColdMeasureRecipe) -> list[ColdTask]:
    """The first traced task of each of the test split's functions, as many as are wanted, evenly spaced."""
    firsts: dict[str, ColdTask] = {}
    for task in cold_tasks("test", recipe.mbpp, traced=True, checked=True):
        if task.trace:
            firsts.setdefault(task.prompt.partition("\n\nresult = ")[0], task)
    tasks = list(firsts.values())
    count = min(recipe.tasks, len(tasks))
    return [tasks[i * len(tasks) // count] for i in range(count)]


def thoughts(policy: Policy, tasks: Sequence[ColdTask], draws: int) -> dict[str, float]:
    """What own comments and true traces bring, and P(think); own ones also before two other lines of each program."""
    columns: dict[str, list[float]] = {
        name: [] for name in ("gain", "gain_of_trace", "gain_elsewhere", "best_pays", "think_there", "think_elsewhere")
    }
    data = policy.engine.table.token_bytes
    for i, task in enumerate(tasks):
        document, *more = policy.segment(task.text, i)
        (lines, *_) = boundary_lines(task.text, [document, *more], data)
        boundary = lines.get(task.text.count("\n"))
        if more or boundary is None:
            continue
        others = document.boundaries[: document.boundaries.index(boundary)]  # the assertion is the last line
        others = tuple(others[k * len(others) // 3] for k in (1, 2)) if len(others) > 2 else others
        group = policy.rollout(document, (*others, boundary), draws)
        gates = dict(
            zip(document.boundaries, group.gate_logps_A[list(document.boundaries)].exp().tolist(), strict=True)
        )
        gain_TG = compute_returns(group, 1, 1.0).gain_TG
        columns["gain"].append(float(gain_TG[-1].mean()))
        columns["best_pays"].append(float(gain_TG[-1].max() > _PAYS))
        columns["gain_elsewhere"] += gain_TG[:-1].mean(1).tolist()
        columns["think_there"].append(gates.pop(boundary))
        columns["think_elsewhere"] += gates.values()
        latent = as_latent(policy, task.trace.removeprefix("#"))
        if isinstance(latent, Latent):
            scored = policy.score(document, (boundary,), [[latent]])
            columns["gain_of_trace"].append(float(compute_returns(scored, 1, 1.0).gain_TG))
    return {name: fmean(values) if values else 0.0 for name, values in columns.items()}


def measure(store: Store, recipe: ColdMeasureRecipe, folder: str) -> ColdMeasures:
    """All measures of the checkpoint in `folder`."""
    return ColdMeasures(**store.get(recipe, lambda _: asdict(observe(*load(folder), recipe))))


def observe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: ColdMeasureRecipe) -> ColdMeasures:
    """All measures of a model, where it is."""
    model.eval()
    tasks = held_out(recipe)
    prompts, both = [task.prompt for task in tasks], recipe.max_latent_length + _ANSWER_TOKENS
    free = write(model, tokenizer, prompts, both)
    thought = [f"#{text}" for text in write(model, tokenizer, [f"{p}#" for p in prompts], both)]
    short = [
        f"{ASSERTION}{text}" for text in write(model, tokenizer, [p + ASSERTION for p in prompts], _ANSWER_TOKENS)
    ]
    traced = write(model, tokenizer, [f"{task.prompt}{task.trace}\n" for task in tasks], _ANSWER_TOKENS)
    policy = Policy.open(
        model, tokenizer=tokenizer, use_cpu=model.device.type == "cpu", bf16=True, max_length=_LENGTH,
        eval_num_latents=recipe.draws, max_latent_length=recipe.max_latent_length, eval_max_boundaries=4,
    )  # fmt: skip
    numbers = policy.evaluate([d for i, t in enumerate(tasks[: recipe.bounds]) for d in policy.segment(t.text, i)])

    def share(written: Sequence[str]) -> float:
        return fmean(is_right(text, task.answer) for text, task in zip(written, tasks, strict=True))

    said = [text.split("\n")[0].strip() for text in thought]
    return ColdMeasures(
        right=share(free), told_to_think=share(thought), told_not_to=share(short), told_the_trace=share(traced),
        thinks=fmean(text.startswith("#") for text in free),
        comment_right=fmean(text == task.trace for text, task in zip(said, tasks, strict=True)),
        **thoughts(policy, tasks, recipe.draws),
        bound=numbers["bound_multi"], elbo=numbers["elbo"], ce=numbers["ce"],
        samples=[{"text": text, "trace": t.trace} for text, t in zip(said[:SAMPLES], tasks, strict=False)],
    )  # fmt: skip
