"""What a run shows while it goes: one short row an update. All other numbers are in the log and in trackers."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy

from ..em import Schedule
from .runs import MIDTRAINING, TrainingRun
from .summary import duration, evaluation_after, measured_after, peak_memory, summary_text


COLUMNS = {"update": 9, "phase": 8, "gain": 7, "think": 6, "code loss": 9, "seconds": 7, "left": 9}  # with widths
_KEYS = {  # of a row's kind: what is shown as gain, think rate and code loss
    "E": ("estep/gain", "estep/think_rate", "estep/code_loss"),
    "M": ("mstep/placed_gain", "mstep/annotated_rate", "mstep/code_loss"),
    "held out": ("eval_gain", "eval_think_rate", "eval_ce"),
}
LEGEND = (
    "gain: nats that a latent brings; think: P(think), in M-phases the share of boundaries with a latent; code loss: "
    "nats a token; left: of training and evaluation, as far as they were timed"
)
Row = dict[str, str]


class UpdateTable:
    """
    Makes the rows of a run, and knows what is left of it.

    Args:
        schedule ([`Schedule`]):
            Which phase an update belongs to.
        held_out (`bool`, *optional*, defaults to `False`):
            Whether there is something to evaluate on: then a run ends with the evaluation after its last update.

    Attributes:
        following (`str`, *optional*):
            What to do next, with which a run ends in words; `None`: it ends without them.
        stopped (`Callable`):
            Whether a run was stopped from outside: of that something else is said.
    """

    def __init__(self, schedule: Schedule, held_out: bool = False):
        self.schedule = schedule
        self.held_out = held_out
        self.following: str | None = None
        self.stopped: Callable[[], bool] = lambda: False
        # The last of a kind of phase, or of "held out".
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self._begin = 0.0

    def begin(self) -> None:
        """An update begins, or what comes between two has ended."""
        self._begin = time.monotonic()

    def end(self, step: int) -> None:
        """The update `step`, counted from 1, has ended."""
        self._seconds[self.schedule.phase_at(step - 1).kind].append(time.monotonic() - self._begin)
        self.begin()

    def row(self, logs: Mapping[str, Any], step: int, evaluations_left: int = 0) -> Row | None:
        """The row of a line of the log, `None` for one that is neither an update's nor an evaluation's."""
        if "phase" in logs:
            phase = self.schedule.phase_at(step - 1)
            kind, name = phase.kind, f"{phase.kind} {phase.step + 1}/{phase.length}"
        elif any(key.startswith("eval_") for key in logs):
            kind, name = "held out", "held out"
            self._seconds[kind].append(float(next((v for k, v in logs.items() if k.endswith("_runtime")), 0.0)))
        else:
            return None
        gain, think, loss = (self._number(logs, key) for key in _KEYS[kind])
        spent = self._seconds[kind]
        return {
            "update": f"{step}/{self.schedule.total}",
            "phase": name,
            "gain": "" if gain is None else f"{gain:+.2f}",
            "think": "" if think is None else f"{think:.3f}",
            "code loss": "" if loss is None else f"{loss:.3f}",
            "seconds": f"{spent[-1]:.1f}" if spent else "",
            "left": self.left(step, evaluations_left),
        }

    @staticmethod
    def _number(logs: Mapping[str, Any], key: str) -> float | None:
        """What is logged under a key; of several evaluation sets, which have their name in it, the first's."""
        # Where all latents are proposed in hindsight, theirs is the gain.
        names = [key, key.replace("estep/", "estep/hindsight/")]
        names += [k for k in logs if key.startswith("eval_") and k.endswith(f"_{key[5:]}")]
        return next((float(logs[name]) for name in names if name in logs), None)

    def left(self, step: int, evaluations: int = 0) -> str:
        """The time that is left; `> ` stands before it where a phase to come was not yet timed; unknown, where none
        was."""
        total, unknown = 0.0, False
        for kind, count in {**self.schedule.left_after(step), "held out": evaluations}.items():
            times = self._seconds[kind]
            unknown |= count > 0 and not times
            total += count * sum(times) / max(len(times), 1)
        if unknown and not total:
            return "unknown"
        return ("> " if unknown else "") + duration(total)


class _WithTable:
    """What the callbacks below share: they feed the table, and write its rows by `write`."""

    _headed = False
    _began = 0.0
    _seconds: float | None = None  # of a run that has ended and did not yet say what it changed

    def __init__(self, table: UpdateTable):
        super().__init__()
        self.table = table

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._began, self._seconds = time.monotonic(), None
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[misc]

    def on_train_end(self, args, state, control, **kwargs) -> None:
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[misc]
        self._seconds = time.monotonic() - self._began
        self._end_in_words(args, state)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        super().on_evaluate(args, state, control, **kwargs)  # type: ignore[misc]
        self._end_in_words(args, state)

    def _end_in_words(self, args: TrainingArguments, state: TrainerState) -> None:
        """Says once, behind a run and the evaluation that follows it, what it changed and what to do next."""
        following, step = self.table.following, measured_after(state, args.load_best_model_at_end)
        if following is None or self._seconds is None or self.table.stopped() or not state.is_world_process_zero:
            return
        if self.table.held_out and not evaluation_after(state, step):
            return  # `trainer.evaluate()` may follow
        run, each = TrainingRun("", MIDTRAINING, state.log_history), " in this process" if args.world_size > 1 else ""
        print(f"{summary_text(run, self._seconds, peak_memory(), step)}{each}\nNext: {following}", flush=True)
        self._seconds = None

    def write(self, text: str) -> None:
        raise NotImplementedError

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.table.begin()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.table.end(state.global_step)
        super().on_step_end(args, state, control, **kwargs)  # type: ignore[misc]

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        row = self.table.row(logs, state.global_step, evaluations_left(args, state)) if state.max_steps else None
        if row is not None and state.is_world_process_zero:
            self.write_row(row)
        self.table.begin()

    def write_row(self, row: Row) -> None:
        if not self._headed:
            self._headed = True
            self.write("  ".join(name.rjust(width) for name, width in COLUMNS.items()))
        self.write("  ".join(row[name].rjust(width) for name, width in COLUMNS.items()))


def evaluations_left(args: TrainingArguments | None, state: TrainerState) -> int:
    """How many evaluations are to come by number of updates; those by epochs are not counted."""
    if args is None or args.eval_strategy != IntervalStrategy.STEPS or not state.eval_steps:
        return 0
    return int(state.max_steps // state.eval_steps - state.global_step // state.eval_steps)


class TableProgressCallback(_WithTable, ProgressCallback):
    """
    [`~transformers.ProgressCallback`] with a table in the place of its logs, and without a bar of batches in
    evaluations, which have one of documents.

    Args:
        table ([`UpdateTable`]):
            Makes the rows.
    """

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        pass

    def write(self, text: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(text)


class TablePrinterCallback(_WithTable, PrinterCallback):
    """
    [`~transformers.PrinterCallback`] with a table in the place of its logs.

    Args:
        table ([`UpdateTable`]):
            Makes the rows.
    """

    def write(self, text: str) -> None:
        print(text, flush=True)


def show_table(handler: CallbackHandler, schedule: Schedule, held_out: bool) -> UpdateTable:
    """Puts a table of `schedule` in the place of what `Trainer` shows by itself; a callback of the user's stays."""
    table = UpdateTable(schedule, held_out)
    for i, callback in enumerate(handler.callbacks):
        handler.callbacks[i] = _with_table(callback, table)
    return table


def _with_table(callback: TrainerCallback, table: UpdateTable) -> TrainerCallback:
    if type(callback) is ProgressCallback:
        return TableProgressCallback(table)
    if type(callback) is PrinterCallback:
        return TablePrinterCallback(table)
    if type(callback).__module__ == "transformers.utils.notebook":  # which needs IPython, so it is not loaded here
        from .notebook import TableNotebookCallback

        return TableNotebookCallback(table)
    return callback
