"""The documents of one update: collected, rolled out or annotated, and counted over all processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..models import BaseWeights, FrozenWeights
from ..records import AnnotatedExample, Document
from ..rollout import NoiseKey
from ..segmentation import splice
from .annotate import annotate
from .estep import Rollout, copy_rate, count_chunks, roll_out, rollout_sums
from .head import HeadLearner, Observations, observe
from .monitor import MetricSums
from .mstep import pack
from .proposals import CAUSAL, Proposals
from .schedule import Phase


logger = get_logger(__name__)  # of the main process


class WindowMixin:
    """Mixed into a `Trainer` with `engine`, `schedule`, `gate_hold`, `metrics`, `frozen`, `learner` and what
    [`WatchMixin`] has.

    All that processes must agree on is agreed on here, before any loss is computed: the denominator, the number of
    batches, and the number of forwards for each of them. A process with less to do gets empty batches, so that none
    waits for another for ever.
    """

    learner: HeadLearner | None = None
    proposals: Proposals = CAUSAL

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The documents of one update, rolled out (E) or annotated (M), and the number its losses are divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not any(gather_object([len(batches)])):
            return [], None
        # A stream may end within a window, on this process or on all: `Trainer` steps after `num_batches` of them.
        documents = [batch["documents"] for batch in batches] + [[]] * (num_batches - len(batches))
        phase = self.schedule.phase_at(self.state.global_step)
        if phase.step == 0:
            self._begin(phase)
        noise = NoiseKey(self.args.seed, phase.number, self.state.global_step)
        prepare = self._prepare_e if phase.kind == "E" else self._prepare_m
        with torch.no_grad(), self._evaluating(), self.compute_loss_context_manager():
            batches, own = prepare(documents, noise)
        everyone = gather_object([own])
        for i, batch in enumerate(batches):
            batch["chunks"] = max(other["chunks"][i] for other in everyone)
            if len(everyone) > 1:  # gradients are exchanged in the last pass of a batch: there must be one
                batch["chunks"] = max(batch["chunks"], 1)
        self.state.num_input_tokens_seen += sum(other["tokens"] for other in everyone)
        batches[-1]["last"] = True
        if phase.kind == "E":
            self._observe([r for batch in batches for r in batch["rollouts"]], [other["sums"] for other in everyone])
            if self.learner is not None:
                self._learn([seen for other in everyone for seen in other["seen"]])
        return batches, torch.tensor(max(sum(other["count"] for other in everyone), 1.0), device=device)

    @property
    def _holds_gate(self) -> bool:
        """Whether the tokens' gate stays where it began: until latents pay, or because the head's is the gate."""
        return self.args.gate == "head" or self.gate_hold.holds

    def _learn(self, seen: list[Observations]) -> None:
        """The abstraction head learns from what all processes saw in an update."""
        phase = self.schedule.phase_at(self.state.global_step)
        found = self.learner.learn(seen, NoiseKey(self.args.seed, phase.number, self.state.global_step))
        for name, sums in found.items():
            self.metrics.add_total(name, *sums)

    def _begin(self, phase: Phase) -> None:
        """A phase starts: take the snapshots it needs, forget optimizer state, measure the probe."""
        args = self.args
        if args.reset_optimizer and self.state.global_step > 0:
            self.optimizer.state.clear()
        if self.learner is not None:
            self.learner.begin_phase()
        if phase.kind == "E":
            if args.kl_coef or self._holds_gate:
                self.frozen["start"] = FrozenWeights(self.backbone.model)
            if args.reward_model == "frozen":
                self.frozen["reward"] = FrozenWeights(self.backbone.model)
            self.probe_baseline = self._probe_loss()
        elif args.uses_latents:
            if phase.iteration + 1 == self.schedule.iterations:  # no E-phase comes that would need these
                self.frozen.clear()
            self.frozen["annotator"] = FrozenWeights(self.backbone.model)
            if args.e_steps and self.gate_hold.holds and self.gate_hold.updates:
                logger.warning(self.gate_hold.message)

    def _prepare_e(
        self, documents: Sequence[Sequence[Document]], noise: NoiseKey
    ) -> tuple[list[dict], dict[str, Any]]:
        begin, scored = time.perf_counter(), self.engine.score_seconds
        if self.plug_ins is not None:
            self.plug_ins.state = self.state
        start = self.frozen.get("start") if self.args.kl_coef or self._holds_gate else None
        flat = roll_out(
            self.engine,
            sum(documents, []),
            self.args,
            noise,
            self._reward_weights(),
            self.plug_ins,
            start,
            self.learner,
            self.proposals,
        )
        rollouts = self._split(flat, documents)
        scored = self.engine.score_seconds - scored
        self.metrics.add("seconds/score", scored)
        self.metrics.add("seconds/rollout", time.perf_counter() - begin - scored)
        boundaries = sum(len(r.group.boundaries) for batch in rollouts for r in batch)
        own = [r for r in flat if r.group.boundaries and r.view is None]
        learned_from = own if self.learner is not None else []
        return [{"rollouts": batch} for batch in rollouts], {
            "chunks": [count_chunks(self.engine, batch) for batch in rollouts],
            "count": float(boundaries),
            "tokens": sum(len(d.input_ids) for batch in documents for d in batch),
            "sums": rollout_sums([r for batch in rollouts for r in batch], self._decode, self.args.proposal_lines),
            "seen": [observe(r.group, r.returns, r.weight_T, self.args) for r in learned_from],
        }

    def _reward_weights(self) -> FrozenWeights | BaseWeights | None:
        """Weights that score the lines, `None` for the live ones."""
        return BaseWeights(self.backbone.model) if self.args.reward_model == "base" else self.frozen.get("reward")

    @staticmethod
    def _split(flat: Sequence[Any], like: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """What was made of documents, in the batches that these were in; `flat` may have several rounds of them."""
        items = iter(flat)
        found: list[list[Any]] = [[] for _ in like]
        for _ in range(len(flat) // max(sum(map(len, like)), 1)):
            for batch, documents in zip(found, like, strict=True):
                batch += [next(items) for _ in documents]
        return found

    def _observe(self, rollouts: list[Rollout], everyone: list[dict[str, Any]]) -> None:
        """Metrics, gate and alarms of one update's rollouts, those of all processes together."""
        together = MetricSums()
        for sums in everyone:
            together.add_sums(sums)
        named = together.averages()
        for name, value in named.items():
            self.metrics.add(f"estep/{name}", value)
        if "gain" in named:
            held = self.gate_hold.holds
            self.gate_hold.update(named.get("gate_weighted_gain", 0.0))
            if held and not self.gate_hold.holds:
                logger.info("update %d: latents pay where the model thinks; P(think) is free", self.state.global_step)
            self.metrics.add("estep/gate_held", float(self.gate_hold.holds))
        if {"gain", "hindsight/gain"} & set(named):
            self._alarm(named)
        if self.is_world_process_zero():
            self.latent_log.add(self.state.global_step, rollouts)
        self._watch_code_loss()

    def _prepare_m(
        self, documents: Sequence[Sequence[Document]], noise: NoiseKey
    ) -> tuple[list[dict], dict[str, Any]]:
        flat = sum(documents, [])
        if self.args.uses_latents:
            begin = time.perf_counter()
            with self.frozen["annotator"].applied(), self.backbone.gathered():
                examples = [
                    annotate(self.engine, d, self.args, noise, learner=self.learner, proposals=self.proposals)
                    for d in flat
                ]
            self.metrics.add("seconds/annotate", time.perf_counter() - begin)
            self._log_annotation(examples)
        else:
            examples = [splice(document, {}) for document in flat]
        args = self.args
        rows = [pack(b, args.max_length, args.packing) if b else None for b in self._split(examples, documents)]
        tokens = sum(r.num_tokens for r in rows if r is not None)
        return [{"rows": r} for r in rows], {"chunks": [1] * len(rows), "count": float(tokens), "tokens": tokens}

    def _log_annotation(self, examples: list[AnnotatedExample]) -> None:
        boundaries = sum(len(e.document.boundaries) for e in examples)
        if boundaries:
            self.metrics.add("mstep/annotated_rate", sum(len(e.placed) for e in examples) / boundaries, boundaries)
        known = max(self.args.horizon, 1 if self.proposals.causal else self.args.proposal_lines)
        for e in examples:
            for size in e.sizes.values():
                self.metrics.add("mstep/effective_size", size)
            for boundary, latent in e.placed.items():
                line = self._decode(e.document.lines_from(boundary, known))
                self.metrics.add("mstep/copy_rate", copy_rate(self._decode(latent.token_ids), line))
            ids = e.input_ids[e.document.context :]
            again = self.processing_class(self._decode(ids), add_special_tokens=False)["input_ids"]
            self.metrics.add("mstep/retokenized_differs", float(tuple(again) != ids))

    def _decode(self, ids) -> str:
        return self.processing_class.decode(list(ids), clean_up_tokenization_spaces=False)
