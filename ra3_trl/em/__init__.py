"""The EM loop's parts: schedule, E-step, annotation, M-step, evaluation of bounds."""

from .annotate import annotate
from .estep import Rollout, choose_boundaries, count_chunks, estep_backward, roll_out, rollout_sums
from .evaluate import EVAL_NOISE, evaluate_documents, finish_metrics
from .monitor import GateHold, MetricSums, latent_alarms
from .mstep import Rows, mstep_loss, pack, split_example
from .proposals import CAUSAL, Proposal, Proposals, make_proposals, propose
from .rewards import RewardFunc, RewardPlugIns
from .schedule import Phase, Schedule, plan_schedule


__all__ = [
    "CAUSAL",
    "EVAL_NOISE",
    "GateHold",
    "MetricSums",
    "Phase",
    "Proposal",
    "Proposals",
    "RewardFunc",
    "RewardPlugIns",
    "Rollout",
    "Rows",
    "Schedule",
    "annotate",
    "choose_boundaries",
    "count_chunks",
    "estep_backward",
    "evaluate_documents",
    "finish_metrics",
    "latent_alarms",
    "make_proposals",
    "mstep_loss",
    "pack",
    "plan_schedule",
    "propose",
    "roll_out",
    "rollout_sums",
    "split_example",
]
