"""`ra3 annotate --dry_run`: what an annotation would take, before anything is spent.

Rows are counted, of long corpora and streams the first ones, which stand for the rest. Time is that of a few rows from
short to long, scaled by boundaries; memory is what these took, the longest among them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from datasets import Dataset

from ..em import Schedule
from ..hub import Corpus, RowAnnotator
from ..policy import Policy
from ..report.estimate import Workload, count_memory
from ..report.summary import duration, peak_memory, size
from .cost import Cost, Phases, Shape, count_passes, this_machine
from .devices import Device
from .estimate import LOOKED_AT, spread, timed


_OF_A_STREAM = 1000  # rows, where nobody knows how many there are
_PARTS = ("parameters", "document cache", "branch cache", "activations", "logits")


@dataclass(frozen=True)
class AnnotationEstimate:
    """All that `ra3 annotate --dry_run` prints: `rows` of the corpus, `None` of a stream, whose workload is that of
    1,000 rows; `broken` of those looked at can't be read. `seconds` are those of each of `processes`."""

    rows: int | None
    looked_at: int
    broken: int
    workload: Workload
    memory: dict[str, int]
    peak: int
    seconds: float
    processes: int
    machine: str

    def render(self) -> str:
        """Writes it as text."""
        w = self.workload
        rows = f"{self.rows:,}" if self.rows is not None else f"a stream; what follows is for {_OF_A_STREAM:,} rows"
        of_each = "in one process" if self.processes == 1 else f"in each of {self.processes} processes"
        parts = "; ".join(f"{name} {size(count)}" for name, count in self.memory.items() if count)
        lines = {
            "Rows": f"{rows}; {self.looked_at:,} looked at, of which {self.broken:,} can't be read",
            "Boundaries": f"about {w.annotated_boundaries:,} in {w.m_chunks:,} chunks",
            "Branches": f"about {w.annotation_branches:,}",
            "Tokens": f"about {w.m_tokens:,} of the corpus",
            "Memory": f"about {size(self.peak)} {of_each} (measured in the timing)",
            "": f"at most {size(sum(self.memory.values()))} beside libraries and data, an arithmetic bound: {parts}",
            "Time": f"about {duration(self.seconds)} {of_each} ({self.machine}; start and writing not counted)",
        }
        return "\n".join(f"{name:11} {text}" for name, text in lines.items())


def estimate_annotation(policy: Policy, corpus: Corpus, processes: int = 1) -> AnnotationEstimate:
    """Counts a corpus and times its annotation on a few rows.

    Raises:
        `ValueError`: if none of the rows looked at can be read.
    """
    annotator, args = RowAnnotator(policy), policy.args
    rows = len(corpus) if isinstance(corpus, Dataset) else None
    looked_at, examples = 0, []
    for row in islice(corpus, LOOKED_AT):
        looked_at += 1
        with suppress(ValueError):
            examples.append(annotator.read(row))
    if not examples:
        raise ValueError(
            f"none of the first {looked_at:,} rows of the corpus can be read; check `dataset_text_field`."
        )
    chunks = [annotator.cut(example) for example in examples]
    sizes = np.array([(sum(len(d.boundaries) for d in c), sum(len(d.input_ids) for d in c)) for c in chunks])
    chosen = spread(sizes, True)
    with policy.inference():
        annotator(examples[int(sizes[:, 1].argmax())])  # the longest; what happens once stays out of the timing
        seconds, _ = timed(lambda: [annotator(examples[int(i)]) for i in chosen], device=args.device)
    share = (_OF_A_STREAM if rows is None else rows) / looked_at
    boundaries, tokens = (sizes.sum(0) * share).tolist()
    latents = 1 if args.annotation == "policy" else args.num_latents
    workload = Workload(
        e_chunks=0,
        e_branches=0,
        e_tokens=0,
        m_chunks=max(1, round(sum(map(len, chunks)) * share)),
        annotated_boundaries=round(boundaries),
        annotation_branches=round(boundaries * latents),
        m_tokens=round(tokens),
    )
    memory = count_memory(policy.backbone, args, Schedule(1, 0, 1), False)
    here = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return AnnotationEstimate(
        rows=rows,
        looked_at=looked_at,
        broken=looked_at - len(examples),
        workload=workload,
        memory={name: memory[name] for name in _PARTS},
        peak=peak_memory(),
        seconds=seconds * boundaries / max(sizes[chosen, 0].sum(), 1) / processes,
        processes=processes,
        machine=here,
    )


def annotation_cost(policy: Policy, estimated: AnnotationEstimate, device: Device, devices: int) -> Cost:
    """Calculates what the annotation would take on devices, and the same for this machine, which was timed."""
    work, args = estimated.workload, policy.args
    line, chunk = (work.m_tokens / max(n, 1) for n in (work.annotated_boundaries, work.m_chunks))

    def phases(processes: int) -> Phases:
        # `ra3 annotate` does row after row: nothing is in lockstep.
        passes = count_passes(work.shared_by(processes), args, chunk, line, together=1)
        return {"annotation": passes["annotation"]}

    return Cost(
        device=device,
        devices=devices,
        shape=Shape.of(policy.backbone.causal_lm),
        phases=phases(devices),
        memory=sum(estimated.memory.values()),
        here=this_machine(args.device, next(policy.model.parameters()).dtype),
        local=phases(estimated.processes),
        timed={"annotation": estimated.seconds},
    )
