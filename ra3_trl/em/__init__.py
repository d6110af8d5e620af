"""The EM loop: schedule, E-step, M-step, what it remembers and watches."""

from .callbacks import LoopCallback, PreemptionCallback
from .checkpoint import (
    FREE_ROOM,
    check_resumable,
    keep_best_alone,
    name_best,
    resumed_folder,
    rotate,
    rotation_taken_over,
    run_settings,
    settle,
    written_whole,
)
from .data import Cutter, collate
from .estep import Chunk, EStep, Rollout
from .gradients import Gradients
from .heldout import evaluate_batches
from .learner import HeadLearner, make_learner
from .logs import log_line
from .loop import Batch, EMLoop, Window
from .monitor import GateHold, MetricSums, latent_alarms, rollout_sums
from .mstep import Rows, mstep_loss, pack, split_example
from .next_token import check_overridden
from .packing import check_packing
from .schedule import Phase, Schedule, phase_scheduler, plan_phases, plan_schedule
from .state import EMState, read_state
from .stream import not_evened_out, stream_loader
from .watch import Watch


__all__ = [
    "Batch",
    "Chunk",
    "Cutter",
    "EMLoop",
    "EMState",
    "EStep",
    "FREE_ROOM",
    "GateHold",
    "Gradients",
    "HeadLearner",
    "LoopCallback",
    "MetricSums",
    "Phase",
    "PreemptionCallback",
    "Rollout",
    "Rows",
    "Schedule",
    "Watch",
    "Window",
    "check_overridden",
    "check_packing",
    "check_resumable",
    "collate",
    "keep_best_alone",
    "evaluate_batches",
    "latent_alarms",
    "log_line",
    "make_learner",
    "mstep_loss",
    "name_best",
    "not_evened_out",
    "pack",
    "phase_scheduler",
    "plan_phases",
    "plan_schedule",
    "read_state",
    "resumed_folder",
    "rotate",
    "rotation_taken_over",
    "rollout_sums",
    "run_settings",
    "settle",
    "split_example",
    "stream_loader",
    "written_whole",
]
