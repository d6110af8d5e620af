"""How the abstraction head learns what it decides (`policy/decisions.py`).

E-phase: the gate by what thinking brought on average, gain and spread by regression on what the rollouts measured.
M-phase: the gate imitates the annotation, as the tokens do by next-token training. The head reads detached states and
has an optimizer of its own, so the language model is trained as if it were not there; processes share what they saw
and take the same steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate.logging import get_logger
from torch import nn

from ..config import RA3Config
from ..losses import Returns, compute_returns, gate_slope, log_mean_gain
from ..models import AbstractionConfig, AbstractionHead
from ..policy import HeadDecisions
from ..records import Document, RolloutGroup
from ..rollout import NoiseKey


logger = get_logger(__name__)  # of the main process
_KEPT, _BATCH, _STEPS = 1024, 256, 16  # boundaries remembered, in a batch, and optimizer steps an update


@dataclass(frozen=True)
class Observations:
    """What was learned about `n` boundaries; NaN where it was not.

    `key_n3`: document, chunk and line, which order them, so that processes and batches do not matter.
    `slope_n`: slope of the gate's objective in P(think).
    `placed_n`: 1 where the annotation put a latent, else 0.
    `gain_n`: log of the mean likelihood of the next lines over latents, less their log-likelihood without, in nats.
    `spread_n`: standard deviation of the latents' gains, in nats.
    `weight_n`: how many boundaries one stands for.
    """

    key_n3: torch.Tensor
    states_nD: torch.Tensor
    slope_n: torch.Tensor
    placed_n: torch.Tensor
    gain_n: torch.Tensor
    spread_n: torch.Tensor
    weight_n: torch.Tensor

    def __len__(self) -> int:
        return len(self.key_n3)

    def __getitem__(self, index: torch.Tensor | slice) -> Observations:
        return Observations(*(column[index] for column in vars(self).values()))

    @classmethod
    def joined(cls, parts: Sequence[Observations]) -> Observations:
        return cls(*(torch.cat(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)))

    def in_order(self) -> Observations:
        """Sorted by document, chunk and line; of equals the first stays first."""
        order = torch.arange(len(self))
        for column in (2, 1, 0):
            order = order[self.key_n3[order, column].argsort(stable=True)]
        return self[order]


def boundary_keys(document: Document, boundaries: Sequence[int]) -> torch.Tensor:
    """`[n, 3]`: what orders the boundaries before these actions among all of a window."""
    keys = [(document.doc_id, document.chunk, document.actions[s].index) for s in boundaries]
    return torch.tensor(keys, dtype=torch.int64).reshape(-1, 3)


def observe(group: RolloutGroup, returns: Returns, weight_T: torch.Tensor, args: RA3Config) -> Observations:
    """What a group's rollouts say about its tried boundaries: the slope in the reward's `returns`, whatever they are
    of; gain and spread in nats of the lines' likelihood, as annotation knows it."""
    likelihood = compute_returns(group, args.horizon, args.discount)
    none = torch.full_like(returns.act_T, torch.nan)
    log_think = group.decision_logps_A[list(group.boundaries)]
    slope = gate_slope(returns.gain_TG, log_think, args.penalty, args.objective)
    keys, spread = boundary_keys(group.document, group.boundaries), likelihood.latent_TG.std(1, correction=0)
    gain = log_mean_gain(likelihood.gain_TG)
    return Observations(keys, group.states_at(group.boundaries), slope, none, gain, spread, weight_T)


class HeadLearner(HeadDecisions):
    """
    An abstraction head in training, which decides as it stands; `annotator` decides as it stood when the M-phase
    began, like the weights that annotate.

    Args:
        head ([`~ra3_trl.models.AbstractionHead`]):
            The head, on the device that it learns on.
        args ([`RA3Config`]):
            `gate`, `boundary_*`, `annotation_skip`, `seed`.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Of its own optimizer.
    """

    def __init__(self, head: AbstractionHead, args: RA3Config, learning_rate: float = 1e-3):
        super().__init__(head, args)
        self.annotator = HeadDecisions(head, args)
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
        self.kept: Observations | None = None
        self.noted: list[Observations] = []  # of the batches of the present update

    # ---- learning ----

    def begin_phase(self) -> None:
        """What was seen in the phase before was said by other weights, and in M about another objective."""
        self.kept, self.noted = None, []
        self.annotator = HeadDecisions(copy.deepcopy(self.head), self.args)

    def learn(self, seen: Sequence[Observations], noise: NoiseKey) -> dict[str, tuple[float, float]]:
        """Some optimizer steps on what was seen in an update, by all processes, and before.

        Returns:
            Totals and weights of `head/gain_error`, the mean absolute error in nats before the steps, and of
            `head/gain_spread`, the same of a head that knows the mean only.
        """
        seen = [observations for observations in seen if len(observations)]
        if not seen:
            return {}
        fresh = Observations.joined(seen).in_order()
        measured = fresh.gain_n[fresh.gain_n.isfinite()]
        error = (self.predict(fresh.states_nD)[1] - fresh.gain_n)[fresh.gain_n.isfinite()].abs()
        draw = torch.Generator().manual_seed((noise.seed * 1_000_003 + noise.step) % 2**63)
        if len(fresh) > _KEPT:  # of all documents, not of the last only
            fresh = fresh[torch.randperm(len(fresh), generator=draw)[:_KEPT].sort().values]
        self.kept = fresh if self.kept is None else Observations.joined([self.kept, fresh])[-_KEPT:]
        for _ in range(_STEPS):
            index = torch.randperm(len(self.kept), generator=draw)[:_BATCH]
            self.optimizer.zero_grad()
            head_loss(self.head, self.kept[index.sort().values]).backward()
            self.optimizer.step()
        self.head.trained_on(len(fresh))
        if not len(measured):
            return {}
        spread = (measured - measured.mean()).abs()
        return {
            "head/gain_error": (float(error.sum()), len(error)),
            "head/gain_spread": (float(spread.sum()), len(spread)),
        }

    # ---- checkpoint ----

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a resumed run needs, by name."""
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        tensors |= {f"annotator.{name}": value for name, value in self.annotator.head.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        if self.kept is not None:
            tensors |= {f"kept.{name}": value for name, value in vars(self.kept).items()}
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def load(self, tensors: dict[str, torch.Tensor], trained_on: int) -> None:
        """Takes what `tensors` gave, and how many boundaries the head had learned from."""

        def under(prefix: str) -> dict[str, torch.Tensor]:
            return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}

        self.head.trained_on(trained_on - self.head.config.trained_on)
        self.head.load_state_dict(under("head."))
        self.annotator = HeadDecisions(copy.deepcopy(self.head), self.args)
        self.annotator.head.load_state_dict(under("annotator."))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in under("optimizer.").items():
            i, _, key = name.partition(".")
            state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        kept = under("kept.")
        self.kept = Observations(**kept) if kept else None


def make_learner(args: RA3Config, head: AbstractionHead | None, width: int) -> HeadLearner | None:
    """A learner for the head that came with the model, or for a fresh one; `None` for a run without latents.

    Raises:
        `ValueError`: for a head for states of another size than `width`.
    """
    if not (args.abstraction_head and args.uses_latents):
        return None
    if head is not None and head.config.action_format != args.action_format:
        logger.warning(
            "The checkpoint's abstraction head is for the action format %r; for %r a fresh one is used.",
            head.config.action_format,
            args.action_format,
        )
        head = None
    if head is None:
        alpha = 0.7 if args.prior_alpha is None else args.prior_alpha
        head = AbstractionHead(AbstractionConfig(width, min(max(1 - alpha, 0.01), 0.5)))
    elif head.config.hidden_size != width:
        raise ValueError(
            f"`model` has hidden states of {width} numbers and comes with an abstraction head for "
            f"{head.config.hidden_size}; set `abstraction_head=False` or delete the head's files."
        )
    head.config = replace(head.config, action_format=args.action_format, max_latent_length=args.max_latent_length)
    return HeadLearner(head.to(args.device), args)


def head_loss(head: AbstractionHead, seen: Observations) -> torch.Tensor:
    """Loss of the head on some boundaries, per boundary.

    The gate: whether the objective's slope in P(think) is above 0, weighed by its size. Its optimum is above 1/2 where
    the expected slope is above 0, so it decides as the objective does; but the slope in the log-odds vanishes where p
    has gone to 0 while latents were still bad, and the gate stays shut when they are good. In the M-phase: whether a
    latent was placed.
    Gain and spread: Huber losses, so that a few latents that ruin a line do not decide.
    """
    device = head.inner.weight.device
    logits, *regressed = head(seen.states_nD.to(device))
    in_e = seen.placed_n.isnan()
    label = torch.where(in_e, (seen.slope_n > 0).float(), seen.placed_n).to(device)
    stake = torch.where(in_e, seen.slope_n.abs(), torch.ones(())).to(device)
    loss = stake * nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="none")
    for value, target in zip(regressed, (seen.gain_n.to(device), seen.spread_n.to(device)), strict=True):
        measured = target.isfinite()
        loss = loss + measured * nn.functional.huber_loss(value, torch.where(measured, target, 0.0), reduction="none")
    return (seen.weight_n.to(device) * loss).sum() / len(seen)
