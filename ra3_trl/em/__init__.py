"""The EM loop's parts: schedule, E-step, annotation, M-step, evaluation of bounds."""

from .annotate import annotate
from .estep import Rollout, choose_sites, estep_backward, roll_out, rollout_metrics
from .evaluate import EVAL_NOISE, evaluate_documents, finish_metrics
from .monitor import GateHold, MetricSums, latent_alarms
from .mstep import Rows, mstep_loss, pack, split_example
from .schedule import Phase, Schedule, plan_schedule


__all__ = [
    "EVAL_NOISE",
    "GateHold",
    "MetricSums",
    "Phase",
    "Rollout",
    "Rows",
    "Schedule",
    "annotate",
    "choose_sites",
    "estep_backward",
    "evaluate_documents",
    "finish_metrics",
    "latent_alarms",
    "mstep_loss",
    "pack",
    "plan_schedule",
    "roll_out",
    "rollout_metrics",
    "split_example",
]
