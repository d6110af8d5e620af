"""Held-out numbers: cross-entropy without latents and with the policy's own, ELBO, multi-sample bound, think rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..analysis import shares
from ..losses import code_bounds, compute_returns, renormalise
from ..records import Document, RolloutGroup
from ..rollout import NoiseKey
from .annotate import annotate_all
from .blandness import first_latent, over_others
from .decisions import choose_boundaries


if TYPE_CHECKING:
    from .policy import Policy


EVAL_NOISE = NoiseKey(seed=0x5EED, phase=-1, step=0)  # every evaluation tries the same boundaries with the same noise
_SUMS = (
    "log_likelihood", "never", "elbo", "multi_sample", "policy", "tokens", "think", "boundaries", "gain", "latents",
    "latent_tokens", "policy_latents", "documents", "over_other", "others",
)  # fmt: skip
_CPU_TOKENS = 1024  # of a batch of documents on a CPU
_WRITTEN = "latent: "  # begins the name of a count of latents by their tokens, so that these, too, can be added
_HINDSIGHT = ("hindsight_elbo", "hindsight_multi", "hindsight_gain")


def _code_total(document: Document, logps_A: torch.Tensor) -> float:
    """Sum over the lines that are no comments."""
    return sum(float(logp) for logp, action in zip(logps_A, document.actions, strict=True) if not action.comment)


def evaluate_documents(
    policy: Policy, documents: Iterable[Document], progress: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Sums over documents; [`finish_metrics`] turns them (added over processes) into averages.

    `never` is the log-likelihood of the code where latents are banned, as `think="never"` writes; `policy` on a text
    that the policy has annotated left to right (a one-sample estimate of the temporal ELBO): their difference is the
    price of doing without. `elbo` and `multi_sample` put every latent before its own line on the clean text. With
    latents that are not the policy's own, `hindsight_elbo` and `hindsight_multi` are the same bounds with as many of
    these.

    `over_other` is what latents bring more, where the model thinks most, than as many of the document before, in nats
    (of `others` documents: the first has none before it); names that begin with `"latent: "` count what the first
    latent there says. `progress` is called with the number of documents that are done since the last call.
    """
    args = policy.args
    sums = dict.fromkeys(_SUMS if policy.proposer.causal else (*_SUMS, *_HINDSIGHT), 0.0)
    before: RolloutGroup | None = None
    # A CPU gains little by more at a time, and whoever watches a bar waits for a batch.
    most = policy.engine.max_branch_tokens
    for batch in _batches(documents, min(most, _CPU_TOKENS) if policy.backbone.device.type == "cpu" else most):
        where = [choose_boundaries(document, args.eval_max_boundaries, EVAL_NOISE) for document in batch]
        # On the clean text, each latent before its own line; then the text that the policy itself has annotated.
        with policy.inference(whole=False):
            drawn = policy.engine.rollouts(batch, where, args.eval_num_latents, args.horizon, EVAL_NOISE)
            groups = [policy.decide(group) for group in drawn]
            annotated = annotate_all(policy, batch, EVAL_NOISE, "policy")
            trunks = policy.engine.trunks([example.document for example in annotated])
        for group, example, trunk in zip(groups, annotated, trunks, strict=True):
            _add(sums, group, compute_returns(group, args.horizon, args.discount, args.line_reduction).gain_TG)
            sums["policy"] += _code_total(group.document, renormalise(trunk.line_logps_A, trunk.gate_logps_A))
            sums["policy_latents"] += len(example.placed)
        tried = [group for group in groups if group.boundaries]
        row = tried if before is None else [before, *tried]
        pairs = [(group, other) for other, group in pairwise(row) if other.document.doc_id != group.document.doc_id]
        sums["over_other"] += sum(over_others(policy.engine, pairs, args.discount))
        sums["others"] += len(pairs)
        before = tried[-1] if tried else before
        if not policy.proposer.causal:
            for group in policy.propose(batch, where, args.eval_num_latents, EVAL_NOISE):
                bounds = code_bounds(group)
                gain = compute_returns(group, args.horizon, args.discount).gain_TG
                sums["hindsight_elbo"] += bounds.elbo
                sums["hindsight_multi"] += bounds.multi_sample
                sums["hindsight_gain"] += float(gain.double().sum())
        if progress is not None:
            progress(len(batch))
    return sums


def _batches(documents: Iterable[Document], most: int) -> Iterator[list[Document]]:
    """Cuts documents into lists of at most so many tokens, or of one document."""
    batch: list[Document] = []
    for document in documents:
        if batch and sum(len(d.input_ids) for d in (*batch, document)) > most:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _add(sums: dict[str, float], group: RolloutGroup, gain_TG: torch.Tensor) -> None:
    """Adds what a group on the clean text says."""
    document, bounds = group.document, code_bounds(group)
    sums["documents"] += 1
    sums["log_likelihood"] += bounds.log_likelihood
    sums["elbo"] += bounds.elbo
    sums["multi_sample"] += bounds.multi_sample
    sums["never"] += _code_total(document, renormalise(group.line_logps_A, group.gate_logps_A))
    sums["tokens"] += bounds.tokens
    sums["think"] += float(group.decision_logps_A[list(document.boundaries)].double().exp().sum())
    sums["boundaries"] += len(document.boundaries)
    sums["gain"] += float(gain_TG.double().sum())
    sums["latents"] += gain_TG.numel()
    sums["latent_tokens"] += sum(len(z.token_ids) for row in group.latents for z in row)
    if group.boundaries:
        written = _WRITTEN + " ".join(map(str, first_latent(group)))
        sums[written] = sums.get(written, 0.0) + 1


# What [`finish_metrics`] gives; the last three where there is another document, or a boundary.
HELD_OUT = (
    "ce", "ce_never", "ce_policy", "elbo", "bound_multi", "think_rate", "policy_latent_rate", "gain", "latent_length",
    "code_tokens", "gain_over_other", "distinct_rate", "most_frequent_rate",
)  # fmt: skip
HELD_OUT_HINDSIGHT = ("elbo_hindsight", "bound_hindsight", "gain_hindsight")  # where latents are not the policy's own


def finish_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Averages: nats per code token (bounds negated, so that lower is better), rates, nats per latent. What was not
    measured is left out."""
    tokens, boundaries, latents = (max(sums[name], 1) for name in ("tokens", "boundaries", "latents"))
    metrics = {
        "ce": -sums["log_likelihood"] / tokens,
        "ce_never": -sums["never"] / tokens,
        "ce_policy": -sums["policy"] / tokens,
        "elbo": -sums["elbo"] / tokens,
        "bound_multi": -sums["multi_sample"] / tokens,
        "think_rate": sums["think"] / boundaries,
        "policy_latent_rate": sums["policy_latents"] / boundaries,
        "gain": sums["gain"] / latents,
        "latent_length": sums["latent_tokens"] / latents,
        "code_tokens": sums["tokens"],
    }
    if "hindsight_elbo" in sums:
        metrics["elbo_hindsight"] = -sums["hindsight_elbo"] / tokens
        metrics["bound_hindsight"] = -sums["hindsight_multi"] / tokens
        metrics["gain_hindsight"] = sums["hindsight_gain"] / latents
    if sums["others"]:
        metrics["gain_over_other"] = sums["over_other"] / sums["others"]
    if written := {name: count for name, count in sums.items() if name.startswith(_WRITTEN)}:
        metrics["distinct_rate"], _, metrics["most_frequent_rate"] = shares(written)
    return metrics
