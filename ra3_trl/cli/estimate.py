"""`ra3 train --dry_run`: what a run would take, before anything is spent.

Documents, boundaries, branches and tokens are counted; memory is arithmetic; hours come from one E-update and one
M-update on two documents, scaled by branches, boundaries and tokens. No optimizer step is taken.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..em import annotate, estep_backward, mstep_loss, pack, roll_out
from ..models import FrozenWeights
from ..records import AnnotatedExample, Document
from ..rollout import NoiseKey
from ..segmentation import row_to_document, splice
from ..trainer import RA3MidTrainer


_LOOKED_AT = 256  # chunks of a stream
_MOST_BOUNDARIES = 16  # boundaries of a document in the timing
_STATES = {"sgd": 0.0, "adafactor": 0.1, "adamw_8bit": 0.5, "adamw_bnb_8bit": 0.5, "paged_adamw_8bit": 0.5}


@dataclass(frozen=True)
class Workload:
    """What a run does, all in all. `e_chunks`, `m_chunks`: documents (chunks of them) that the phases go through.

    Example: 100 chunks of 10 boundaries and 200 tokens, 5 E-updates and one epoch of M-updates at batch 4, G = 4:
    `e_chunks = 20`, `e_branches = 20 * 10 * 4 = 800`, `m_chunks = 100`, `annotated_boundaries = 1000`,
    `m_tokens = 20000`.
    """

    e_chunks: int
    e_branches: int
    e_tokens: int
    m_chunks: int
    annotated_boundaries: int
    annotation_branches: int
    m_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds measured on this machine: per document and per branch more (E-update), per boundary (annotation), per
    token (M-update)."""

    e_per_chunk: float
    e_per_branch: float
    annotate_per_boundary: float
    m_per_token: float
    peak_bytes: int


@dataclass(frozen=True)
class Estimate:
    """All that `--dry_run` prints; `memory` in bytes, `hours` by phase."""

    counts: dict[str, int]
    held_out: int
    updates: str
    workload: Workload
    memory: dict[str, int]
    timing: Timing
    hours: dict[str, float]
    machine: str
    streams: bool


def estimate(trainer: RA3MidTrainer) -> Estimate:
    """Counts, arithmetic and a short timing; the weights stay as they are. Of a stream the first chunks are counted
    and stand for the rest.

    Raises:
        `ValueError`: if a stream is empty.
    """
    args, schedule = trainer.args, trainer.schedule
    streams = not isinstance(trainer.train_dataset, Dataset)
    rows = first_rows(trainer.train_dataset) if streams else trainer.train_dataset
    work = count_work(trainer, rows)
    timing = time_updates(trainer, rows)
    hours = {
        "E-phase": (work.e_chunks * timing.e_per_chunk + work.e_branches * timing.e_per_branch) / 3600,
        "annotation": work.annotated_boundaries * timing.annotate_per_boundary / 3600,
        "M-phase": work.m_tokens * timing.m_per_token / 3600,
    }
    per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    updates = f"{schedule.iterations} x ({schedule.e_steps} E + {schedule.m_steps} M), {per_update} chunks each"
    machine = (
        torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{args.device.type}, {torch.get_num_threads()} threads"
    )
    held_out = sum(counts["documents"] for split, counts in trainer.counts.items() if split != "train")
    counts = count_chunks(rows) if streams else trainer.counts["train"]
    memory = count_memory(trainer)
    return Estimate(counts, held_out, updates, work, memory, timing, hours, machine, streams)


def first_rows(stream: IterableDataset) -> Dataset:
    """The first chunks of a segmented stream.

    Raises:
        `ValueError`: if there are none.
    """
    rows = list(islice(stream, _LOOKED_AT))
    if not rows:
        raise ValueError("`train_dataset` is a stream that gives no row; give it some code.")
    return Dataset.from_list(rows)


def count_chunks(rows: Dataset) -> dict[str, int]:
    """Chunks, boundaries and tokens of segmented rows, of which more is not known."""
    return {
        "chunks": len(rows),
        "boundaries": sum(1 for row in rows for think in row["think"] if think),
        "tokens": sum(len(row["input_ids"]) - max(row["context"], 1) for row in rows),
    }


def count_work(trainer: RA3MidTrainer, rows: Dataset) -> Workload:
    """The [`Workload`] of a run, from its segmented data and schedule."""
    args, schedule = trainer.args, trainer.schedule
    rows = rows.select_columns(["think", "input_ids", "context"])
    boundaries = [sum(1 for think in row["think"] if think) for row in rows]
    tried = [min(count, args.max_boundaries or count) for count in boundaries]
    tokens = [len(row["input_ids"]) - max(row["context"], 1) for row in rows]
    per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    e_chunks = schedule.iterations * schedule.e_steps * per_update
    m_chunks = schedule.iterations * schedule.m_steps * per_update
    whole = isinstance(trainer.train_dataset, Dataset)
    if whole and args.num_train_epochs * len(rows) < m_chunks < args.num_train_epochs * len(rows) + per_update:
        m_chunks = round(args.num_train_epochs * len(rows))  # the last update of an epoch is a smaller one
    e_branches = round(e_chunks * sum(tried) / len(rows) * args.num_latents)
    boundaries = round(m_chunks * sum(boundaries) / len(rows)) if args.uses_latents else 0
    return Workload(
        e_chunks=e_chunks,
        e_branches=e_branches,
        e_tokens=e_branches * args.max_latent_length,
        m_chunks=m_chunks,
        annotated_boundaries=boundaries,
        annotation_branches=boundaries * (args.num_latents if args.annotation == "resample" else 1),
        m_tokens=round(m_chunks * sum(tokens) / len(rows)),
    )


def count_memory(trainer: RA3MidTrainer) -> dict[str, int]:
    """Bytes on one device, by arithmetic. Caches and activations are upper bounds for the longest document."""
    args, model = trainer.args, trainer.backbone.model
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    last = trainer.schedule.iterations == 1
    wants_start = args.kl_coef > 0 or trainer.gate_hold.holds
    start, reward = args.e_steps > 0 and wants_start, args.e_steps > 0 and args.reward_model == "frozen"
    in_e, in_m = start + reward, args.uses_latents + (0 if last else start + reward)
    config = trainer.backbone.causal_lm.config.get_text_config()
    heads = config.num_attention_heads
    size = next(model.parameters()).element_size()
    values = config.to_dict()
    head = values.get("head_dim") or config.hidden_size // heads
    per_token = 2 * config.num_hidden_layers * (values.get("num_key_value_heads") or heads) * head * size
    wide = values.get("intermediate_size") or 4 * config.hidden_size
    width = config.hidden_size if args.activation_checkpointing else 8 * config.hidden_size + 4 * wide
    in_flight = max(args.max_length * args.train_batch_size, args.max_length + args.max_branch_tokens)
    return {
        "parameters": parameters,
        "gradients": trained,
        "optimizer": round(trained * 2 * _STATES.get(str(args.optim.value), 1.0)),
        "frozen snapshots": trained * max(in_e, in_m),
        "document cache": per_token * args.max_length,
        "branch cache": per_token * args.max_branch_tokens if args.uses_latents else 0,
        "activations": config.num_hidden_layers * width * size * in_flight,
    }


def time_updates(trainer: RA3MidTrainer, rows: Dataset) -> Timing:
    """Times one E-update and one M-update, forwards and backwards, on two chunks of about average size."""
    args, model = trainer.args, trainer.model
    documents = _average_documents(rows, with_boundaries=args.uses_latents)
    start = FrozenWeights(model) if (args.kl_coef or trainer.gate_hold.holds) and args.e_steps else None
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    with trainer.compute_loss_context_manager():
        _time_mstep(trainer, [splice(documents[0], {})])  # what happens the first time only stays out of the timing
        e_step = _time_estep(trainer, documents, start) if args.e_steps else (0.0, 0.0)
        annotate_per_boundary, examples = 0.0, [splice(document, {}) for document in documents]
        if args.uses_latents:
            annotate_per_boundary, examples[0] = _time_annotation(trainer, documents[0])
        m_per_token = _time_mstep(trainer, examples)
    model.zero_grad(set_to_none=True)
    return Timing(*e_step, annotate_per_boundary, m_per_token, _peak_bytes(args.device))


def _time_estep(trainer: RA3MidTrainer, documents: list[Document], start: FrozenWeights | None) -> tuple[float, float]:
    """Seconds per document and per branch of an E-update without its optimizer step: a line through an update with
    one boundary a document (the second such, the first warms up) and one with more."""
    args, noise, boundaries = trainer.args, NoiseKey(trainer.args.seed, 0, 0), trainer.args.max_boundaries
    points = []
    if trainer.plug_ins is not None:
        trainer.plug_ins.state = trainer.state
    for most in (1, 1, min(boundaries or _MOST_BOUNDARIES, _MOST_BOUNDARIES)):
        args.max_boundaries = most
        begin = time.perf_counter()
        trainer.model.eval()
        with torch.no_grad():
            rollouts = roll_out(
                trainer.engine, documents, args, noise, None, trainer.plug_ins, start, proposals=trainer.proposals
            )
        trainer.model.train()
        count = sum(len(rollout.group.boundaries) for rollout in rollouts)
        branches = sum(len(rollout.group.boundaries) * rollout.group.num_latents for rollout in rollouts)
        estep_backward(
            trainer.engine, rollouts, args, float(count), trainer.gate_hold.holds,
            lambda loss: loss.backward(),
        )  # fmt: skip
        points.append((branches, _elapsed(begin, args.device)))
    args.max_boundaries = boundaries
    (few, low), (many, high) = points[1:]
    slope = max(high - low, 0.0) / (many - few) if many > few else low / few
    return max(low - slope * few, 0.0) / len(documents), slope


def _time_annotation(trainer: RA3MidTrainer, document: Document) -> tuple[float, AnnotatedExample]:
    """Seconds per boundary, and what came out."""
    trainer.model.eval()
    begin = time.perf_counter()
    with torch.no_grad():
        example = annotate(
            trainer.engine, document, trainer.args, NoiseKey(trainer.args.seed, 1, 0), proposals=trainer.proposals
        )
    return _elapsed(begin, trainer.args.device) / len(document.boundaries), example


def _time_mstep(trainer: RA3MidTrainer, examples: list[AnnotatedExample]) -> float:
    """Seconds per token of an M-update without its optimizer step."""
    args = trainer.args
    trainer.model.train()
    begin = time.perf_counter()
    rows = pack(examples, args.max_length, args.packing)
    loss, *_ = mstep_loss(trainer.backbone, rows, float(max(rows.num_tokens, 1)))
    loss.backward()
    return _elapsed(begin, args.device) / max(rows.num_tokens, 1)


def _average_documents(data: Dataset, with_boundaries: bool) -> list[Document]:
    """Two chunks whose tokens and boundaries are nearest to the mean, with a boundary where latents are wanted."""
    rows = data.select_columns(["think", "input_ids"])
    sizes = np.array([(len(row["input_ids"]), sum(1 for think in row["think"] if think)) for row in rows])
    wanted = np.flatnonzero(sizes[:, 1] > 0) if with_boundaries else np.arange(len(sizes))
    mean = np.maximum(sizes[wanted].mean(0), 1)
    distance = np.abs(sizes[wanted] / mean - 1).sum(1)
    return [row_to_document(data[int(i)]) for i in wanted[distance.argsort(kind="stable")[:2]]]


def _elapsed(begin: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def render(found: Estimate) -> str:
    """The estimate as text."""
    c, w, t = found.counts, found.workload, found.timing
    memory = "; ".join(f"{name} {_bytes(size)}" for name, size in found.memory.items() if size)
    hours = ", ".join(f"{phase} {_duration(h)}" for phase, h in found.hours.items() if h)
    over = f"the first {c['chunks']:,} chunks" if found.streams else "a pass over the data"
    kept = "" if found.streams else f"; {c['kept_comments']:,} comments kept"
    lines = {
        "Documents": _documents(found),
        "Boundaries": f"{c['boundaries']:,} in {over}{kept}",
        "Updates": found.updates,
        "Branches": f"{w.e_branches:,} in the E-phase, about {w.annotation_branches:,} to annotate",
        "Tokens": f"{c['tokens']:,} in {over}; M-phase {w.m_tokens:,} of the expert's; E-phase {w.e_tokens:,} of "
        "latents at most",
        "Memory": f"about {_bytes(sum(found.memory.values()))}: {memory}",
        "": f"({_bytes(t.peak_bytes)} at most in the timing, without optimizer)",
        "Time": f"about {_duration(sum(found.hours.values()))} in one process: {hours}",
        " ": f"({found.machine}; evaluation and saving not counted)",
    }
    return "\n".join(f"{name:11} {text}" for name, text in lines.items())


def _documents(found: Estimate) -> str:
    c = found.counts
    if found.streams:
        return f"a stream; its first {c['chunks']:,} chunks stand for the rest"
    kinds = ", ".join(
        f"{c[k]:,} {k.replace('_', ' ')}" for k in ("with_actions", "no_boundary", "plain", "lossy", "empty") if c[k]
    )
    return f"{c['documents']:,} to train on ({kinds}), {c['chunks']:,} chunks; {found.held_out:,} held out"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
