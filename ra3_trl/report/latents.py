"""Sampled latents with the lines they stand before: a table in the log, a parquet file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyarrow import ArrowException, Table, parquet
from rich import table as rich_table
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from ..files import naming


_SHOWN = 8  # rows of a printed table


def latent_rows(step: int, rollouts: Sequence, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """One row for each latent of rollouts (objects with `.group`, `.returns`); `gain` in nats, that of a
    latent proposed in hindsight (`origin`) with its weighted log pi - log q."""
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
                rows.append(of_boundary | {"latent": text, "gain": gain})
    return rows


def latent_table(rows: Sequence[dict], title: str, think: str = "#") -> rich_table.Table:
    """Makes a rich table of the rows with the largest gains, equal ones once."""
    table = rich_table.Table(title=title, title_justify="left")
    for name in ("gain (nats)", "P(think)", "latent", "next line"):
        table.add_column(name, justify="left" if name in ("latent", "next line") else "right", overflow="fold")
    different = {(row["latent"], row["line"], row["gain"]): row for row in rows}.values()
    for row in sorted(different, key=lambda r: -r["gain"])[:_SHOWN]:
        cells = [f"{row['gain']:+.2f}", f"{row['think_prob']:.3f}", think + row["latent"], row["line"].split("\n")[0]]
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


@dataclass
class LatentLog:
    """Writes `step_<n>.parquet` into `folder` and prints a table every `every` updates; `0` is never.

    `think` is what opens a latent.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    every: int
    think: str = "#"
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
