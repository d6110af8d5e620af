"""What a run watches: alarms about the latents, and the likelihood of the code itself."""

from __future__ import annotations

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import IterableDataset

from ..losses import renormalise
from ..records import Document
from ..segmentation import row_to_document
from .monitor import latent_alarms


logger = get_logger(__name__)  # of the main process
_PROBE_DOCUMENTS = 8


class WatchMixin:
    """Mixed into a `Trainer` with `gate_hold`, `metrics`, `engine`, `schedule` and `probe_baseline`."""

    _probe: tuple[Document, ...] = ()  # part of the checkpoint: a resumed stream is read from elsewhere
    _alarmed: frozenset[str] = frozenset()

    def _alarm(self, named: dict[str, float]) -> None:
        alarms = latent_alarms(named)
        if "gain" in named and self.gate_hold.holds and self.gate_hold.mode == "auto":
            alarms.append(
                "the model's own latents cost more than they bring where it thinks: P(think) is held where it "
                "began until they pay (gate_hold='auto')."
            )
        for alarm in alarms:
            if alarm not in self._alarmed:
                self._alarmed |= {alarm}
                logger.warning("update %d: %s", self.state.global_step, alarm)

    def _probe_loss(self) -> float:
        """Cross-entropy per code token without latents on a few training documents, always the same ones, which the
        processes share out."""
        if not self._probe:
            rows = (row_to_document(row) for row in self.train_dataset)
            with_boundaries = (document for document in rows if document.boundaries)
            first = [d for _, d in zip(range(_PROBE_DOCUMENTS), with_boundaries, strict=False)]
            rank, processes = self.args.process_index, self.args.world_size
            own_rows = isinstance(self.train_dataset, IterableDataset)  # a stream is shared out already
            self._probe = tuple(first[: -(-_PROBE_DOCUMENTS // processes)] if own_rows else first[rank::processes])
        with torch.no_grad(), self._evaluating(), self.compute_loss_context_manager(), self.backbone.gathered():
            groups = [self.engine.trunk(document) for document in self._probe]
        # Renormalised: a gate that opens takes mass from the raw lines without harming the code.
        total = sum(float(renormalise(g.line_logps_A, g.gate_logps_A).double().sum()) for g in groups)
        tokens = sum(a.end - max(a.start, 1) for d in self._probe for a in d.actions)
        totals, counts = zip(*gather_object([(total, tokens)]), strict=True)
        return -sum(totals) / max(sum(counts), 1)

    def _watch_code_loss(self) -> None:
        """Every tenth of an E-phase: stop when the likelihood of the code itself has been damaged."""
        phase = self.schedule.phase_at(self.state.global_step)
        if phase.step == 0 or phase.step % max(1, phase.length // 10):
            return
        rise = self._probe_loss() - self.probe_baseline
        self.metrics.add("estep/code_loss_rise", rise)
        if rise > self.args.code_loss_tolerance:
            logger.warning(
                "update %d: the cross-entropy of code without latents rose by %.3f nats per token in this E-phase, "
                "past code_loss_tolerance=%s; training stops. Lower `e_learning_rate` (now %g) or raise `kl_coef`.",
                self.state.global_step, rise, self.args.code_loss_tolerance, self.args.e_learning_rate,
            )  # fmt: skip
            self.control.should_training_stop = True
