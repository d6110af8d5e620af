"""SIGTERM, by which a cluster takes a machine back: save at the next step and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainingArguments


_CHANGED = ("save_only_model", "load_best_model_at_end", "save_total_limit")


class PreemptionCallback(TrainerCallback):
    """Saves a checkpoint and stops training after the update in which a SIGTERM came, on whichever process.

    A second SIGTERM ends the process at once. Signals can be listened to in the main thread only; elsewhere nothing
    changes.
    """

    def __init__(self):
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

    def _on_signal(self, number, frame) -> None:
        self._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        if any(gather_object([self._signalled])):
            self.asked = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # it would take time, and may decide whether to save
            # The checkpoint must be whole and stay: `Trainer` deletes what is not the best at the end of training.
            args.save_only_model = args.load_best_model_at_end = False
            args.save_total_limit = None
