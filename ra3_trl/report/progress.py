"""Bars: the phase in that of a run (`E-phase 3/20: drawing latents`), and one of documents in an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from trl import RichProgressCallback

from ..em import Schedule


class PhaseProgressCallback(TrainerCallback):
    """
    Writes the phase and its update in front of the bars of [`~transformers.ProgressCallback`] and
    [`~trl.RichProgressCallback`], whichever of them the trainer has. Processes without a bar do nothing.

    Args:
        schedule ([`Schedule`]):
            Which phase an update belongs to.
        handler (`CallbackHandler`):
            The trainer's, where the bars are found; a bar may be added or removed at any time.

    Example:

    ```python
    trainer.add_callback(PhaseProgressCallback(trainer.schedule, trainer.callback_handler))
    ```
    """

    def __init__(self, schedule: Schedule, handler: CallbackHandler):
        self.schedule = schedule
        self.handler = handler

    def text(self, global_step: int) -> str:
        """Names the update after `global_step` finished ones: `M-phase 17/200`, with several iterations
        `M-phase 17/200, iteration 1/2`."""
        phase = self.schedule.phase_at(global_step)
        text = f"{phase.kind}-phase {phase.step + 1}/{phase.length}"
        of = self.schedule.iterations
        return f"{text}, iteration {phase.iteration + 1}/{of}" if of > 1 else text

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.show(f"{self.text(state.global_step)}: learning")

    def on_documents(self, global_step: int) -> None:
        """The documents of the next update, after `global_step` finished ones, are rolled out or annotated."""
        doing = "drawing latents" if self.schedule.phase_at(global_step).kind == "E" else "annotating"
        self.show(f"{self.text(global_step)}: {doing}")

    def show(self, text: str) -> None:
        """Writes `text` in front of the bars."""
        for callback in self.handler.callbacks:
            if isinstance(callback, RichProgressCallback) and callback.training_bar is not None:
                callback.training_bar.update(callback.training_task, description=f"[blue]{text}")
            elif isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(text)


@contextmanager
def evaluation_bar(
    args: TrainingArguments, handler: CallbackHandler, total: int | None
) -> Iterator[Callable[[int], None]]:
    """A bar of an evaluation's documents on the main process; gives the function that takes how many more are done.
    [`~trl.RichProgressCallback`] draws a bar of its own."""
    rich = any(isinstance(callback, RichProgressCallback) for callback in handler.callbacks)
    hidden = bool(args.disable_tqdm) or rich or args.process_index > 0
    with tqdm(total=total, desc="Evaluating", unit="document", leave=False, disable=hidden, dynamic_ncols=True) as bar:
        yield lambda count: bar.update(count) and None


def evaluated_batch(
    handler: CallbackHandler, args: TrainingArguments, state: TrainerState, control: TrainerControl
) -> TrainerControl:
    """Calls `on_prediction_step` of every callback, by which bars of evaluations advance, after a batch of one."""
    # trl's rich bar has nothing to draw on outside of training, and trl 1.16 fails there instead of passing.
    rich = [callback for callback in handler.callbacks if isinstance(callback, RichProgressCallback)]
    if any(callback.evaluation_bar is None for callback in rich):
        return control
    return handler.on_prediction_step(args, state, control)
