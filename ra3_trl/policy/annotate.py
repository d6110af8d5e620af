"""Annotation: which latents are spliced into a document for the M-step.

By the policy itself (PAPER): think where the gate says so, write what the policy writes. By resampling: at each
boundary <act> and G latents compete with weights prior x likelihood of the next lines, which is the posterior's
importance-sampling estimate; no RL is needed for it to help, and it costs about G times as much. Latents that were
not the policy's own (`propose.py`) count with pi(z | s) / q(z | s, a) besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..config_fields import row_length
from ..losses import compute_returns, explored, log1mexp, log_mean_gain, resampling_logits
from ..records import AnnotatedExample, Document, Latent, RolloutGroup
from ..rollout import CHOICE, GATE, NoiseKey
from ..segmentation import splice
from .decisions import line_numbers


if TYPE_CHECKING:
    from ..config import RA3Config
    from .policy import Policy


MARKUP = 8  # tokens that stand around a latent, at most
WINDOW = 8  # most boundaries proposed together where a latent placed changes what follows


@dataclass(frozen=True)
class _Choice:
    """What was chosen for some boundaries: the latents to place and what each brings in nats; what thinking brings,
    and the effective sample sizes of the candidates, where they were measured; each by boundary."""

    placed: dict[int, Latent] = field(default_factory=dict)
    worth: dict[int, float] = field(default_factory=dict)
    gains: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)

    def up_to(self, last: int) -> _Choice:
        """Leaves out what stands behind the boundary `last`."""
        return _Choice(*({b: value for b, value in part.items() if b <= last} for part in vars(self).values()))

    def __or__(self, other: _Choice) -> _Choice:
        return _Choice(*(mine | yours for mine, yours in zip(vars(self).values(), vars(other).values(), strict=True)))


def annotate(policy: Policy, document: Document, noise: NoiseKey, way: str | None = None) -> AnnotatedExample:
    """Splices latents into one document, see [`annotate_all`]."""
    return annotate_all(policy, [document], noise, way)[0]


def annotate_all(
    policy: Policy, documents: Sequence[Document], noise: NoiseKey, way: str | None = None
) -> list[AnnotatedExample]:
    """Splices latents into documents, each left to right, all in lockstep.

    With a horizon above 1 each decision sees the latents already placed, so that one that still serves is not
    repeated: proposals are made for a window of boundaries, used up to the first latent placed, and made anew behind
    it, until a row of `max_length` is full. A window is as wide as what was used of the last one, and twice as wide
    where nothing was placed, up to 8: so hardly more is run than twice what is used. The text before is not run again,
    and whatever the windows the result is the same. With horizon 1 all boundaries are decided at once on the clean
    text.

    Args:
        policy ([`Policy`]):
            Writes the latents and scores the lines; its head is the gate, or says which boundaries are hopeless, where
            the settings say so.
        documents (`Sequence[Document]`):
            Chunks of expert text.
        noise ([`NoiseKey`]):
            Keys the draws.
        way (`str`, *optional*):
            `"policy"` or `"resample"`; the default is `policy.args.annotation`.
    """
    by_policy = (way or policy.args.annotation) == "policy"
    choose = _choose_by_policy if by_policy else _choose_by_resampling
    return _left_to_right(policy, documents, [d.boundaries for d in documents], noise, choose, policy.proposer.causal)


def annotate_proposed(
    policy: Policy,
    documents: Sequence[Document],
    proposed: Sequence[Mapping[int, Sequence[Latent]]],
    noise: NoiseKey,
    keep_all: bool = False,
) -> list[AnnotatedExample]:
    """Splices latents that an annotator proposed, as [`annotate_all`] does with the policy's own.

    Args:
        policy ([`Policy`]):
            The student, which scores the lines: what it is not helped by is not placed.
        documents (`Sequence[Document]`):
            Chunks of expert text, no two with the same `doc_id` and `chunk`.
        proposed (`Sequence[Mapping[int, Sequence[Latent]]]`):
            Of each document the latents proposed at some of its boundaries.
        noise ([`NoiseKey`]):
            Keys the draws.
        keep_all (`bool`, *optional*, defaults to `False`):
            Place at each of these boundaries the latent that brings most, whatever that is.

    Returns:
        `list[AnnotatedExample]`: with `gains` of all boundaries that were scored. Those that are missing there had no
        room in the row.
    """
    by_chunk = {(d.doc_id, d.chunk): at for d, at in zip(documents, proposed, strict=True)}
    choose = partial(_choose_among, by_chunk=by_chunk, keep_all=keep_all)
    return _left_to_right(policy, documents, [sorted(at) for at in proposed], noise, choose, causal=True)


def _left_to_right(
    policy: Policy,
    documents: Sequence[Document],
    boundaries: Sequence[Sequence[int]],
    noise: NoiseKey,
    choose: Callable[..., list[_Choice]],
    causal: bool,
) -> list[AnnotatedExample]:
    """Chooses at `boundaries`, all documents in lockstep; see [`annotate_all`]. `causal`: `choose` needs nothing of a
    document behind the lines that are scored."""
    args = policy.args
    done = [_Choice() for _ in documents]
    left = [list(row) for row in boundaries]
    at_once = args.horizon == 1
    width = [len(row) if at_once else WINDOW for row in left]
    with policy.engine.remembering():
        while any(left):
            asked: list[tuple[int, Document, list[int]]] = []
            for i in [i for i, row in enumerate(left) if row]:
                context, window = splice(documents[i], done[i].placed).document, left[i][: width[i]]
                if done[i].placed and len(context.input_ids) + args.max_latent_length + MARKUP > row_length(args):
                    left[i] = []  # the row is full
                else:
                    # What a proposer sees of a document is its own affair; the policy needs no more than the window.
                    whole = at_once or not causal
                    asked.append((i, context if whole else _up_to(context, window[-1] + args.horizon), window))
            choices = choose(policy, [c for _, c, _ in asked], [window for _, _, window in asked], noise)
            for (i, _, window), choice in zip(asked, choices, strict=True):
                last = window[-1]
                if not at_once:  # a latent changes what its successors are worth: they are chosen anew
                    last = next(iter(choice.placed), last)
                    width[i] = window.index(last) + 1 if choice.placed else min(2 * len(window), WINDOW)
                done[i] |= choice.up_to(last)
                left[i] = [boundary for boundary in left[i] if boundary > last]
            for document in (d for d, row in zip(documents, left, strict=True) if not row):
                policy.engine.forget(document)
    return [
        replace(splice(document, d.placed), worth=d.worth, gains=d.gains, sizes=d.sizes)
        for document, d in zip(documents, done, strict=True)
    ]


def _up_to(document: Document, actions: int) -> Document:
    """The document without what follows its first `actions`."""
    first = document.actions[:actions]
    return (
        document
        if len(first) == len(document.actions)
        else replace(document, actions=first, input_ids=document.input_ids[: first[-1].end])
    )


def _log_prior(policy: Policy, group: RolloutGroup, boundaries: Sequence[int]) -> torch.Tensor:
    """Log prior probability of thinking at `boundaries`, `[len(boundaries)]`."""
    if policy.args.prior_alpha is None:
        return explored(policy.decide(group).decision_logps_A[list(boundaries)], policy.args.exploration).log()
    return torch.full((len(boundaries),), math.log(1 - policy.args.prior_alpha))


def _choose_by_policy(
    policy: Policy, contexts: Sequence[Document], windows: Sequence[Sequence[int]], noise: NoiseKey
) -> list[_Choice]:
    """Latents at the boundaries where the gate, drawn by keyed noise, says think; in order."""
    horizon, thinks = policy.args.horizon, []
    for context, window, trunk in zip(contexts, windows, policy.engine.trunks(contexts), strict=True):
        gates = policy.decide(trunk).decision_logps_A
        u = noise.uniform(context.doc_id, line_numbers(context, window), GATE, 0)
        thinking = [b for b, number in zip(window, u, strict=True) if number < math.exp(gates[b])]
        thinks.append(thinking[:1] if horizon > 1 else thinking)
    some = [i for i, thinking in enumerate(thinks) if thinking]
    groups = policy.engine.rollouts([contexts[i] for i in some], [thinks[i] for i in some], 1, horizon, noise, False)
    choices = [_Choice() for _ in contexts]
    for i, group in zip(some, groups, strict=True):
        choices[i] = _Choice({boundary: row[0] for boundary, row in zip(thinks[i], group.latents, strict=True)})
    return choices


def _undecided(
    trunk: RolloutGroup, boundaries: Sequence[int], log_think: torch.Tensor, u: torch.Tensor, args: RA3Config
) -> list[int]:
    """Leaves out boundaries where the draw is <act> whatever the latents: at best these make the lines certain, a gain
    of `-G_act`, which may be less than a latent costs, or than the draw `u` asks for."""
    none = tuple((Latent((), False),) for _ in boundaries)
    lines = torch.zeros(len(boundaries), 1, args.horizon)
    group = replace(trunk, boundaries=tuple(boundaries), latents=none, latent_line_logps_TGH=lines,
                    latent_gate_logps_TGH=torch.full_like(lines, -torch.inf))  # fmt: skip
    best = compute_returns(group, args.horizon, args.discount)
    acts = resampling_logits(best.act_T, best.latent_TG, log_think).double().softmax(-1)[:, 0]
    chance = (best.gain_TG[:, 0] > args.penalty) & (u > acts)
    return [boundary for boundary, some in zip(boundaries, chance.tolist(), strict=True) if some]


def _choose_by_resampling(
    policy: Policy, contexts: Sequence[Document], windows: Sequence[Sequence[int]], noise: NoiseKey
) -> list[_Choice]:
    """At each boundary <act> or one of G latents, drawn by posterior weight; sums over lines.

    The penalty is no part of the weights, whose prior says how often to think; but a latent that is drawn and does not
    bring what it costs is not placed: beside others that are no better it would be, by chance alone.
    """
    numbers = [
        dict(zip(window, noise.uniform(c.doc_id, line_numbers(c, window), CHOICE, 0).tolist(), strict=True))
        for c, window in zip(contexts, windows, strict=True)
    ]

    def hopeful(trunk: RolloutGroup, number: dict[int, float]) -> Sequence[int]:
        boundaries = list(number)
        if policy.proposer.causal:
            u = torch.tensor([*number.values()], dtype=torch.float64)
            boundaries = _undecided(trunk, boundaries, _log_prior(policy, trunk, boundaries), u, policy.args)
        if policy.head is None or not boundaries:
            return boundaries
        log_think = _log_prior(policy, trunk, boundaries)
        return policy.head.hopeful(trunk, boundaries, log_think - log1mexp(log_think))

    where = [partial(hopeful, number=number) for number in numbers]
    groups = policy.propose(contexts, where, policy.args.num_latents, noise)
    return [_draw(policy, group, number) for group, number in zip(groups, numbers, strict=True)]


def _choose_among(
    policy: Policy,
    contexts: Sequence[Document],
    windows: Sequence[Sequence[int]],
    noise: NoiseKey,
    by_chunk: Mapping[tuple[int, int], Mapping[int, Sequence[Latent]]],
    keep_all: bool,
) -> list[_Choice]:
    """As [`_choose_by_resampling`], among latents that are given. What is scored together has as many of them at each
    boundary, so boundaries are taken by their number."""
    given = [by_chunk[context.doc_id, context.chunk] for context in contexts]
    choices = [_Choice() for _ in contexts]
    for count in sorted({len(at[b]) for at, window in zip(given, windows, strict=True) for b in window}):
        where = [[b for b in window if len(at[b]) == count] for at, window in zip(given, windows, strict=True)]
        latents = [[at[b] for b in boundaries] for at, boundaries in zip(given, where, strict=True)]
        scored = policy.engine.scores(contexts, where, latents, policy.args.horizon)
        for i, group in enumerate(scored):
            u = noise.uniform(contexts[i].doc_id, line_numbers(contexts[i], where[i]), CHOICE, 0).tolist()
            number = None if keep_all else dict(zip(where[i], u, strict=True))
            choices[i] |= _draw(policy, policy.decide(group), number)
    return [replace(choice, placed=dict(sorted(choice.placed.items()))) for choice in choices]


def _draw(policy: Policy, group: RolloutGroup, number: dict[int, float] | None) -> _Choice:
    """Chooses at each boundary of a scored group by a uniform `number`; without, the latent that brings most."""
    if not group.boundaries:
        return _Choice()
    args, boundaries = policy.args, group.boundaries
    returns = compute_returns(group, args.horizon, args.discount)
    worth = compute_returns(group.with_ratio(policy.proposer.kl_coef), args.horizon, args.discount)
    weights = (
        resampling_logits(worth.act_T, worth.latent_TG, _log_prior(policy, group, boundaries)).double().softmax(-1)
    )
    if number is None:
        pays = [(t, b, int(worth.gain_TG[t].argmax())) for t, b in enumerate(boundaries)]
    else:
        u = torch.tensor([number[boundary] for boundary in boundaries], dtype=torch.float64)
        # Inverse CDF; the clamp is for a cumulative sum that rounding left just below 1.
        drawn = (weights.cumsum(-1) < u[:, None]).sum(-1).clamp(max=weights.shape[1] - 1).tolist()
        pays = [(t, b, g - 1) for t, (b, g) in enumerate(zip(boundaries, drawn, strict=True)) if g > 0]
        pays = [(t, b, g) for t, b, g in pays if worth.gain_TG[t, g] > args.penalty]
    return _Choice(
        {b: group.latents[t][g] for t, b, g in pays},
        {b: float(worth.gain_TG[t, g]) for t, b, g in pays},
        dict(zip(boundaries, log_mean_gain(returns.gain_TG).tolist(), strict=True)),
        dict(zip(boundaries, (1 / weights.square().sum(-1)).tolist(), strict=True)),
    )
