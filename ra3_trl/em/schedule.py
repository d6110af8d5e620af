"""Which phase an update belongs to, a pure function of `global_step`, and each phase's learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset, IterableDataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from ..config import RA3Config


@dataclass(frozen=True)
class Phase:
    """`kind` is `"E"` or `"M"`; `step` counts the updates within the phase, of `length` in all."""

    kind: Literal["E", "M"]
    iteration: int
    step: int
    length: int

    @property
    def number(self) -> int:
        """A number for the whole phase, the same all through it; keys the noise."""
        return 2 * self.iteration + (self.kind == "M")


@dataclass(frozen=True)
class Schedule:
    """`iterations` times `e_steps` E-updates and `m_steps` M-updates.

    Example: `Schedule(2, 3, 5).phase_at(9)` is the second E-phase's update 1 of 3.
    """

    iterations: int
    e_steps: int
    m_steps: int

    @property
    def total(self) -> int:
        return self.iterations * (self.e_steps + self.m_steps)

    def phase_at(self, global_step: int) -> Phase:
        """The phase of the update that `global_step` finished updates precede (past the end: the last M-phase's)."""
        cycle = self.e_steps + self.m_steps
        iteration, within = divmod(min(global_step, self.total - 1), cycle)
        if within < self.e_steps:
            return Phase("E", iteration, within, self.e_steps)
        return Phase("M", iteration, within - self.e_steps, self.m_steps)


def plan_schedule(
    iterations: int, e_steps: int, m_steps: int, max_steps: int, num_train_epochs: float, updates_per_epoch: int | None
) -> Schedule:
    """The schedule that config and data give; see `RA3Config.m_steps`.

    Raises:
        `ValueError`: if the length of the M-phase can't be told, or `max_steps` leaves no room for it.
    """
    # Two ways to say the length must agree, or one of them would be ignored.
    if m_steps >= 0 and 0 < max_steps != iterations * (e_steps + m_steps):
        raise ValueError(
            f"`max_steps` is {max_steps}, but em_iterations={iterations} times e_steps={e_steps} + m_steps={m_steps} "
            f"are {iterations * (e_steps + m_steps)} updates; leave one of `max_steps` and `m_steps` out."
        )
    if m_steps < 0:
        if max_steps > 0:
            if max_steps % iterations:
                raise ValueError(
                    f"`max_steps` is {max_steps}, which em_iterations={iterations} can't share out evenly; use a "
                    "multiple."
                )
            m_steps = max_steps // iterations - e_steps
        elif updates_per_epoch is not None:
            # Rounded up, so that the last iteration leaves no document out.
            m_steps = -(-int(num_train_epochs * updates_per_epoch) // iterations)
        else:
            raise ValueError(
                "`max_steps` is -1 and the data is a stream without a length: set `max_steps` or `m_steps`."
            )
    if m_steps < 0 or e_steps + m_steps < 1:
        raise ValueError(
            f"`max_steps` is {max_steps}: too few for em_iterations={iterations} times e_steps={e_steps} updates; "
            "raise it or lower `e_steps`."
        )
    return Schedule(iterations, e_steps, m_steps)


def plan_phases(args: RA3Config, train_dataset: Dataset | IterableDataset | None) -> Schedule:
    """The schedule of a run on segmented data; see [`plan_schedule`]."""
    updates: int | None = 1  # evaluation only
    if isinstance(train_dataset, Dataset):
        per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        share = len(train_dataset) / per_update
        updates = max(1, math.floor(share) if args.dataloader_drop_last else math.ceil(share))
    elif train_dataset is not None:
        updates = None  # a stream has no length
    return plan_schedule(
        args.em_iterations, args.e_steps, args.m_steps, args.max_steps, args.num_train_epochs, updates
    )


def phase_scheduler(args: RA3Config, schedule: Schedule, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Gives each phase its own learning rate and schedule, by transformers' own functions of the step."""

    kwargs = args.lr_scheduler_kwargs
    assert not isinstance(kwargs, str)  # `TrainingArguments` has read the JSON

    def factor_of(kind: str, length: int, rate: float) -> Callable[[int], float]:
        dummy = torch.optim.SGD([torch.zeros(1)], lr=rate or 1.0)  # `min_lr` and `lr_end` are relative to it
        warmup = args.get_warmup_steps(length)
        return get_scheduler(kind, dummy, warmup, max(length, 1), kwargs).lr_lambdas[0]

    e_factor = factor_of(args.e_lr_scheduler_type, schedule.e_steps, args.e_learning_rate)
    m_factor = factor_of(args.lr_scheduler_type, schedule.m_steps, args.learning_rate)
    # The optimizer's own rate is the M-phase's, so the E-phase's is a multiple of it.
    ratio = args.e_learning_rate / args.learning_rate if args.learning_rate else 0.0

    def factor(step: int) -> float:
        phase = schedule.phase_at(step)
        return ratio * e_factor(phase.step) if phase.kind == "E" else m_factor(phase.step)

    return LambdaLR(optimizer, factor)
