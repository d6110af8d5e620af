"""A checkpoint on a corpus by the theory's own measures: horizon, compactness, pruning, what latents earn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ..analysis import Alternatives, effective_horizon, effective_numbers, measure_pruning, shares
from ..config import RA3Config
from ..generation import AutoModelForCausalLMWithAbstractionHead, CompletionSettings, draw_completions
from ..losses import compute_returns, renormalise
from ..policy import Policy, annotate, first_latent, gains_over_other, token_text
from ..records import Action, AnnotatedExample, Document, Latent, RolloutGroup
from ..rollout import NoiseKey
from ..segmentation import readable_bytes
from .thoughts import Kept, advice, compare_thoughts


_PHASE = 2  # of the noise: neither training's nor that of `evaluate()`
_BY_LINE = ("python", "slashes")  # formats whose actions end with a line


def _setting(text: str, default: float) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DiagnosisSettings:
    """How the measures are taken.

    Raises:
        `ValueError`: for a number out of range.
    """

    boundaries: int = _setting("Boundaries, drawn from all, at which pruning is measured.", 32)
    lines: int = _setting("Next lines drawn at each.", 16)
    line_tokens: int = _setting("Longest of these in tokens; longer ones are left out and counted.", 48)
    factor: float = _setting("How much less likely a line must become to be ruled out.", 10.0)
    gamma: float = _setting("Discount of a line in the RL to come; it need not be the E-step's.", 0.98)

    def __post_init__(self):
        for name in ("boundaries", "lines", "line_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1.")
        if not 0 < self.gamma < 1:
            raise ValueError(f"`gamma` is {self.gamma}; it must be above 0 and below 1.")
        if not self.factor > 1:
            raise ValueError(f"`factor` is {self.factor}; it must be above 1.")


def diagnose(
    policy: Policy,
    documents: Sequence[Document],
    settings: DiagnosisSettings | None = None,
    progress: Callable[[int], Any] = lambda done: None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Measures a checkpoint on a corpus.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            The checkpoint, and its settings for latents.
        documents (`Sequence[Document]`):
            The corpus, cut.
        settings ([`DiagnosisSettings`], *optional*):
            How the measures are taken.
        progress (`Callable`, *optional*):
            Told of every document and boundary done.
        kept (`Mapping[tuple[int, int], Collection[int]]`, *optional*):
            By document and chunk the boundaries before which the model was shown a thought, of [`kept_boundaries`].

    Returns:
        `dict`: `horizon`, `compactness`, `pruning` (`None` where actions are not lines), `economics`, `thoughts`
        (`None` without `kept`) and `advice`, see docs/diagnose.md.

    Raises:
        `ValueError`: if no document has a boundary.
    """
    settings, args = settings or DiagnosisSettings(), policy.args
    documents = [document for document in documents if document.boundaries]
    if not documents:
        raise ValueError("the corpus has no boundary; give text of the action format, or another `action_format`.")
    noise = NoiseKey(args.seed, _PHASE, 0)
    examples, groups, alternatives = [], [], []
    with policy.inference():
        for document in documents:
            examples.append(annotate(policy, document, noise, "policy"))
            groups.append(policy.rollout(document, noise=noise))
            progress(1)
        over_other = gains_over_other(policy.engine, groups, args.discount)
        places = [(group, boundary) for group in groups for boundary in group.boundaries]
        chosen = np.random.default_rng(args.seed).permutation(len(places))[: settings.boundaries]
        draw_lines = _Lines(policy, settings)
        for at in sorted(chosen) if args.action_format.startswith(_BY_LINE) else ():
            # Latents from elsewhere say what any change of context does: those of the place before (of the first
            # it is the last).
            other, elsewhere = places[at - 1]
            others = other.latents[other.boundaries.index(elsewhere)]
            group, boundary = places[at]
            alternatives.append(_alternatives(policy, group, boundary, others, draw_lines))
            progress(1)
    pruning = measure_pruning([a for a in alternatives if a is not None], settings.factor)
    horizon = effective_horizon([_starts(example) for example in examples], settings.gamma)
    found = {
        "horizon": asdict(horizon) | {"gamma": settings.gamma},
        "compactness": _compactness(groups, args.seed),
        "pruning": None if pruning is None else asdict(pruning) | {"left_out": draw_lines.left_out},
        "economics": _economics(groups, args) | _sameness(policy, groups, over_other),
        "thoughts": None if kept is None else compare_thoughts(policy, groups, kept),
    }
    return found | {"advice": advice(found, args.penalty)}


def _starts(example: AnnotatedExample) -> tuple[int, list[int]]:
    """Counts the lines of a document that are no comments, and finds those before which latents stand."""
    number, at = 0, {}
    for position, action in enumerate(example.document.actions):
        at[position] = number
        number += not action.comment
    return number, [at[position] for position in sorted(example.placed)]


def _compactness(groups: Sequence[RolloutGroup], seed: int) -> dict[str, Any]:
    """Compares latents, expert lines and expert tokens at the same boundaries; and per decision, given its state."""
    latents, lines, prices, surprises = [], [], [], []
    tokens: list[int] = []
    for group in groups:
        ids, actions = group.document.input_ids, group.document.actions
        lines_A = renormalise(group.line_logps_A, group.gate_logps_A)
        for row, boundary in zip(group.latents, group.boundaries, strict=True):
            line = ids[actions[boundary].start : actions[boundary].end]
            lines.append(line)
            tokens += line
            surprises.append(-float(lines_A[boundary]))
            latents.append(row[0].token_ids)  # one a boundary, as many as lines
            prices += [-sum(latent.logps) for latent in row]
    numbers: dict[str, Any] = effective_numbers({"latents": latents, "lines": lines, "tokens": tokens}, seed)
    numbers["latents"]["given_state"] = fmean(prices)
    numbers["lines"]["given_state"] = fmean(surprises)
    return numbers


def _economics(groups: Sequence[RolloutGroup], args: RA3Config) -> dict[str, float]:
    """Sums up what latents bring and cost, wherever they may stand and where the gate would have them."""
    thinking, columns = [], []
    for group in groups:
        gain_TG = compute_returns(group, args.horizon, args.discount, args.line_reduction).gain_TG
        think_T = group.decision_logps_A[list(group.boundaries)].exp()
        length_TG = torch.tensor([[float(len(z.token_ids)) for z in row] for row in group.latents])
        price_TG = torch.tensor([[-sum(z.logps) for z in row] for row in group.latents])
        # A boundary counts by its P(think), however many latents were drawn there.
        weight_TG = (think_T / group.num_latents)[:, None].expand_as(gain_TG)
        thinking.append(think_T)
        columns.append(torch.stack([gain_TG, length_TG, price_TG, weight_TG]).double().flatten(1))
    gain, length, price, weight = torch.cat(columns, 1)
    tiny = torch.finfo(weight.dtype).tiny  # of a gate that is shut everywhere the quotients are 0
    return {
        "think_rate": float(torch.cat(thinking).double().mean()),
        "gain": float(gain.mean()),
        "helps": float((gain > 0).double().mean()),
        "latent_tokens": float(length.mean()),
        "gain_per_token": float(gain.sum() / length.sum().clamp(min=1)),
        "gain_where_it_thinks": float(weight @ gain / weight.sum().clamp(min=tiny)),
        "gain_per_token_where_it_thinks": float(weight @ gain / (weight @ length).clamp(min=tiny)),
        "price": float(price.mean()),
        "latents": len(gain),
    }


def _sameness(policy: Policy, groups: Sequence[RolloutGroup], over_other: Sequence[float]) -> dict[str, Any]:
    """Says whether latents tell anything about their document; of one a document, where the model thinks most."""
    texts = Counter(token_text(policy.tokenizer, first_latent(g)) for g in groups)
    distinct, most_frequent, rate = shares(texts)
    return {
        "gain_over_other": fmean(over_other) if over_other else None,  # of a single document there is no other
        "distinct_rate": distinct,
        "most_frequent": most_frequent,
        "most_frequent_rate": rate,
    }


class _Lines:
    """Draws next lines of pi(. | s, act): what begins a latent is drawn again by leaving it out."""

    def __init__(self, policy: Policy, settings: DiagnosisSettings):
        self.tokenizer, action_format = policy.tokenizer, policy.segmenter.format
        data = readable_bytes(self.tokenizer, action_format)
        self.data = [*data, *[None] * (policy.backbone.vocab_size - len(data))]  # the model may write ids of no token
        self.marker = action_format.think.strip().encode()
        self.model = AutoModelForCausalLMWithAbstractionHead(policy.backbone.causal_lm)
        self.settings = CompletionSettings(settings.lines, temperature=1.0, max_new_tokens=settings.line_tokens)
        self.seed, self.left_out = policy.args.seed, 0

    def __call__(self, document: Document, boundary: int) -> list[tuple[int, ...]]:
        prefix = document.input_ids[: document.actions[boundary].start]
        with torch.random.fork_rng():
            torch.manual_seed(hash((self.seed, document.doc_id, document.chunk, boundary)) % 2**32)
            (completions,) = draw_completions(self.model, [prefix], self.settings, self.tokenizer)
        think = document.actions[boundary].boundary.think
        lines = [self._line(completion.token_ids, think) for completion in completions]
        self.left_out += lines.count(None)
        return [line for line in lines if line]

    def _line(self, ids: Sequence[int], think: Sequence[int]) -> tuple[int, ...] | None:
        """Cuts behind the token that ends the first line with something in it; `()` for a latent, `None` without an
        end."""
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
    policy: Policy,
    group: RolloutGroup,
    boundary: int,
    others: Sequence[Latent],
    draw_lines: Callable[[Document, int], list[tuple[int, ...]]],
) -> Alternatives | None:
    """Scores lines of pi(. | s) in the expert's place: without a latent, with those drawn there, with `others`."""
    document, t = group.document, group.boundaries.index(boundary)
    action = document.actions[boundary]
    act_K, latent_KG = [], []
    latents = (*group.latents[t], *others)
    for line in draw_lines(document, boundary):
        start, end = action.start, action.start + len(line)
        actions = (*document.actions[:boundary], Action(action.index, start, end, action.boundary))
        other = replace(document, input_ids=(*document.input_ids[:start], *line), actions=actions)
        scored = policy.engine.score(other, (boundary,), (latents,), 1)  # the line alone, whatever the horizon
        act, latent_G = _line_logps(scored, boundary, 0)
        act_K.append(act)
        latent_KG.append(latent_G)
    if not act_K:
        return None
    expert, expert_G = _line_logps(group, boundary, t)
    under_GK, here = torch.stack(latent_KG, 1), group.num_latents
    return Alternatives(torch.stack(act_K), under_GK[:here], under_GK[here:], float(expert), expert_G)


def _line_logps(group: RolloutGroup, boundary: int, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the line at a boundary: without a latent, and under each of those in row `t` `[G]`."""
    act_A = renormalise(group.line_logps_A, group.gate_logps_A)
    return act_A[boundary], renormalise(group.latent_line_logps_TGH, group.latent_gate_logps_TGH)[t, :, 0]
