"""SIGTERM, by which a cluster takes a machine back: save at the next step and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object
from transformers import TrainerCallback


class PreemptionCallback(TrainerCallback):
    """Saves a checkpoint and stops training after the update in which a SIGTERM came, on whichever process.

    A second SIGTERM ends the process at once. Signals can be listened to in the main thread only; elsewhere nothing
    changes.
    """

    def __init__(self):
        self.asked = False
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The signal is listened to inside; what handled it before does so again outside."""
        self.asked = self._signalled = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _on_signal(self, number, frame) -> None:
        self._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def on_step_end(self, args, state, control, **kwargs):
        if any(gather_object([self._signalled])):
            self.asked = control.should_save = control.should_training_stop = True
