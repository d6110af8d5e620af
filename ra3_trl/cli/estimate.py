"""`ra3 train --dry_run`: what a run would take, before anything is spent.

Documents, boundaries, branches and tokens are counted; memory is arithmetic; hours come from one E-update and one
M-update on two documents, scaled by branches, boundaries and tokens. No optimizer step is taken.
"""

from __future__ import annotations

import resource
import sys
import time
from copy import copy
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from ..config_fields import row_length
from ..em import EStep, Gradients, mstep_loss, pack
from ..models import BaseWeights, FrozenWeights
from ..policy import Policy
from ..records import AnnotatedExample, Document
from ..report.cost import Cost, Device, Shape, count_flops, phase_seconds, this_machine
from ..report.estimate import Estimate, Workload, count_memory, count_work
from ..rollout import NoiseKey
from ..segmentation import row_to_document, splice
from ..trainer import RA3MidTrainer
from ..versions import enable_checkpointing


_LOOKED_AT = 256  # chunks of a stream
_MOST_BOUNDARIES = 16  # boundaries of a document in the timing


def estimate(trainer: RA3MidTrainer) -> Estimate:
    """Counts, calculates and times shortly; the weights stay as they are.

    Raises:
        `ValueError`: if the training data are a stream that is empty.
    """
    args, schedule, data = trainer.args, trainer.schedule, trainer.train_dataset
    streams, anchored = isinstance(data, IterableDataset), bool(args.kl_coef) or trainer.loop.holds_gate
    rows = list(islice(data, _LOOKED_AT)) if streams else data.select_columns(["think", "input_ids", "context"])
    if not rows:
        raise ValueError("`train_dataset` is a stream that gives no row; give it some code.")
    sizes = np.array([(sum(map(bool, r["think"])), len(r["input_ids"]) - max(r["context"], 1)) for r in rows])
    # Of a stream these first chunks stand for the rest.
    counts = {"chunks": len(sizes)} | dict(zip(("boundaries", "tokens"), sizes.sum(0).tolist(), strict=True))
    work = count_work(sizes, args, schedule, not streams)
    documents = _average_documents(rows if streams else data, sizes, args.uses_latents)
    hours = {phase: seconds / 3600 for phase, seconds in time_updates(trainer, documents, work, anchored).items()}
    per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    if args.device.type == "cuda":
        machine, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        machine = f"{args.device.type}, {torch.get_num_threads()} threads"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Estimate(
        counts=counts if streams else trainer.cut.counts["train"],
        held_out=sum(split["documents"] for name, split in trainer.cut.counts.items() if name != "train"),
        updates=f"{schedule.iterations} x ({schedule.e_steps} E + {schedule.m_steps} M), {per_update} chunks each",
        workload=work,
        memory=count_memory(trainer.policy.backbone, args, schedule, anchored),
        peak=peak,
        hours=hours,
        machine=machine,
        streams=streams,
    )


def estimate_cost(trainer: RA3MidTrainer, estimated: Estimate, device: Device, devices: int) -> Cost:
    """Calculates what the run would take elsewhere, and checks the arithmetic by this machine's timing."""
    args, backbone, counts = trainer.args, trainer.policy.backbone, estimated.counts
    shape = Shape.of(backbone.causal_lm, backbone.causal_lm.config.get_text_config().num_hidden_layers)
    line = counts["tokens"] / max(counts["boundaries"], 1)
    phases = count_flops(shape, estimated.workload, args, line)
    here = this_machine(args.device)
    hours = {name: phase_seconds(cost, shape, device, devices) / 3600 for name, cost in phases.items()}
    return Cost(
        device=device,
        devices=devices,
        phases=phases,
        hours=hours,
        memory=sum(estimated.memory.values()),
        measured=sum(estimated.hours.values()),
        here=sum(phase_seconds(cost, shape, here) for cost in phases.values()) / 3600,
    )


def _average_documents(rows: Dataset | list[dict], sizes: np.ndarray, with_boundaries: bool) -> list[Document]:
    """Takes two chunks whose boundaries and tokens are nearest to the mean, with a boundary if asked to."""
    wanted = np.flatnonzero(sizes[:, 0] > 0) if with_boundaries else np.arange(len(sizes))
    distance = np.abs(sizes[wanted] / np.maximum(sizes[wanted].mean(0), 1) - 1).sum(1)
    return [row_to_document(rows[int(i)]) for i in wanted[distance.argsort(kind="stable")[:2]]]


def time_updates(
    trainer: RA3MidTrainer, documents: list[Document], work: Workload, anchored: bool
) -> dict[str, float]:
    """Times one E-update and one M-update, forwards and backwards: seconds of the whole run, by phase."""
    args, policy = trainer.args, trainer.policy
    if args.activation_checkpointing:
        enable_checkpointing(policy.model, args.activation_checkpointing_kwargs)
    _time_mstep(policy, [splice(documents[0], {})])  # what happens the first time only stays out of the timing
    seconds, examples = {"E-phase": 0.0, "annotation": 0.0}, [splice(document, {}) for document in documents]
    if args.e_steps:
        per_chunk, per_branch = _time_estep(trainer, documents, anchored)
        seconds["E-phase"] = work.e_chunks * per_chunk + work.e_branches * per_branch
    if args.uses_latents:
        begin = time.perf_counter()
        examples[0] = policy.annotate(documents[0])
        per_boundary = _elapsed(begin, args.device) / len(documents[0].boundaries)
        seconds["annotation"] = work.annotated_boundaries * per_boundary
    seconds["M-phase"] = work.m_tokens * _time_mstep(policy, examples)
    policy.model.zero_grad(set_to_none=True)
    return seconds


def _time_estep(trainer: RA3MidTrainer, documents: list[Document], anchored: bool) -> tuple[float, float]:
    """Times E-updates without their optimizer step: seconds per document, and per branch more."""
    args, policy, plug_ins = copy(trainer.args), trainer.policy, trainer.loop.plug_ins
    reward = {"frozen": FrozenWeights, "base": BaseWeights}.get(args.reward_model)
    start = FrozenWeights(policy.model) if anchored else None
    step = EStep(policy, args, reward and reward(policy.model), start, plug_ins)
    if plug_ins is not None:
        plug_ins.state = trainer.state
    points, most = [], min(args.max_boundaries or _MOST_BOUNDARIES, _MOST_BOUNDARIES)
    # A line through an update with one boundary a document (the second such: the first warms up) and one with more.
    for boundaries in (1, 1, most):
        args.max_boundaries = boundaries  # of the copy
        begin = time.perf_counter()
        with policy.inference(whole=False):
            rollouts = step.roll_out(documents, NoiseKey(args.seed, 0, 0))
        groups = [rollout.group for rollout in rollouts]
        policy.model.train()
        with policy.autocast():
            count = float(sum(len(group.boundaries) for group in groups))
            step.backward(rollouts, count, trainer.loop.holds_gate, Gradients(lambda loss: loss.backward()))
        branches = sum(len(group.boundaries) * group.num_latents for group in groups)
        points.append((branches, _elapsed(begin, args.device)))
    (few, low), (many, high) = points[1:]
    slope = max(high - low, 0.0) / (many - few) if many > few else low / few
    return max(low - slope * few, 0.0) / len(documents), slope


def _time_mstep(policy: Policy, examples: list[AnnotatedExample]) -> float:
    """Times an M-update without its optimizer step: seconds per token."""
    policy.model.train()
    begin = time.perf_counter()
    rows = pack(examples, row_length(policy.args), policy.args.packing)
    with policy.autocast():
        loss, *_ = mstep_loss(policy.backbone, rows, float(max(rows.num_tokens, 1)))
        loss.backward()
    return _elapsed(begin, policy.args.device) / max(rows.num_tokens, 1)


def _elapsed(begin: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
