"""What the loop hears of `Trainer`: runs and passes that begin, updates done; and a SIGTERM, by which a cluster takes
a machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .loop import EMLoop


_CHANGED = ("save_only_model", "load_best_model_at_end")


class LoopCallback(TrainerCallback):
    """
    Begins the loop's memory anew, or loads it, with each run, and counts passes and updates.

    Args:
        loop ([`EMLoop`]):
            The loop.

    Attributes:
        resumed_from (`Path` or `None`):
            The checkpoint that the run goes on from; set before it begins.
    """

    def __init__(self, loop: EMLoop):
        self.loop = loop
        self.resumed_from: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Here, and not in `Trainer.train`: with `auto_find_batch_size` a run begins anew after each attempt.
        self.loop.begin_anew()
        if self.resumed_from is not None:
            self.loop.state.load(self.resumed_from, args.process_index, self.loop.policy.model)
            if args.ignore_data_skip:
                self.loop.state.pass_updates = 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loop.state.begin_pass()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loop.state.pass_updates += 1


class PreemptionCallback(TrainerCallback):
    """Saves a checkpoint and stops training after the update in which a SIGTERM came, on whichever process.

    Further SIGTERMs before that change nothing: a cluster sends one to all processes, and their launcher passes its
    own on. Signals can be listened to in the main thread only; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._signalled = False

    @contextmanager
    def listening(self, args: TrainingArguments) -> Iterator[None]:
        """The signal is listened to inside; outside its handler and `args` are what they were."""
        self.asked = self._signalled = False
        changed = {name: getattr(args, name) for name in _CHANGED}
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            for name, value in changed.items():
                setattr(args, name, value)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if any(gather_object([self._signalled])):
            self.asked = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it would take time, and may decide whether to save
            args.save_only_model = args.load_best_model_at_end = False  # the checkpoint must be one to resume from
