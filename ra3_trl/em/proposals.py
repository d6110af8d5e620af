"""Proposals: where latents come from, and what each weighs for having come from there.

A latent may be drawn by the policy itself (`causal`) or in hindsight, from a prompt that holds the lines it explains
(`segmentation/hindsight.py`). Whatever drew it, it counts for what it is worth under the policy: its lines'
log-likelihood plus `log pi(z | s) - log q(z | s, a)`. A latent that copies the next line gains much and pays for it
here. Latents of several proposals are pooled and weighted by the balance heuristic (Veach and Guibas 1995): `q` is the
mixture of all proposals in the shares in which they were drawn, whichever one a latent is from.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from ..config import RA3Config
from ..records import Document, Latent, RolloutGroup
from ..rollout import NoiseKey, RolloutEngine
from ..rollout.engine import Boundaries
from ..segmentation import Prompt, PromptFunction, PromptTemplate, View, chat_template, fim_template, parse_template


@dataclass(frozen=True)
class Proposal:
    """One origin of latents.

    Args:
        name (`str`):
            `"causal"`, `"fim"`, `"chat"`, `"template"` or `"function"`.
        share (`float`):
            Its share of the latents, relative to the other proposals'.
        prompt ([`~ra3_trl.segmentation.Prompt`], *optional*):
            What the latent is drawn from; `None` is the document itself.
    """

    name: str
    share: float
    prompt: Prompt | None = None

    def views(self, document: Document, boundaries: Sequence[int], lines: int) -> list[View]:
        return (
            [(document, tuple(boundaries))] if self.prompt is None else self.prompt.views(document, boundaries, lines)
        )


@dataclass(frozen=True)
class Proposals:
    """All origins of latents in a run, and how many next lines those in hindsight see."""

    parts: tuple[Proposal, ...] = (Proposal("causal", 1.0),)
    lines: int = 4

    @property
    def causal(self) -> bool:
        """Whether all latents are the policy's own."""
        return all(part.prompt is None for part in self.parts)

    def counts(self, num_latents: int, least: int = 1) -> tuple[int, ...]:
        """How many of `num_latents` each proposal draws: at least so many, else by largest remainder of the shares."""
        return share_out(num_latents, tuple(part.share for part in self.parts), least)


CAUSAL = Proposals()


def share_out(total: int, shares: Sequence[float], least: int = 1) -> tuple[int, ...]:
    """`total` in whole parts, by largest remainder. Example: `share_out(4, (1, 3)) == (1, 3)`.

    Raises:
        `ValueError`: if there are fewer than parts.
    """
    if total < least * len(shares):
        raise ValueError(f"{total} latents can't be shared out among {len(shares)} proposals; raise `num_latents`.")
    wanted = [share / sum(shares) * total for share in shares]
    counts = [max(least, math.floor(w)) for w in wanted]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        order = [i for i in range(len(counts)) if step > 0 or counts[i] > least]
        counts[max(order, key=lambda i: step * (wanted[i] - counts[i]))] += step
    return tuple(counts)


def make_proposals(
    args: RA3Config,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    function: Callable[[str, str], str] | None = None,
    trains: bool = True,
) -> Proposals:
    """What `args.proposal` names, for this tokenizer.

    Args:
        context (`int`, *optional*):
            Tokens that the model's context holds; `None` if it has no end.
        function (`Callable[[str, str], str]`, *optional*):
            What `"function"` stands for.
        trains (`bool`, *optional*, defaults to `True`):
            Whether there may be E-phases.

    Raises:
        `ValueError`: for what the tokenizer, the context or the settings can't do, with the cure.
    """
    shares = args.proposal_shares
    if ("function" in shares) != (function is not None):
        raise ValueError(
            f"`proposal` is {args.proposal!r}, `proposal_func` is {function!r}; name 'function' among the proposals "
            "and give the function to the trainer (in Python; no command takes one), or neither."
        )
    if function is not None:
        _check_function(function)
    room = (context or 1 << 62) - args.max_latent_length
    in_e_phase = trains and args.uses_latents and args.e_steps > 0
    parts = []
    for name, share in shares.items():
        prompt: Prompt | None = None
        if name == "function":
            prompt = PromptFunction(function, tokenizer, room)
        elif name != "causal":
            make = {"fim": fim_template, "chat": chat_template}.get(name)
            prompt = make(tokenizer) if make else parse_template(args.proposal_template, tokenizer)
            _check_context(prompt, args, room)
        if prompt is not None and in_e_phase and not prompt.shares_prefix:
            other = "" if name == "function" else ", or let nothing but fixed text stand before {prefix}"
            raise ValueError(
                f"`proposal` has {name!r}, whose prompts need not begin with the code so far: an E-phase can't train "
                f"it. Set `e_steps=0` and `annotation_think_prob`{other}."
            )
        parts.append(Proposal(name, share, prompt))
    found = Proposals(tuple(parts), args.proposal_lines)
    if trains and not found.causal and not args.uses_latents:
        raise ValueError(
            f"`proposal` is {args.proposal!r}, but no latent is drawn in this training: `e_steps` is {args.e_steps}, "
            f"`annotation_think_prob` {args.annotation_think_prob} and `penalty` {args.penalty}; set one of the first "
            "two (and a finite penalty), or leave `proposal` at 'causal'."
        )
    return found


def _check_function(function: Callable[[str, str], str]) -> None:
    wanted = "give a function of two texts, the code so far and the next lines"
    if not callable(function):
        raise ValueError(f"`proposal_func` is {function!r}; {wanted}.")
    try:
        inspect.signature(function).bind("", "")
    except TypeError as error:
        raise ValueError(f"`proposal_func` does not take what it is given ({error}); {wanted}.") from error
    except ValueError:
        pass  # some that are built in have no signature


def _check_context(prompt: PromptTemplate, args: RA3Config, room: int) -> None:
    longest = args.max_length + prompt.length
    if longest > room:
        raise ValueError(
            f"`proposal` {args.proposal!r}: code so far, next lines and {prompt.length} tokens of the prompt may take "
            f"{longest} tokens, but the model's context leaves room for {room}; lower `max_length` by "
            f"{longest - room}."
        )


@torch.no_grad()
def sample(
    engine: RolloutEngine,
    document: Document,
    boundaries: Sequence[int],
    count: int,
    noise: NoiseKey,
    part: Proposal,
    lines: int,
) -> list[tuple[Latent, ...]]:
    """`count` latents at each boundary as this proposal draws them."""
    return [
        row
        for view, places in part.views(document, boundaries, lines)
        for row in engine.rollout(view, places, count, 1, noise, score=False).latents
    ]


@torch.no_grad()
def latent_logps(
    engine: RolloutEngine,
    document: Document,
    boundaries: Sequence[int],
    latents: Sequence[Sequence[Latent]],
    part: Proposal,
    lines: int,
    whole: bool = False,
) -> torch.Tensor:
    """Log-prob `[T, G]` of latents, whoever drew them, under the distribution that this proposal draws from; with
    `whole`, without its truncation."""
    rows, done = [], 0
    for view, places in part.views(document, boundaries, lines):
        # What another distribution left out by its truncation is not what this one does.
        given = [[replace(z, kept=None) for z in row] for row in latents[done : done + len(places)]]
        done += len(places)
        rows.append(engine.latent_logps(view, places, given, whole))
    return torch.cat(rows)


def prior_logps(
    engine: RolloutEngine, document: Document, boundaries: Sequence[int], latents: Sequence[Sequence[Latent]]
) -> torch.Tensor:
    """log pi(z | s) `[T, G]`: the policy's distribution over latents at the sampling temperature. It is not truncated,
    so that no latent from elsewhere is impossible."""
    return latent_logps(engine, document, boundaries, latents, Proposal("causal", 1.0), 0, whole=True)


def own_logps(latents: Sequence[Sequence[Latent]]) -> torch.Tensor:
    """Log-probs `[T, G]` of latents as they were drawn."""
    return torch.tensor([[sum(z.logps) for z in row] for row in latents])


def propose(
    engine: RolloutEngine,
    document: Document,
    boundaries: Boundaries,
    num_latents: int,
    horizon: int,
    noise: NoiseKey,
    proposals: Proposals,
) -> RolloutGroup:
    """A group with the latents of all proposals, each with its `log_ratio_TG` under the balance heuristic.

    Of the policy's own latents only, it is [`RolloutEngine.rollout`]'s.
    """
    if proposals.causal:
        return engine.rollout(document, boundaries, num_latents, horizon, noise)
    boundaries = tuple(boundaries(engine.trunk(document)) if callable(boundaries) else boundaries)
    if not boundaries:
        return engine.rollout(document, boundaries, num_latents, horizon, noise)
    counts = proposals.counts(num_latents)
    drawn = [
        sample(engine, document, boundaries, count, noise.of(j), part, proposals.lines)
        for j, (part, count) in enumerate(zip(proposals.parts, counts, strict=True))
    ]
    pooled = [sum(rows, ()) for rows in zip(*drawn, strict=True)]
    group = engine.score(document, boundaries, pooled, horizon)

    own_TG, mixed, begin, prior_TG = own_logps(pooled), [], 0, None
    for part, count in zip(proposals.parts, counts, strict=True):
        if count == num_latents:
            logps_TG = own_TG.clone()
        else:
            logps_TG = latent_logps(engine, document, boundaries, pooled, part, proposals.lines)
        if part.prompt is None and not engine.params.truncated:
            prior_TG = logps_TG.clone()  # the policy's distribution is both
        own = slice(begin, begin + count)
        logps_TG[:, own] = own_TG[:, own]  # as drawn: a nucleus found anew may leave out what stood at its edge
        begin += count
        mixed.append(logps_TG + math.log(count / num_latents))
    prior_TG = prior_logps(engine, document, boundaries, pooled) if prior_TG is None else prior_TG
    return replace(group, log_ratio_TG=prior_TG - torch.logsumexp(torch.stack(mixed), 0))
