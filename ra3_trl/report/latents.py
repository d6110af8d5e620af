"""Sampled latents with the lines they stand before: a table in the log, a parquet file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow import ArrowException, Table, parquet
from rich import table as rich_table
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.integrations import TensorBoardCallback, TrackioCallback
from transformers.trainer_callback import CallbackHandler

from ..files import naming
from ..markdown import cell


_SHOWN = 8  # rows of a printed table
_SENT = ("gain", "think_prob", "line", "doc_id", "line_number")  # to trackers, beside the latent


def latent_rows(step: int, rollouts: Sequence, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """One row for each latent of rollouts (objects with `.group`, `.returns` and `.extra`); `gain` in nats, that of a
    latent proposed in hindsight (`origin`) with its weighted log pi - log q. Further columns are what reward functions
    logged."""
    extra = dict.fromkeys(name for rollout in rollouts for name in rollout.extra)
    rows = []
    for rollout in rollouts:
        group = rollout.group
        for t, boundary in enumerate(group.boundaries):
            action = group.document.actions[boundary]
            of_boundary = {
                "step": step,
                "doc_id": group.document.doc_id,
                "line_number": action.index,
                "think_prob": float(group.gate_logps_A[boundary].exp()),
                "line": str(tokenizer.decode(list(group.document.input_ids[action.start : action.end]))).strip(),
                "origin": "policy" if group.view is None else "hindsight",
            }
            for g, latent in enumerate(group.latents[t]):
                text, gain = tokenizer.decode(list(latent.token_ids)), float(rollout.returns.gain_TG[t, g])
                logged = {name: values[t * group.num_latents + g] for name, values in rollout.extra.items()}
                rows.append(extra | logged | of_boundary | {"latent": text, "gain": gain})
    return rows


def latent_table(rows: Sequence[dict], title: str, think: str = "#") -> rich_table.Table:
    """Makes a rich table of the rows with the largest gains, equal ones once."""
    table = rich_table.Table(title=title, title_justify="left")
    for name in ("gain (nats)", "P(think)", "latent", "next line"):
        table.add_column(name, justify="left" if name in ("latent", "next line") else "right", overflow="fold")
    for row in _largest(rows):
        cells = [f"{row['gain']:+.2f}", f"{row['think_prob']:.3f}", think + row["latent"], row["line"].split("\n")[0]]
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


def latent_markdown(rows: Sequence[dict], think: str = "#") -> str:
    """The same table as Markdown, which TensorBoard shows."""
    lines = ["| gain (nats) | P(think) | latent | next line |", "|---:|---:|---|---|"]
    for row in _largest(rows):
        texts = cell(think + row["latent"]), cell(row["line"].split("\n")[0])
        lines.append(f"| {row['gain']:+.2f} | {row['think_prob']:.3f} | {texts[0]} | {texts[1]} |")
    return "\n".join(lines)


def send_latents(handler: CallbackHandler, step: int, rows: Sequence[dict], think: str = "#") -> None:
    """Writes latents as text to the trackers of a run that take it: TensorBoard and trackio."""
    for callback in handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("estep/latents", latent_markdown(rows, think), step)
        elif isinstance(callback, TrackioCallback):
            import pandas  # comes with datasets
            import trackio  # installed, since its callback is there

            shown = [{"latent": think + row["latent"]} | {name: row[name] for name in _SENT} for row in _largest(rows)]
            trackio.log({"estep/latents": trackio.Table(dataframe=pandas.DataFrame(shown)), "train/global_step": step})


def _largest(rows: Sequence[dict]) -> list[dict]:
    """Those with the largest gains, equal ones once."""
    different = {(row["latent"], row["line"], row["gain"]): row for row in rows}.values()
    return sorted(different, key=lambda row: -row["gain"])[:_SHOWN]


@dataclass
class LatentLog:
    """Writes `step_<n>.parquet` into `folder`, prints a table and sends it to `trackers` every `every` updates; `0` is
    never.

    `think` is what opens a latent.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    every: int
    think: str = "#"
    trackers: CallbackHandler | None = None
    _rows: list[dict] = field(default_factory=list, init=False)

    def add(self, step: int, rollouts: Sequence) -> None:
        """Logs the rollouts of an update, if it is one that is logged and they have latents."""
        if not self.every or step % self.every or not (rows := latent_rows(step, rollouts, self.tokenizer)):
            return
        self._rows = rows
        self.folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(Table.from_pylist(rows), self.folder / f"step_{step:06d}.parquet")
        title = f"Latents at update {step}, largest gains of {len(rows)}"
        Console(stderr=True).print(latent_table(rows, title, self.think))
        if self.trackers is not None:
            send_latents(self.trackers, step, rows, self.think)

    def latest(self, step: int) -> list[dict]:
        """The rows that were written last, by this process or, before `step`, by the one that it goes on from."""
        if self._rows:
            return self._rows
        files = {int(path.stem.removeprefix("step_")): path for path in self.folder.glob("step_[0-9]*.parquet")}
        earlier = [number for number in files if number < step]  # later ones are of another run in the same folder
        if not earlier:
            return []
        with naming(files[max(earlier)], "delete it", ArrowException, OSError):
            return parquet.read_table(files[max(earlier)]).to_pylist()
