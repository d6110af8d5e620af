"""What a run watches: alarms about the latents, and the likelihood of the code itself."""

from __future__ import annotations

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset

from ..losses import renormalise
from ..policy import Policy
from ..segmentation import row_to_document
from .monitor import latent_alarms
from .schedule import Phase
from .state import EMState


logger = get_logger(__name__)  # of the main process
_PROBE_DOCUMENTS = 8
_LESS_BLAND = "raise `kl_coef` or `num_latents`, or lower `e_learning_rate`"


class Watch:
    """
    Watches E-phases.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            The policy in training.
        data (`datasets.Dataset` or `datasets.IterableDataset`):
            Segmented training documents: the first few with boundaries are the probe, always the same ones, which the
            processes share out. Of a stream each process has its own rows already.
    """

    def __init__(self, policy: Policy, data: Dataset | IterableDataset):
        self.policy = policy
        self.data = data

    def begin(self, state: EMState) -> None:
        """Takes the probe's value at the start of an E-phase."""
        state.probe_baseline = self._probe_loss(state)

    def alarm(self, averages: dict[str, float], state: EMState, step: int) -> None:
        """Warns, once each, of what is wrong with an update's latents."""
        alarms = latent_alarms(averages)
        hold = state.gate_hold
        if "gain" in averages and hold.holds and hold.mode == "auto" and hold.updates >= 10:
            alarms.append(
                "the model's own latents are not known to bring more than they cost where it thinks: P(think) is held "
                "where it began until they do (gate_hold='auto')."
            )
        if bland := state.sameness.message(self.policy.args.same_latent_tolerance, self.policy.args.penalty):
            alarms.append(f"{bland}: {_LESS_BLAND}.")
        for alarm in alarms:
            # Of one kind once, whatever numbers stand in it.
            if (kind := alarm.partition(":")[0]) not in state.alarms:
                state.alarms.add(kind)
                logger.warning("update %d: %s", step, alarm)

    def ends_bland(self, state: EMState, phase: Phase, m_steps: int, step: int) -> bool:
        """Whether an E-phase is at its end, its latents are bland, and an M-phase would train on them."""
        args = self.policy.args
        bland = state.sameness.message(args.same_latent_tolerance, args.penalty)
        if bland is None or not m_steps or phase.step + 1 < phase.length:
            return False
        logger.warning(
            "update %d: at the end of the E-phase %s; training stops before the M-phase "
            "(same_latent_tolerance=%s): %s.",
            step, bland, args.same_latent_tolerance, _LESS_BLAND,
        )  # fmt: skip
        return True

    def code_is_harmed(self, state: EMState, phase: Phase, step: int) -> bool:
        """Whether the likelihood of the code itself has been damaged, asked every tenth of an E-phase."""
        if phase.step == 0 or phase.step % max(1, phase.length // 10):
            return False
        args = self.policy.args
        rise = self._probe_loss(state) - state.probe_baseline
        state.metrics.add("estep/code_loss_rise", rise)
        if rise <= args.code_loss_tolerance:
            return False
        logger.warning(
            "update %d: the cross-entropy of code without latents rose by %.3f nats per token in this E-phase, "
            "past code_loss_tolerance=%s; training stops. Lower `e_learning_rate` (now %g) or raise `kl_coef`.",
            step, rise, args.code_loss_tolerance, args.e_learning_rate,
        )  # fmt: skip
        return True

    def _probe_loss(self, state: EMState) -> float:
        """Cross-entropy per code token without latents on the probe."""
        if not state.probe:
            rows = (row_to_document(row) for row in self.data)
            with_boundaries = (document for document in rows if document.boundaries)
            first = [d for _, d in zip(range(_PROBE_DOCUMENTS), with_boundaries, strict=False)]
            args = self.policy.args
            rank, processes = args.process_index, args.world_size
            own_rows = isinstance(self.data, IterableDataset)
            state.probe = tuple(first[: -(-_PROBE_DOCUMENTS // processes)] if own_rows else first[rank::processes])
        with self.policy.inference():
            groups = [self.policy.engine.trunk(document) for document in state.probe]
        # Renormalised: a gate that opens takes mass from the raw lines without harming the code.
        total = sum(float(renormalise(g.line_logps_A, g.gate_logps_A).double().sum()) for g in groups)
        tokens = sum(a.end - max(a.start, 1) for d in state.probe for a in d.actions)
        totals, counts = zip(*gather_object([(total, tokens)]), strict=True)
        return -sum(totals) / max(sum(counts), 1)
