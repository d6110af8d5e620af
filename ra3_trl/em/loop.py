"""The EM loop, an update from top to bottom.

`collect` takes the documents of one update (all micro-batches of an accumulation window) and rolls them out (E-phase)
or annotates them (M-phase); all that processes must agree on is agreed on there, before any loss: the denominator, the
number of batches, and the number of forwards for each of them. `backward` makes loss and gradients of one micro-batch.
So accumulation is exact by construction, and no process waits for another for ever. Nothing here knows a `Trainer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..config import RA3Config
from ..config_fields import row_length
from ..models import BaseWeights, Dropout, FrozenWeights
from ..policy import Policy, annotate_all, first_latent, token_text
from ..records import AnnotatedExample, Document
from ..rewards import RewardPlugIns
from ..rollout import NoiseKey
from ..segmentation import splice
from .estep import EStep, Rollout
from .gradients import Gradients
from .learner import HeadLearner, Observations, observe
from .monitor import MetricSums, PhaseLosses, Sameness, Sums, copy_rate, rollout_sums
from .mstep import Rows, pack
from .next_token import NextToken
from .packing import check_packing
from .schedule import Phase, Schedule
from .state import EMState
from .watch import Watch


logger = get_logger(__name__)  # of the main process


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for its loss.

    `rollouts` in an E-phase, `rows` in an M-phase (`None` on a process that has nothing left). `chunks`: forwards that
    every process does for it; `count`: its boundaries, or tokens, on all processes. `last`: of its window.
    """

    rollouts: tuple[Rollout, ...] = ()
    rows: Rows | None = None
    in_e_phase: bool = False
    chunks: int = 1
    count: float = 0.0
    last: bool = False


@dataclass(frozen=True)
class Window:
    """The batches of one update, and what is the same on all processes: `denominator` (boundaries, or tokens),
    `tokens` of text, and whether training must `stop`."""

    batches: tuple[Batch, ...]
    denominator: float
    tokens: int
    stop: bool = False


@dataclass(frozen=True)
class Share:
    """What one process brings into a window, told to all others: of each batch its forwards and the boundaries or
    tokens that the loss is divided by; tokens of text, metrics, what the head may learn from, what latents say."""

    chunks: list[int]
    counts: list[float]
    tokens: int
    sums: Sums = field(default_factory=dict)
    seen: list[Observations] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


class EMLoop:
    """
    E-phases and M-phases over batches of documents.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            What is trained.
        schedule ([`Schedule`]):
            Which phase an update belongs to.
        learner ([`HeadLearner`], *optional*):
            The abstraction head in training; it is the policy's `head` too.
        plug_ins ([`RewardPlugIns`], *optional*):
            Further terms of the E-step's reward.
        watch ([`Watch`], *optional*):
            What raises alarms and watches the code's own likelihood.
        on_phase (`Callable[[Phase, int], None]`, *optional*):
            Told of a phase and its update's number before its first update.
    """

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule,
        learner: HeadLearner | None = None,
        plug_ins: RewardPlugIns | None = None,
        watch: Watch | None = None,
        on_phase: Callable[[Phase, int], None] = lambda phase, step: None,
    ):
        self.policy = policy
        self.args: RA3Config = policy.args
        self.schedule = schedule
        self.learner = learner
        self.plug_ins = plug_ins
        self.watch = watch
        # Without a watch there is nothing to train on, and rows are those of `evaluate`.
        check_packing(policy.backbone, row_length(policy.args), policy.args.packing and watch is not None)
        self.on_phase = on_phase
        self.on_rollouts: Callable[[int, Sequence[Rollout]], Any] = lambda step, rollouts: None
        self.dropout = Dropout(policy.model)
        self.state = EMState.anew(self.args, learner)
        self.step = 0  # updates done before the present one
        self.next_token = NextToken(policy.backbone, self.args)
        self.next_token.notes_boundaries = learner is not None
        self.compute_loss: Callable[..., torch.Tensor] = self.next_token
        self.losses = PhaseLosses()

    def begin_anew(self) -> None:
        """Forgets all but the weights, the head's among them."""
        self.state = EMState.anew(self.args, self.learner)
        self.losses = PhaseLosses()

    @property
    def phase(self) -> Phase:
        return self.schedule.phase_at(self.step)

    @property
    def noise(self) -> NoiseKey:
        return NoiseKey(self.args.seed, self.phase.number, self.step)

    @property
    def may_hold(self) -> bool:
        """Whether the tokens' gate is held, or might be again."""
        return self.args.gate == "head" or self.args.gate_hold != "never"

    @property
    def holds_gate(self) -> bool:
        """Whether the tokens' gate stays where it began: until latents pay, or because the head's is the gate."""
        return self.args.gate == "head" or self.state.gate_hold.holds

    # ---- one update ----

    def collect(self, documents: Sequence[list[Document]], num_batches: int, step: int) -> Window | None:
        """Makes the batches of update `step` from the documents of this process; `None` where no process has any.

        Args:
            documents (`Sequence[list[Document]]`):
                A list for each micro-batch, at most `num_batches` of them: a stream may end within a window, on one
                process or on all. It is filled up with empty batches then, since `Trainer` steps after so many.
        """
        if not any(gather_object([len(documents)])):
            return None
        batches = [*documents, *([[]] * (num_batches - len(documents)))]
        self.step = step
        phase = self.phase
        if phase.step == 0:
            self.on_phase(phase, step)
            self.begin(phase)
        with self.policy.inference(whole=False):
            prepared, own = (self.roll_out if phase.kind == "E" else self.annotate)(batches)
        shares: list[Share] = gather_object([own])
        # Gradients are exchanged in the last pass of a batch: with several processes there must be one.
        least = 1 if len(shares) > 1 else 0
        chunks = [max(least, *(share.chunks[i] for share in shares)) for i in range(num_batches)]
        counts = [sum(share.counts[i] for share in shares) for i in range(num_batches)]
        stop = False
        if phase.kind == "E":
            stop = self.observe([r for batch in prepared for r in batch.rollouts], shares)
            self.learn([seen for share in shares for seen in share.seen])
        window = tuple(
            replace(batch, chunks=chunks[i], count=counts[i], last=i + 1 == num_batches)
            for i, batch in enumerate(prepared)
        )
        self.next_token.num_batches = max(1, sum(count > 0 for count in counts))
        return Window(window, max(sum(counts), 1.0), sum(share.tokens for share in shares), stop)

    def begin(self, phase: Phase) -> None:
        """Starts a phase: takes the snapshots it needs and measures the probe."""
        args, state, model = self.args, self.state, self.policy.model
        if self.learner is not None:
            self.learner.begin_phase()
        if phase.kind == "E":
            # What was lost is lost since this start, and what was said before an M-phase is said no more.
            state.gate_hold.kept, state.sameness = [], Sameness()
            if args.kl_coef or self.may_hold:
                state.frozen["start"] = FrozenWeights(model)
            if args.reward_model == "frozen":
                state.frozen["reward"] = FrozenWeights(model)
            if self.watch is not None:
                self.watch.begin(state)
        elif args.uses_latents:
            if phase.iteration + 1 == self.schedule.iterations:  # no E-phase comes that would need these
                state.frozen.clear()
            state.frozen["annotator"] = FrozenWeights(model)
            if args.e_steps and state.gate_hold.holds and state.gate_hold.updates:
                logger.warning(state.gate_hold.message)

    def backward(self, batch: Batch, denominator: float, gradients: Gradients) -> float:
        """Makes loss and gradients of one micro-batch; the loss is its share of the window's."""
        begin = time.perf_counter()
        self.dropout.switch(on=self.args.disable_dropout is False or not batch.in_e_phase)
        if batch.in_e_phase:
            loss = self._backward_e(batch, denominator, gradients)
        else:
            loss = self._backward_m(batch, denominator, gradients)
            if batch.last and self.learner is not None:
                self.learn(gather_object(self.learner.noted))
                self.learner.noted = []
        # A surrogate of policy gradients and cross-entropy are never averaged with each other.
        name, kind = ("estep/loss", "E") if batch.in_e_phase else ("loss", "M")
        self.state.metrics.add_total(name, loss, batch.last / self.args.world_size)
        self.losses.add(kind, loss, batch.last)
        self.state.metrics.add("seconds/update", time.perf_counter() - begin)
        return loss

    # ---- E ----

    @property
    def estep(self) -> EStep:
        """The E-step of the present update."""
        base = self.args.reward_model == "base"
        reward = BaseWeights(self.policy.model) if base else self.state.frozen.get("reward")
        start = self.state.frozen.get("start") if self.args.kl_coef or self.may_hold else None
        return EStep(self.policy, self.args, reward, start, self.plug_ins)

    def roll_out(self, batches: Sequence[list[Document]]) -> tuple[list[Batch], Share]:
        """Rolls out the documents of all batches at once."""
        engine, metrics = self.policy.engine, self.state.metrics
        if self.plug_ins is not None:
            self.plug_ins.log_metric = metrics.add
        begin, scored = time.perf_counter(), engine.score_seconds
        estep = self.estep
        rollouts = estep.roll_out([d for batch in batches for d in batch], self.noise)
        over_other = estep.over_other(rollouts)
        scored = engine.score_seconds - scored
        metrics.add("seconds/score", scored)
        metrics.add("seconds/rollout", time.perf_counter() - begin - scored)
        prepared = [Batch(tuple(of_batch), in_e_phase=True) for of_batch in _split(rollouts, batches)]
        # The head learns from the policy's own latents, whose gate it is.
        own = [r for r in rollouts if self.learner is not None and r.group.boundaries and r.group.view is None]
        ordered = [r for batch in prepared for r in batch.rollouts]
        sums = rollout_sums(ordered, self._text, self.policy.proposer.lines, self.args.objective, self.args.penalty)
        if over_other:
            sums["gain_over_other"] = [sum(over_other), float(len(over_other))]
        return prepared, Share(
            [len(estep.forwards(batch.rollouts)) for batch in prepared],
            [float(sum(len(r.group.document.boundaries) for r in batch.rollouts)) for batch in prepared],
            sum(len(d.input_ids) for batch in batches for d in batch),
            sums,
            [observe(r.group, r.returns, r.weight_T, self.args) for r in own],
            [self._text(first_latent(r.group)) for r in ordered if r.group.boundaries and r.group.view is None],
        )

    def observe(self, rollouts: Sequence[Rollout], shares: Sequence[Share]) -> bool:
        """Notes what one update's rollouts say, those of all processes together, moves the gate's hold, raises alarms;
        whether training must stop."""
        together = MetricSums()
        for share in shares:
            together.add_sums(share.sums)
        averages, state = together.averages(), self.state
        for name, value in averages.items():
            state.metrics.add(f"estep/{name}", value)
        if "gain" in averages:
            held = state.gate_hold.holds
            state.gate_hold.update(averages.get("gate_weighted_joint_gain", 0.0), averages.get("gate_kept"))
            if held and not state.gate_hold.holds:
                logger.info("update %d: latents pay where the model thinks; P(think) is free", self.step)
            if state.gate_hold.holds and not held:
                logger.info("update %d: P(think) has been lost where latents pay; it is held again", self.step)
            state.metrics.add("estep/gate_held", float(state.gate_hold.holds))
        texts = [text for share in shares for text in share.texts]
        if texts:
            state.sameness.update(texts, averages.get("gain_over_other"))
            distinct, _, most_frequent = state.sameness.shares
            state.metrics.add("estep/distinct_rate", distinct)
            state.metrics.add("estep/most_frequent_rate", most_frequent)
        self.on_rollouts(self.step, rollouts)
        if self.watch is None:
            return False
        if {"gain", "hindsight/gain"} & set(averages):
            self.watch.alarm(averages, state, self.step)
        harmed = self.watch.code_is_harmed(state, self.phase, self.step)
        return self.watch.ends_bland(state, self.phase, self.schedule.m_steps, self.step) or harmed

    def _backward_e(self, batch: Batch, denominator: float, gradients: Gradients) -> float:
        loss, parts = self.estep.backward(batch.rollouts, denominator, self.holds_gate, gradients, batch.chunks)
        share = sum(len(r.group.document.boundaries) for r in batch.rollouts) / denominator
        for name, value in parts.items():
            self.state.metrics.add_total(f"estep/loss_{name}", value, share)
        return loss

    # ---- M ----

    def annotate(self, batches: Sequence[list[Document]]) -> tuple[list[Batch], Share]:
        """Annotates the documents with the weights, and the head, as they were when the phase began."""
        flat = [document for batch in batches for document in batch]
        if self.args.uses_latents:
            begin = time.perf_counter()
            policy = self.policy if self.learner is None else self.policy.changed(head=self.learner.annotator)
            with self.state.frozen["annotator"].applied(), self.policy.backbone.gathered():
                examples = annotate_all(policy, flat, self.noise)
            self.state.metrics.add("seconds/annotate", time.perf_counter() - begin)
            self._log_annotation(examples)
        else:
            examples = [splice(document, {}) for document in flat]
        args = self.args
        rows = [pack(own, row_length(args), args.packing) if own else None for own in _split(examples, batches)]
        counts = [0.0 if r is None else float(r.num_tokens) for r in rows]
        tokens = sum(len(example.input_ids) for example in examples)
        return [Batch(rows=r) for r in rows], Share([1] * len(rows), counts, tokens)

    def _log_annotation(self, examples: Sequence[AnnotatedExample]) -> None:
        metrics, proposer = self.state.metrics, self.policy.proposer
        boundaries = sum(len(e.document.boundaries) for e in examples)
        if boundaries:
            metrics.add("mstep/annotated_rate", sum(len(e.placed) for e in examples) / boundaries, boundaries)
        lines = max(self.args.horizon, proposer.lines)
        for e in examples:
            for size in e.sizes.values():
                metrics.add("mstep/effective_size", size)
            for worth in e.worth.values():
                metrics.add("mstep/placed_gain", worth)
            for boundary, latent in e.placed.items():
                following = self._text(e.document.lines_from(boundary, lines))
                metrics.add("mstep/copy_rate", copy_rate(self._text(latent.token_ids), following))
            # Spliced tokens need not be those that the tokenizer would make of the annotated text.
            ids = e.input_ids[e.document.context :]
            again = self.policy.tokenizer(self._text(ids), add_special_tokens=False)["input_ids"]
            metrics.add("mstep/retokenized_differs", float(tuple(again) != ids))

    def _backward_m(self, batch: Batch, denominator: float, gradients: Gradients) -> float:
        metrics, processes = self.state.metrics, self.args.world_size
        if batch.rows is None:
            metrics.add_tokens({}, batch.count, processes)
            loss = self.policy.backbone.idle(gradients.through)
            gradients.backward(loss)
            return float(loss.detach())
        model, inputs = gradients.through or self.policy.model, self.next_token.inputs(batch.rows)
        loss = self.compute_loss(model, inputs, num_items_in_batch=denominator) / self.args.world_size
        gradients.backward(loss)
        for parts, seen in self.next_token.read():
            if self.learner is not None and seen is not None:
                self.learner.noted.append(seen)
            metrics.add_tokens(parts, batch.count, processes)
        return float(loss.detach())

    # ---- both ----

    def pop_metrics(self) -> dict[str, float]:
        """Averages of all processes since the last log line; starts anew."""
        together = MetricSums()
        for sums in gather_object([self.state.metrics.sums]):
            together.add_sums(sums)
        self.state.metrics.pop()
        return together.averages()

    def learn(self, seen: list[Observations]) -> None:
        """Lets the abstraction head learn from what all processes saw in an update."""
        if self.learner is None:
            return
        # In full precision whatever the run's is: an M-update learns inside the trainer's autocast.
        with torch.autocast(self.policy.backbone.device.type, enabled=False):
            errors = self.learner.learn(seen, self.noise)
        for name, sums in errors.items():
            self.state.metrics.add_total(name, *sums)

    def _text(self, ids: Sequence[int]) -> str:
        return token_text(self.policy.tokenizer, ids)


def _split(flat: Sequence[Any], like: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """What was made of documents, in the batches that these were in; `flat` may hold several rounds of them."""
    items = iter(flat)
    batches: list[list[Any]] = [[] for _ in like]
    for _ in range(len(flat) // max(sum(map(len, like)), 1)):
        for batch, documents in zip(batches, like, strict=True):
            batch += [next(items) for _ in documents]
    return batches
