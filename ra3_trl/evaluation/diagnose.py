"""A checkpoint on a corpus by the theory's own measures: horizon, compactness, pruning, what latents earn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ..analysis import Alternatives, effective_horizon, effective_numbers, measure_pruning
from ..em import annotate
from ..generation import AutoModelForCausalLMWithAbstractionHead, CompletionSettings, draw_completions
from ..losses import compute_returns, renormalise
from ..records import Action, AnnotatedExample, Document, Latent, RolloutGroup
from ..rollout import NoiseKey
from ..segmentation import readable_bytes


_PHASE = 2  # of the noise: neither training's nor that of `evaluate()`
_BY_LINE = ("python", "slashes")  # formats whose actions end with a line


def diagnose(
    trainer,
    documents: Sequence[Document],
    boundaries: int = 32,
    lines: int = 16,
    line_tokens: int = 48,
    factor: float = 10.0,
    gamma: float = 0.98,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Measures of a checkpoint.

    Args:
        trainer ([`RA3MidTrainer`]):
            The checkpoint and its settings: `num_latents`, `horizon`, `discount`, `seed`, the format.
        documents (`Sequence[Document]`):
            The corpus, cut.
        boundaries (`int`, *optional*, defaults to `32`):
            Boundaries, drawn from all, at which pruning is measured.
        lines (`int`, *optional*, defaults to `16`):
            Next lines drawn at each.
        line_tokens (`int`, *optional*, defaults to `48`):
            Longest of these; longer ones are left out and counted.
        factor (`float`, *optional*, defaults to `10.0`):
            See [`~analysis.Pruning`].
        gamma (`float`, *optional*, defaults to `0.98`):
            Discount of a line in the RL to come; it need not be the E-step's.
        progress (`Callable`, *optional*):
            Told of every document and boundary done.

    Returns:
        `dict`: `horizon`, `compactness`, `pruning` (`None` where actions are not lines) and `economics`, see
        docs/diagnose.md.

    Raises:
        `ValueError`: if no document has a boundary.
    """
    documents = [document for document in documents if document.boundaries]
    if not documents:
        raise ValueError("the corpus has no boundary; give text of the action format, or another `action_format`.")
    args, noise = trainer.args, NoiseKey(trainer.args.seed, _PHASE, 0)
    examples, groups = [], []
    with torch.no_grad(), trainer._evaluating(), trainer.compute_loss_context_manager(), trainer.backbone.gathered():
        for document in documents:
            examples.append(annotate(trainer.engine, document, args, noise, "policy"))
            groups.append(trainer.engine.rollout(document, document.boundaries, args.num_latents, args.horizon, noise))
            progress(1)
        places = [(group, boundary) for group in groups for boundary in group.boundaries]
        chosen = np.random.default_rng(args.seed).permutation(len(places))[:boundaries]
        drawn = _Lines(trainer, lines, line_tokens)
        found = []
        for at in sorted(chosen) if args.action_format.startswith(_BY_LINE) else ():
            other, elsewhere = places[at - 1]  # any but this; of the first it is the last
            found.append(_alternatives(trainer, *places[at], other.latents[other.boundaries.index(elsewhere)], drawn))
            progress(1)
    pruning = measure_pruning([one for one in found if one is not None], factor)
    return {
        "horizon": asdict(effective_horizon([_starts(example) for example in examples], gamma)) | {"gamma": gamma},
        "compactness": _compactness(groups, args.seed),
        "pruning": None if pruning is None else asdict(pruning) | {"left_out": drawn.left_out},
        "economics": _economics(groups, args),
    }


def _starts(example: AnnotatedExample) -> tuple[int, list[int]]:
    """Lines of a document that are no comments, and those before which latents stand."""
    number, at = 0, {}
    for position, action in enumerate(example.document.actions):
        at[position] = number
        number += not action.comment
    return number, [at[position] for position in sorted(example.placed)]


def _compactness(groups: Sequence[RolloutGroup], seed: int) -> dict[str, Any]:
    """Latents, expert lines and expert tokens at the same boundaries; and per decision, given its state."""
    latents, texts, tokens, prices, surprises = [], [], [], [], []
    for group in groups:
        ids, actions = group.document.input_ids, group.document.actions
        lines_A = renormalise(group.line_logps_A, group.gate_logps_A)
        for t, boundary in enumerate(group.boundaries):
            line = ids[actions[boundary].start : actions[boundary].end]
            texts.append(line)
            tokens += line
            surprises.append(-float(lines_A[boundary]))
            latents.append(group.latents[t][0].token_ids)  # one a boundary, as many as lines
            prices += [-sum(latent.logps) for latent in group.latents[t]]
    found: dict[str, Any] = effective_numbers({"latents": latents, "lines": texts, "tokens": tokens}, seed)
    found["latents"]["given_state"] = fmean(prices)
    found["lines"]["given_state"] = fmean(surprises)
    return found


def _economics(groups: Sequence[RolloutGroup], args) -> dict[str, float]:
    """What latents bring and cost, wherever they may stand and where the gate would have them."""
    gains, lengths, prices, weights, thinking = [], [], [], [], []
    for group in groups:
        gain_TG = compute_returns(group, args.horizon, args.discount, args.line_reduction).gain_TG
        probs = group.decision_logps_A[list(group.boundaries)].exp().tolist()
        thinking += probs
        for t, row in enumerate(group.latents):
            gains += gain_TG[t].tolist()
            lengths += [len(latent.token_ids) for latent in row]
            prices += [-sum(latent.logps) for latent in row]
            weights += [probs[t] / len(row)] * len(row)
    total = sum(weights)
    weighed = sum(w * g for w, g in zip(weights, gains, strict=True))
    return {
        "think_rate": fmean(thinking),
        "gain": fmean(gains),
        "helps": fmean(gain > 0 for gain in gains),
        "latent_tokens": fmean(lengths),
        "gain_per_token": sum(gains) / max(sum(lengths), 1),
        "gain_where_it_thinks": weighed / total if total else 0.0,
        "gain_per_token_where_it_thinks": (
            weighed / spent if (spent := sum(w * n for w, n in zip(weights, lengths, strict=True))) else 0.0
        ),
        "price": fmean(prices),
        "latents": len(gains),
    }


class _Lines:
    """Draws next lines of pi(. | s, act): what begins a latent is drawn again by leaving it out."""

    def __init__(self, trainer, count: int, most: int):
        self.data = readable_bytes(trainer.processing_class, trainer.segmenter.format)
        self.marker = trainer.segmenter.format.think.strip().encode()
        self.model = AutoModelForCausalLMWithAbstractionHead(trainer.backbone.causal_lm)
        self.tokenizer = trainer.processing_class
        self.settings = CompletionSettings(count, temperature=1.0, max_new_tokens=most)
        self.seed, self.left_out = trainer.args.seed, 0

    def __call__(self, document: Document, boundary: int) -> list[tuple[int, ...]]:
        prefix = document.input_ids[: document.actions[boundary].start]
        with torch.random.fork_rng():
            torch.manual_seed(hash((self.seed, document.doc_id, document.chunk, boundary)) % 2**32)
            (found,) = draw_completions(self.model, [prefix], self.settings, self.tokenizer)
        think = document.actions[boundary].boundary.think
        whole = [self._line(completion.token_ids, think) for completion in found]
        kept = [line for line in whole if line]
        self.left_out += sum(line is None for line in whole)
        return kept

    def _line(self, ids: Sequence[int], think: Sequence[int]) -> tuple[int, ...] | None:
        """Up to the token that ends the first line with something in it; `()` for a latent, `None` without an end."""
        text = b""
        if tuple(ids[: len(think)]) == tuple(think):
            return ()
        for i, token in enumerate(ids):
            text += self.data[token] or b""
            begun = text.lstrip()
            if self.marker and begun.startswith(self.marker):
                return ()
            if b"\n" in begun:
                return tuple(ids[: i + 1])
        return None


def _alternatives(
    trainer, group: RolloutGroup, boundary: int, others: Sequence[Latent], drawn: _Lines
) -> Alternatives | None:
    """Lines of pi(. | s) in the expert's place, without a latent, with those that were drawn there, with `others`."""
    document, t = group.document, group.boundaries.index(boundary)
    action = document.actions[boundary]
    act_K, latent_KG = [], []
    latents = (*group.latents[t], *others)
    for line in drawn(document, boundary):
        start, end = action.start, action.start + len(line)
        actions = (*document.actions[:boundary], Action(action.index, start, end, action.boundary))
        other = replace(document, input_ids=(*document.input_ids[:start], *line), actions=actions)
        scored = trainer.engine.score(other, (boundary,), (latents,), 1)
        act_K.append(renormalise(scored.line_logps_A, scored.gate_logps_A)[boundary])
        latent_KG.append(renormalise(scored.latent_line_logps_TGH, scored.latent_gate_logps_TGH)[0, :, 0])
    if not act_K:
        return None
    expert = renormalise(group.line_logps_A, group.gate_logps_A)[boundary]
    expert_G = renormalise(group.latent_line_logps_TGH, group.latent_gate_logps_TGH)[t, :, 0]
    under_GK = torch.stack(latent_KG, 1)
    here = group.num_latents
    return Alternatives(torch.stack(act_K), under_GK[:here], under_GK[here:], float(expert), expert_G)
