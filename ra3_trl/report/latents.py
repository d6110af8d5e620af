"""Sampled latents with the lines they stand before: a table in the log, a parquet file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyarrow import Table, parquet
from rich import table as rich_table
from rich.console import Console
from transformers import PreTrainedTokenizerBase


_COLUMNS = ("step", "doc_id", "line_number", "think_prob", "latent", "line", "gain", "origin")


def latent_rows(step: int, rollouts: Sequence, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """One row for each latent of rollouts (objects with `.group`, `.returns`); `gain` in nats, that of a
    latent proposed in hindsight (`origin`) with its weighted log pi - log q."""
    rows = []
    for rollout in rollouts:
        group = rollout.group
        for t, boundary in enumerate(group.boundaries):
            action = group.document.actions[boundary]
            line = tokenizer.decode(list(group.document.input_ids[action.start : action.end])).strip()
            p = float(group.gate_logps_A[boundary].exp())
            for g, latent in enumerate(group.latents[t]):
                text = tokenizer.decode(list(latent.token_ids))
                values = (
                    step,
                    group.document.doc_id,
                    action.index,
                    p,
                    text,
                    line,
                    float(rollout.returns.gain_TG[t, g]),
                    "policy" if group.view is None else "hindsight",
                )
                rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return rows


def latent_table(rows: Sequence[dict], title: str, think: str = "#", limit: int = 8) -> rich_table.Table:
    """A rich table of the rows with the largest gains."""
    table = rich_table.Table(title=title, title_justify="left")
    for name, justify in (("gain (nats)", "right"), ("P(think)", "right"), ("latent", "left"), ("next line", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for row in sorted(rows, key=lambda r: -r["gain"])[:limit]:
        cells = [f"{row['gain']:+.2f}", f"{row['think_prob']:.3f}", think + row["latent"], row["line"].split("\n")[0]]
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


class LatentLog:
    """Writes `step_<n>.parquet` and prints a table every `every` updates; `0` is never.

    Args:
        folder (`Path`):
            Where the parquet files go.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            To read the latents.
        every (`int`):
            Updates between tables.
        think (`str`, *optional*, defaults to `"#"`):
            What opens a latent.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, every: int, think: str = "#"):
        self.folder = folder
        self.tokenizer = tokenizer
        self.every = every
        self.think = think
        self._rows: list[dict] = []

    def add(self, step: int, rollouts: Sequence) -> None:
        if not self.every or step % self.every:
            return
        rows = latent_rows(step, rollouts, self.tokenizer)
        if not rows:
            return
        self._rows = rows
        self.folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(Table.from_pylist(rows), self.folder / f"step_{step:06d}.parquet")
        Console(stderr=True).print(
            latent_table(rows, f"Latents at update {step}, largest gains of {len(rows)}", self.think)
        )

    def latest(self, step: int) -> list[dict]:
        """The rows that were written last, by this process or, before `step`, by the one that it goes on from.

        Args:
            step (`int`):
                Updates done; a later file is of another run in the same folder.
        """
        if self._rows:
            return self._rows
        files = {int(path.stem.removeprefix("step_")): path for path in self.folder.glob("step_[0-9]*.parquet")}
        done = [number for number in files if number < step]
        return parquet.read_table(files[max(done)]).to_pylist() if done else []
