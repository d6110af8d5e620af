"""The phases of a run: how long they are, and each one's learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset
from transformers import get_scheduler

from ..config import RA3Config
from .schedule import plan_schedule


class PhaseMixin:
    """Mixed into a `Trainer`; gives it `schedule`."""

    def _plan(self, args: RA3Config, train_dataset: Dataset | IterableDataset | None) -> None:
        updates = None
        if isinstance(train_dataset, Dataset):
            per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
            updates = len(train_dataset) / per_update
            updates = max(1, math.floor(updates) if args.dataloader_drop_last else math.ceil(updates))
        elif train_dataset is None:
            updates = 1  # evaluation only
        self.schedule = plan_schedule(
            args.em_iterations, args.e_steps, args.m_steps, args.max_steps, args.num_train_epochs, updates
        )
        self.asked_max_steps = args.max_steps  # what `ra3_config.json` holds: the length may follow from the data
        args.max_steps = self.schedule.total

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Each phase has its own learning rate and schedule, by transformers' own functions of the step."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        args, schedule = self.args, self.schedule

        def factor_of(kind: str, length: int, rate: float) -> Callable[[int], float]:
            dummy = torch.optim.SGD([torch.zeros(1)], lr=rate or 1.0)  # `min_lr` and `lr_end` are relative to it
            warmup = args.get_warmup_steps(length)
            return get_scheduler(kind, dummy, warmup, max(length, 1), args.lr_scheduler_kwargs).lr_lambdas[0]

        e_factor = factor_of(args.e_lr_scheduler_type, schedule.e_steps, args.e_learning_rate)
        m_factor = factor_of(args.lr_scheduler_type, schedule.m_steps, args.learning_rate)
        ratio = args.e_learning_rate / args.learning_rate if args.learning_rate else 0.0

        def factor(step: int) -> float:
            phase = schedule.phase_at(step)
            return ratio * e_factor(phase.step) if phase.kind == "E" else m_factor(phase.step)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler
