"""Data and measures of the replication's domain `traces` for a machine that is lent: all arms in one process.

`python -m benchmarks.gpu.domain data CORPUS SEED ROWS FOLDER [MBPP]` writes `prepare.jsonl` (programs with traces),
`train.jsonl` (the expert's) and `prompts.jsonl` (for GRPO), the last one last.
`python -m benchmarks.gpu.domain measure CORPUS TASKS OUT MBPP NAME=FOLDER ...` writes the measures of each checkpoint.
CORPUS is `traces` or `mbpp`; MBPP is its file, or nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ra3_trl.files import write_whole

from ..common import load, say
from ..replication import cold_measure, real_measure
from ..replication.cold_data import cold_tasks
from ..replication.domain import traces_form
from ..replication.domain_measure import bounds_of
from ..replication.rlvr import trace_prompts
from ..replication.traces import programs


PREPARED, TRAIN, PROMPTS = "prepare.jsonl", "train.jsonl", "prompts.jsonl"


def write_data(corpus: str, seed: str, rows: str, folder: str, mbpp: str = "") -> None:
    """The corpus as files; of MBPP the training split, whose tasks `ra3 rlvr` reads itself."""
    place, count, form = Path(folder), int(rows), traces_form("kinds")
    if corpus == "traces":
        base, ntp = form.bases["strong"], form.ntp
        assert form.rlvr is not None
        _write(place / PREPARED, ({"text": text} for text in programs(base.corpus, base.data_seed, count)["text"]))
        texts = programs(ntp.corpus, base.data_seed + 1 + int(seed), count)["text"]
        prompts: Iterable[Mapping[str, Any]] = trace_prompts(
            replace(form.rlvr, seed=int(seed), prompts=count, steps=1)
        )
    else:
        texts, prompts = [task.text for task in cold_tasks("train", mbpp or None)][:count], ()
    _write(place / TRAIN, ({"text": text} for text in texts))
    _write(place / PROMPTS, prompts)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(dict(row)) + "\n" for row in rows).encode())


def measure(corpus: str, tasks: str, out: str, mbpp: str, *named: str) -> None:
    """What the replication measures on a CPU, of each checkpoint; the same programs for all."""
    count, asked = int(tasks), traces_form("kinds").measures
    found: dict[str, dict[str, Any]] = {}
    for name, _, folder in (one.partition("=") for one in named):
        model, tokenizer = load(folder)
        if torch.cuda.is_available():
            model.cuda()
        if corpus == "traces":
            own = replace(asked.measure, tasks=count, drawn=count)
            found[name] = asdict(real_measure.observe(model, tokenizer, own))
            found[name] |= bounds_of(model, tokenizer, replace(asked.bound, programs=count))
        else:
            assert asked.mbpp is not None
            own_mbpp = replace(asked.mbpp, tasks=count, bounds=count, mbpp=mbpp or None)
            found[name] = asdict(cold_measure.observe(model, tokenizer, own_mbpp))
        say(f"{name}: {found[name]['right']:.3f} right, {found[name]['told_to_think']:.3f} told to think")
    write_whole(out, f"{json.dumps(found, indent=1)}\n".encode())


if __name__ == "__main__":
    (write_data if sys.argv[1] == "data" else measure)(*sys.argv[2:])
