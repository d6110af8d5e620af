"""Proposals: where latents come from, and what each weighs for having come from there.

A latent may be drawn by the policy itself (`causal`) or in hindsight, from a prompt that holds the lines it explains.
Whatever drew it, it counts for what it is worth under the policy: its lines' log-likelihood plus
`log pi(z | s) - log q(z | s, a)`. A latent that copies the next line gains much and pays for it here. Latents of
several proposals are pooled and weighted by the balance heuristic (Veach and Guibas 1995): `q` is the mixture of all
proposals in the shares in which they were drawn, whichever one a latent is from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...config import RA3Config
from ...config_fields import beside_trainers, own_fields, row_length
from ...models import context_length
from ...policy import OWN_LATENTS, LatentSource, Policy
from ...records import Document, Latent, RolloutGroup
from ...rollout import Boundaries, NoiseKey, RolloutEngine
from .config import HindsightConfig
from .prompts import Prompt, PromptFunction, ProposalFunc, View, chat_template, fim_template, parse_template


Latents = Sequence[Sequence[Latent]]  # [T, G]


@dataclass(frozen=True)
class Proposal:
    """One origin of latents.

    `name`: as in `args.proposal`. `share`: of the latents, relative to the other proposals'. `prompt`: what a latent
    is drawn from; `None` is the document itself. `lines`: how many next lines the prompt holds.
    """

    name: str
    share: float = 1.0
    prompt: Prompt | None = None
    lines: int = 4

    def views(self, document: Document, boundaries: Sequence[int]) -> list[View]:
        if self.prompt is None:
            return [(document, tuple(boundaries))]
        return self.prompt.views(document, boundaries, self.lines)

    def sample(
        self,
        engine: RolloutEngine,
        documents: Sequence[Document],
        boundaries: Sequence[Sequence[int]],
        count: int,
        noise: NoiseKey,
    ) -> list[tuple[tuple[Latent, ...], ...]]:
        """Draws `count` latents at each boundary of each document."""
        views = [self.views(document, at) for document, at in zip(documents, boundaries, strict=True)]
        flat, places = [view for own in views for view, _ in own], [at for own in views for _, at in own]
        groups = iter(engine.rollouts(flat, places, count, 1, noise, score=False))
        return [tuple(row for _ in own for row in next(groups).latents) for own in views]

    def logps(
        self, engine: RolloutEngine, document: Document, boundaries: Sequence[int], latents: Latents
    ) -> torch.Tensor:
        """log q `[T, G]` of latents, whoever drew them."""
        # What another distribution left out by its truncation (`kept`) is not what this one does.
        rows = ([replace(z, kept=None) for z in row] for row in latents)
        views = self.views(document, boundaries)
        return torch.cat([engine.latent_logps(view, places, [next(rows) for _ in places]) for view, places in views])


def prior_logps(
    engine: RolloutEngine, document: Document, boundaries: Sequence[int], latents: Latents
) -> torch.Tensor:
    """log pi(z | s) `[T, G]`: the policy's distribution over latents at the sampling temperature. It is not truncated,
    so that no latent from elsewhere is impossible."""
    return engine.latent_logps(document, boundaries, latents, whole=True)


def drawn_logps(latents: Latents) -> torch.Tensor:
    """log q `[T, G]` of latents as they were drawn."""
    return torch.tensor([[sum(z.logps) for z in row] for row in latents])


def share_out(total: int, shares: Sequence[float], least: int = 1) -> tuple[int, ...]:
    """`total` in whole numbers of `least` or more, by largest remainder. Example: `share_out(4, (1, 3)) == (1, 3)`."""
    if total < least * len(shares):
        raise ValueError(f"{total} latents can't be shared out among {len(shares)} proposals; raise `num_latents`.")
    counts = [least] * len(shares)
    for _ in range(total - sum(counts)):
        counts[max(range(len(shares)), key=lambda i: shares[i] / sum(shares) * total - counts[i])] += 1
    return tuple(counts)


@dataclass(frozen=True)
class _Source:
    """A proposal in hindsight in an E-phase, with its number of latents: it learns by its own q."""

    proposal: Proposal
    num_latents: int
    horizon: int

    def draw(
        self,
        engine: RolloutEngine,
        documents: Sequence[Document],
        boundaries: Sequence[Boundaries],
        noise: NoiseKey,
        score: bool,
    ) -> list[RolloutGroup]:
        trunks = engine.trunks(documents)
        chosen = [tuple(at(trunk) if callable(at) else at) for at, trunk in zip(boundaries, trunks, strict=True)]
        latents = self.proposal.sample(engine, documents, chosen, self.num_latents, noise)
        groups = engine.scores(documents, chosen, latents, self.horizon) if score else trunks
        drawn = []
        for group, at, rows in zip(groups, chosen, latents, strict=True):
            # At most one view, or `make_proposals` would have refused the prompt.
            view = next((view for view, _ in self.proposal.views(group.document, at)), group.document)
            if not score:
                lines = torch.zeros(len(at), self.num_latents, self.horizon)
                group = replace(group, latent_line_logps_TGH=lines, latent_gate_logps_TGH=lines - torch.inf)
            drawn.append(replace(group, boundaries=at, latents=rows, view=view))
        return drawn

    def weigh(self, engine: RolloutEngine, group: RolloutGroup) -> RolloutGroup:
        if not group.boundaries:
            return group
        prior_TG = prior_logps(engine, group.document, group.boundaries, group.latents)
        return replace(group, log_ratio_TG=prior_TG - drawn_logps(group.latents))


class Proposals:
    """All origins of a run's latents: a [`~ra3_trl.policy.Proposer`], with `kl_coef` as `proposal_kl_coef`."""

    def __init__(self, members: Sequence[Proposal] = (Proposal("causal"),), kl_coef: float = 1.0):
        self.members = tuple(members)
        self.shares = [member.share for member in members]
        self.kl_coef = kl_coef
        prompts = {member.name: member.prompt.settings for member in members if member.prompt is not None}
        self.causal = not prompts
        self.lines = max((member.lines for member in members if member.prompt is not None), default=1)
        self.settings: dict[str, Any] = {"proposal_func": prompts.pop("function", None), "prompts": prompts}

    def sources(self, num_latents: int, horizon: int) -> Sequence[LatentSource]:
        return [
            _Source(member, count, horizon) if member.prompt else OWN_LATENTS.sources(count, horizon)[0]
            for member, count in zip(self.members, share_out(num_latents, self.shares, 2), strict=True)
        ]

    def propose(
        self,
        engine: RolloutEngine,
        documents: Sequence[Document],
        boundaries: Sequence[Boundaries],
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
    ) -> list[RolloutGroup]:
        """Pools the latents of all members, each with its `log_ratio_TG` under the balance heuristic. Of the policy's
        own latents alone it is the engine's rollout, bit for bit."""
        if self.causal:
            return engine.rollouts(documents, boundaries, num_latents, horizon, noise)
        pairs = zip(documents, boundaries, strict=True)
        return [self._pool(engine, document, at, num_latents, horizon, noise) for document, at in pairs]

    def _pool(
        self,
        engine: RolloutEngine,
        document: Document,
        boundaries: Boundaries,
        num_latents: int,
        horizon: int,
        noise: NoiseKey,
    ) -> RolloutGroup:
        boundaries = boundaries(engine.trunk(document)) if callable(boundaries) else boundaries
        if not boundaries:
            return engine.rollout(document, boundaries, num_latents, horizon, noise)
        counts = share_out(num_latents, self.shares)
        drawn = [
            member.sample(engine, [document], [boundaries], count, noise.of(j))[0]
            for j, (member, count) in enumerate(zip(self.members, counts, strict=True))
        ]
        pooled = [sum(rows, ()) for rows in zip(*drawn, strict=True)]
        group = engine.score(document, boundaries, pooled, horizon)

        drawn_TG, prior_TG, terms = drawn_logps(pooled), None, []
        for member, count, end in zip(self.members, counts, accumulate(counts), strict=True):
            alone = count == num_latents
            logps_TG = drawn_TG.clone() if alone else member.logps(engine, document, boundaries, pooled)
            if member.prompt is None and not engine.params.truncated:
                prior_TG = logps_TG.clone()  # the policy's distribution is both
            # Its own latents count as drawn: a nucleus found anew may leave out what stood at its edge.
            logps_TG[:, end - count : end] = drawn_TG[:, end - count : end]
            terms.append(logps_TG + math.log(count / num_latents))
        prior_TG = prior_logps(engine, document, boundaries, pooled) if prior_TG is None else prior_TG
        return replace(group, log_ratio_TG=prior_TG - torch.logsumexp(torch.stack(terms), 0))


def make_proposals(
    args: HindsightConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    function: ProposalFunc | None = None,
    trains: bool = True,
) -> Proposals:
    """What `args.proposal` names, for this tokenizer and a model that holds `context` tokens (`None`: without end).

    Raises:
        `ValueError`: for what the tokenizer, the context or the settings can't do, with the cure.
    """
    shares = args.proposal_shares
    if ("function" in shares) != (function is not None):
        raise ValueError(
            f"`proposal` is {args.proposal!r}, `proposal_func` is {function!r}; name 'function' among the proposals "
            "and give the function to the trainer (in Python; no command takes one), or neither."
        )
    room = (context or 1 << 62) - args.max_latent_length
    members = []
    for name, share in shares.items():
        prompt: Prompt | None = None
        if name == "function" and function is not None:
            prompt = PromptFunction(function, tokenizer, room)
        elif name != "causal":
            make = {"fim": fim_template, "chat": chat_template}.get(name)
            prompt = make(tokenizer) if make else parse_template(args.proposal_template or "", tokenizer)
            if (longest := row_length(args) + prompt.length) > room:
                raise ValueError(
                    f"`proposal` {args.proposal!r}: code so far, next lines and {prompt.length} tokens of the prompt "
                    f"may take {longest} tokens, but the model's context leaves room for {room}; lower `max_length` "
                    f"by {longest - room}."
                )
        # Gradients come from one packed forward of document and branches: one view of all boundaries.
        if prompt is not None and not prompt.shares_prefix and trains and args.uses_latents and args.e_steps > 0:
            other = "" if name == "function" else ", or let nothing but fixed text stand before {prefix}"
            raise ValueError(
                f"`proposal` has {name!r}, whose prompts need not begin with the code so far: an E-phase can't train "
                f"it. Set `e_steps=0` and `annotation='resample'`{other}."
            )
        members.append(Proposal(name, share, prompt, args.proposal_lines))
    proposals = Proposals(members, args.proposal_kl_coef)
    if trains and not proposals.causal and not args.uses_latents:
        raise ValueError(
            f"`proposal` is {args.proposal!r}, but no latent is drawn in this training: `e_steps` is {args.e_steps}, "
            f"`annotation` {args.annotation!r} and `penalty` {args.penalty}; set one of the first two (and a finite "
            "penalty), or leave `proposal` at 'causal'."
        )
    return proposals


def attach(
    policy: Policy, trained: Mapping[str, Any] | None = None, function: ProposalFunc | None = None, **changes: Any
) -> Policy:
    """Gives a copy of a policy the proposals by which its latents are drawn in annotation and bounds.

    Example: `attach(Policy.open(name), read_experimental(name), proposal=options.proposal, proposal_lines=None)`

    Args:
        trained (`Mapping[str, Any]`, *optional*):
            The fields its checkpoint was trained with, of `config_file.read_experimental`.
        function (`Callable[[str, str], str]`, *optional*):
            What `"function"` stands for.
        **changes:
            Fields of [`HindsightConfig`] to set otherwise, those named `proposal...`; `None` was not given.

    Raises:
        `ValueError`: for what tokenizer, context or settings can't do, or a function that is not at hand.
    """
    fields, changes = dict(trained or {}), {name: value for name, value in changes.items() if value is not None}
    if "proposal" in changes or policy.args.annotation == "policy":
        # Proposal, template and price go together.
        price = ["proposal_kl_coef"] if changes.get("proposal", "causal") == "causal" else []
        fields = {n: value for n, value in fields.items() if n not in ("proposal", "proposal_template", *price)}
    if "function" in fields.get("proposal", "") and function is None:
        raise ValueError(
            f"the checkpoint was trained with `proposal` {fields['proposal']!r}, and its function is not at hand; "
            "give another `--proposal`, such as causal."
        )
    fields |= {name: getattr(policy.args, name) for name in own_fields(RA3Config)} | changes
    with beside_trainers():
        args = HindsightConfig(**fields | {"e_steps": 0, "use_cpu": policy.args.use_cpu, "report_to": "none"})
    context = context_length(policy.backbone.causal_lm)
    return policy.changed(proposer=make_proposals(args, policy.tokenizer, context, function, trains=False))
