"""What is watched during training: averages for the log, the held gate, numbers of rollouts, alarms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

import torch
from accelerate.utils import gather_object

from ..analysis import shares
from ..losses import code_bounds, joint_gain
from ..records import RolloutGroup
from .estep import Rollout


Sums = dict[str, list[float]]  # name -> [total, weight]; the metric is total / weight
TokenText = Callable[[Sequence[int]], str]


@dataclass
class MetricSums:
    """Weighted averages since the last log line; part of the checkpoint, so that a resumed log is the same."""

    sums: Sums = field(default_factory=dict)

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Takes an average `value` over something of `weight`."""
        self.add_total(name, value * weight, weight)

    def add_total(self, name: str, total: float, weight: float) -> None:
        """Takes a sum over something of `weight`."""
        kept = self.sums.setdefault(name, [0.0, 0.0])
        kept[0] += total
        kept[1] += weight

    def add_sums(self, sums: Sums, prefix: str = "") -> None:
        for name, (total, weight) in sums.items():
            self.add_total(prefix + name, total, weight)

    def add_tokens(self, parts: dict[str, float], count: float, processes: int) -> None:
        """Takes what a micro-batch's forward says of its tokens, of which there are `count` on all `processes`; empty
        where this one has none of them."""
        code, latent = ((parts.get(f"{k}_sum", 0.0), parts.get(f"{k}_count", 0.0)) for k in ("code", "latent"))
        both = (code[0] + latent[0], code[1] + latent[1])
        for name, (total, tokens) in {"loss": both, "code_loss": code, "latent_loss": latent}.items():
            self.add_total(f"mstep/{name}", total, tokens)
        if not count:
            return
        # As `SFTTrainer` logs them: means over micro-batches, each over its tokens on all processes.
        for name, of_tokens in (("mean_token_accuracy", "correct_sum"), ("entropy", "entropy_sum")):
            self.add_total(name, parts.get(of_tokens, 0.0) / count, 1 / processes)
        if "aux_loss" in parts:
            self.add("aux_loss", parts["aux_loss"])

    def averages(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self.sums.items() if weight > 0}

    def pop(self) -> dict[str, float]:
        """The averages; starts anew."""
        out = self.averages()
        self.sums = {}
        return out


@dataclass
class PhaseLosses:
    """Losses of a run's updates on this process, by the kind of their phase: sums, and how many updates."""

    sums: Counter[str] = field(default_factory=Counter)
    updates: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, loss: float, last: bool) -> None:
        """Takes a micro-batch's share of an update's loss, of which it may be the `last`."""
        self.sums[kind] += loss  # type: ignore[assignment]
        self.updates[kind] += last

    def averages(self) -> dict[str, float]:
        """Mean loss of the updates of each kind that there were, of all processes together; each must call it."""
        shares = gather_object([self.sums])
        return {kind: sum(share[kind] for share in shares) / n for kind, n in self.updates.items() if n}


_FEWEST, _MOST = 5, 10  # updates that a bound of the hold is taken over


@dataclass
class GateHold:
    """Whether P(think) is held where it was at the start.

    Where a model's own comments nearly always harm, any objective trains it never to think before comments can
    improve, and from there it does not recover. So until latents are known to pay, the gate has no slope and is
    anchored to its start ([`~ra3_trl.losses.estep.gate_anchor`]), while the latents are trained. They pay when the
    lower bound (mean less two standard errors, over the last 5 to 10 updates) of what those of a boundary bring
    together, averaged where the model thinks, is above the penalty. The hold comes back when P(think), where latents
    pay, is known in the same way to have fallen below half of what it was at the start.

    Measured (benchmarks/gate_testbed.py; comments 10 % right at the start): see docs/design.md. What else was tried:
    pushing the gate up only is a ratchet on the noise of the gain (P(think) 0.99 before the lines where comments can
    pay and 0.92 before the others after 24 updates, gain still below 0); no slope and no anchor lets it drift with the
    weights it shares with the latents (0.99 and 0.88).
    """

    mode: str
    penalty: float
    released: bool = False
    updates: int = 0
    gains: list[float] = field(default_factory=list)  # of the last updates while held
    kept: list[float] = field(default_factory=list)  # share of P(think) that is left, of the last updates while free

    @property
    def holds(self) -> bool:
        return self.mode == "always" or (self.mode == "auto" and not self.released)

    def update(self, gain: float, kept: float | None = None) -> None:
        """Takes one update's joint gain of the latents where the model thinks, in nats, and the share of the start's
        P(think) that is left where they pay (`None` where none did)."""
        if not math.isfinite(gain):
            return  # an overflow says nothing
        self.updates += 1
        if not self.released:
            self.gains = [*self.gains, gain][-_MOST:]
            if _bound(self.gains, -2.0) > self.penalty:
                self.released, self.gains = True, []
        elif kept is not None:
            self.kept = [*self.kept, kept][-_MOST:]
            if _bound(self.kept, 2.0) < 0.5:
                self.released, self.kept = False, []

    @property
    def message(self) -> str:
        """What to tell the user when the E-phase ends with the gate still held."""
        if not self.gains:
            return (
                "P(think) was lost where latents pay and is held again since (gate_hold='auto'): lower "
                "`e_learning_rate`, or take more documents an update."
            )
        gain = fmean(self.gains)
        if _bound(self.gains, 2.0) < 0:
            return (
                f"After {self.updates} E-updates latents bring {gain:+.3f} nats where the model thinks: its comments "
                "harm, and P(think) was held where it began (gate_hold='auto'). More samples do not mend that; begin "
                "with a cold start (docs/cold_start.md): `ra3 annotate --annotator trace`, `ra3 train --e_steps 0` on "
                "what comes out, then this run."
            )
        return (
            f"After {self.updates} E-updates latents bring {gain:+.3f} nats where the model thinks, not known to be "
            f"above the penalty {self.penalty}: P(think) was held where it began (gate_hold='auto'). Few latents will "
            "pay for themselves in annotation: use a larger `num_latents` or more `e_steps`."
        )


def _bound(values: Sequence[float], errors: float) -> float:
    """Mean plus so many standard errors; of too few values the bound that says nothing."""
    if len(values) < _FEWEST:
        return math.copysign(math.inf, errors)
    return fmean(values) + errors * stdev(values) / math.sqrt(len(values))


@dataclass
class Sameness:
    """What the last latents said, one a document where the model thinks most, and how much better they did there than
    another document's: whether a run goes bland."""

    texts: list[str] = field(default_factory=list)
    over_other: list[float] = field(default_factory=list)  # nats, of the last updates

    def update(self, texts: Sequence[str], over_other: float | None) -> None:
        self.texts = [*self.texts, *texts][-64:]
        if over_other is not None:
            self.over_other = [*self.over_other, over_other][-_MOST:]

    @property
    def shares(self) -> tuple[float, str, float]:
        """Share of different latents, the one written most often, and its share."""
        return shares(Counter(self.texts))

    def message(self, tolerance: float, penalty: float) -> str | None:
        """What is wrong, or `None`: one latent is more than `tolerance` of all, and another document's does as well as
        the own one, but for less than the `penalty`."""
        if len(self.texts) < 16 or not self.over_other:
            return None
        _, text, share = self.shares
        difference = fmean(self.over_other)
        if share <= tolerance or difference >= penalty:
            return None
        return (
            f"the latents are bland: {share:.0%} of the last {len(self.texts)} are {text.strip()!r}, and a latent "
            f"brings {difference:+.2f} nats more than another document's, less than the penalty {penalty}"
        )


def rollout_sums(
    rollouts: Sequence[Rollout],
    token_text: TokenText,
    known_lines: int = 1,
    objective: str = "multi_sample",
    penalty: float = 0.0,
) -> Sums:
    """Numbers of a batch of rollouts (docs/logging.md): total and weight, so that batches and processes can be added
    up. Latents that were not the policy's own (`view`) knew the next `known_lines`; they pay where what they bring
    together, by the `objective`, is above the `penalty`."""
    sums = MetricSums()
    for rollout in rollouts:
        group, weight = rollout.group, rollout.weight_T
        origin = "" if group.view is None else "hindsight/"
        bounds = code_bounds(group, weight)
        if rollout.scored_live:
            sums.add_total(origin + "elbo", -bounds.elbo, bounds.tokens)  # lower is better, as held-out
        sums.add_total("code_loss", -bounds.log_likelihood, bounds.tokens)
        if not group.boundaries:
            continue
        if group.log_ratio_TG is not None:
            sums.add_total("hindsight/log_ratio", float(group.log_ratio_TG.sum()), group.log_ratio_TG.numel())
        gate_A, gain = group.decision_logps_A.exp(), rollout.returns.gain_TG.mean(1)
        gate, together = weight * gate_A[list(group.boundaries)], joint_gain(rollout.returns.gain_TG, objective)
        reward, total = rollout.returns.latent_TG.mean(1), float(weight.sum())
        sums.add_total(origin + "reward", float((weight * reward).sum()), total)
        sums.add_total(origin + "gain", float((weight * gain).sum()), total)
        sums.add_total(origin + "gate_weighted_gain", float((gate * gain).sum()), float(gate.sum()))
        sums.add_total(origin + "gate_weighted_joint_gain", float((gate * together).sum()), float(gate.sum()))
        if origin == "":
            _add_kept(sums, rollout, together > penalty)
        # Think rate and duration are of all boundaries, not only of tried ones.
        boundaries = group.document.boundaries
        sums.add_total("think_rate", float(gate_A[list(boundaries)].sum()), len(boundaries))
        sums.add_total("tried_rate", len(group.boundaries), len(boundaries))
        lines = sum(not action.comment for action in group.document.actions)
        sums.add_total("duration", lines, float(gate_A.sum()))
        for name, term_TG in rollout.terms.items():
            for kind, value_T in (("mean", term_TG.mean(1)), ("std", term_TG.std(1, correction=0))):
                sums.add_total(f"{origin}rewards/{name}/{kind}", float((weight * value_T).sum()), total)
        horizon = group.latent_line_logps_TGH.shape[2]
        _add_latents(sums, group, token_text, origin, horizon if group.view is None else max(horizon, known_lines))
    return sums.sums


def _add_kept(sums: MetricSums, rollout: Rollout, pays_T: torch.Tensor) -> None:
    """The tokens' P(think) where latents pay, as a share of what it was at the start."""
    for chunk in rollout.chunks:
        if chunk.reference is None:
            return
        where = rollout.weight_T[chunk.boundaries] * pays_T[chunk.boundaries]
        now = rollout.group.gate_logps_A[list(rollout.group.boundaries[chunk.boundaries])].exp()
        start = chunk.reference.gate_T.exp().cpu()
        sums.add_total("gate_kept", float((where * now).sum()), float((where * start).sum()))


def _add_latents(sums: MetricSums, group: RolloutGroup, token_text: TokenText, origin: str, lines: int) -> None:
    """Numbers of what the latents say, beside the next `lines`: those they are credited with, or knew."""
    for boundary, row in zip(group.boundaries, group.latents, strict=True):
        line = token_text(group.document.lines_from(boundary, lines))
        texts = [token_text(z.token_ids) for z in row]
        if len(texts) > 1:
            sums.add_total(origin + "same_rate", 1 - (len(set(texts)) - 1) / (len(texts) - 1), 1)
        for z, text in zip(row, texts, strict=True):
            sums.add_total(origin + "latent_length", len(z.token_ids), 1)
            sums.add_total(origin + "entropy", -sum(z.logps), len(z.logps))
            sums.add_total(origin + "copy_rate", copy_rate(text, line), 1)
            sums.add_total(origin + "wordless_rate", not any(c.isalnum() for c in text), 1)
            sums.add_total(origin + "foreign_rate", is_foreign(text, line), 1)


def is_foreign(latent: str, line: str) -> bool:
    """Whether most of the latent's letters are of an alphabet other than ASCII's, and the line has none such."""
    letters = [c for c in latent if c.isalpha()]
    return sum(not c.isascii() for c in letters) * 2 > len(letters) and line.isascii()


def copy_rate(latent: str, line: str) -> float:
    """Share of the latent's words that stand in the next lines."""
    words = latent.split()
    return sum(word in line for word in words) / len(words) if words else 0.0


def latent_alarms(metrics: dict[str, float]) -> list[str]:
    """What is wrong with a batch of latents, in words; `metrics` are averages of `rollout_sums`, those of proposals in
    hindsight under `hindsight/`."""
    proposed = {
        name.removeprefix("hindsight/"): value for name, value in metrics.items() if name.startswith("hindsight/")
    }
    return _alarms(metrics) + [f"proposed in hindsight, {alarm}" for alarm in _alarms(proposed, "proposal_kl_coef")]


def _alarms(metrics: dict[str, float], dearer: str = "penalty") -> list[str]:
    alarms = []
    if metrics.get("wordless_rate", 0) > 0.5:
        alarms.append("more than half of the latents hold no letter or digit (drift into emptiness): raise `kl_coef`.")
    if metrics.get("same_rate", 0) > 0.9:
        alarms.append("nearly all latents of a boundary are the same: raise `temperature`.")
    if metrics.get("foreign_rate", 0) > 0.5:
        alarms.append("more than half of the latents are written in another alphabet than the code: raise `kl_coef`.")
    if metrics.get("copy_rate", 0) > 0.8:
        alarms.append(f"latents mostly repeat the lines they stand before: raise `{dearer}` or `kl_coef`.")
    return alarms
