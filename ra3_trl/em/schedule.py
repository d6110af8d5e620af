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

    def left_after(self, global_step: int) -> dict[str, int]:
        """Counts the updates of each kind of phase that follow `global_step` finished ones.

        >>> Schedule(2, 3, 5).left_after(9)
        {'E': 2, 'M': 5}
        """
        whole, within = divmod(global_step, self.e_steps + self.m_steps)
        e_updates = (self.iterations - whole) * self.e_steps - min(within, self.e_steps)
        return {"E": e_updates, "M": self.total - global_step - e_updates}


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
            if not num_train_epochs > 0:
                raise ValueError(f"`num_train_epochs` is {num_train_epochs}; it must be above 0, or set `m_steps`.")
            # Rounded up as `Trainer` does, and so that the last iteration leaves no document out.
            m_steps = -(-math.ceil(num_train_epochs * updates_per_epoch) // iterations)
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
    """The schedule of a run on segmented data; see [`plan_schedule`].

    Raises:
        `ValueError`: also for data of which `dataloader_drop_last` would leave nothing.
    """
    updates: int | None = 1  # evaluation only
    if isinstance(train_dataset, Dataset):
        rows, at_once = len(train_dataset), args.train_batch_size * args.world_size
        batches = rows // at_once if args.dataloader_drop_last else math.ceil(rows / at_once)
        if not batches:
            raise ValueError(
                f"`dataloader_drop_last` is True and leaves nothing of `train_dataset`: {rows} rows are fewer than "
                f"the {at_once} of per_device_train_batch_size={args.per_device_train_batch_size} on all devices; set "
                "it to False, or lower the batch size."
            )
        updates = math.ceil(batches / args.gradient_accumulation_steps)
    elif train_dataset is not None:
        updates = None  # a stream has no length
    return plan_schedule(
        args.em_iterations, args.e_steps, args.m_steps, args.max_steps, args.num_train_epochs, updates
    )


def phase_scheduler(args: RA3Config, schedule: Schedule, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Gives each phase its own learning rate and schedule, by transformers' own functions of the step.

    The M-phase's rates are the optimizer's own, as in `Trainer` (where one is handed over, `args.learning_rate` has no
    part in it); an E-phase's is `args.e_learning_rate`, whatever the optimizer's.
    """

    def factor_of(field: str, length: int, rate: float) -> Callable[[int], float]:
        dummy = torch.optim.SGD([torch.zeros(1)], lr=rate or 1.0)  # `min_lr` and `lr_end` are relative to it
        warmup = args.get_warmup_steps(length)
        kwargs = args.phase_scheduler_kwargs[field]
        return get_scheduler(getattr(args, field), dummy, warmup, max(length, 1), kwargs).lr_lambdas[0]

    e_factor = factor_of("e_lr_scheduler_type", schedule.e_steps, args.e_learning_rate)
    m_factor = factor_of("lr_scheduler_type", schedule.m_steps, float(optimizer.defaults["lr"]))

    def of_group(rate: float) -> Callable[[int], float]:
        ratio = args.e_learning_rate / rate if rate else 0.0

        def factor(step: int) -> float:
            phase = schedule.phase_at(step)
            return ratio * e_factor(phase.step) if phase.kind == "E" else m_factor(phase.step)

        return factor

    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [of_group(rate) for rate in rates])
