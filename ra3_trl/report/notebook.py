"""The table of a run in a notebook. Loaded in notebooks only: it needs IPython."""

from __future__ import annotations

from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from .table import COLUMNS, Row, _WithTable


class TableNotebookCallback(_WithTable, NotebookProgressCallback):
    """
    [`~transformers.utils.notebook.NotebookProgressCallback`] with a row of [`UpdateTable`] an update.

    Args:
        table ([`UpdateTable`]):
            Makes the rows.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.training_tracker = NotebookTrainingTracker(state.max_steps, list(COLUMNS))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        pass  # evaluations have a bar of documents

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        if self.training_tracker is None:  # outside of training: all numbers
            super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        self._force_next_update = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.training_tracker = None

    def write_row(self, row: Row) -> None:
        # The tracker takes rows of one first cell for one row.
        held_out = {"update": f"{row['update']}, held out"} if row["phase"] == "held out" else {}
        if self.training_tracker is not None:
            self.training_tracker.write_line(row | held_out)
