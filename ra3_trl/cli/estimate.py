"""`ra3 train --dry_run`: what a run would take, before anything is spent.

Documents, boundaries, branches and tokens are counted. Time comes from what a run does, done once on a few documents
from short to long, and scaled. Memory is what that took, with the longest documents among them, and the optimizer's
states, which are arithmetic: no optimizer step is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset, IterableDataset

from ..config_fields import row_length
from ..em import EStep, Gradients, Rollout, mstep_loss, pack
from ..em.learner import observe
from ..models import BaseWeights, FrozenWeights
from ..policy import annotate_all
from ..records import AnnotatedExample, Document
from ..report.estimate import Estimate, Workload, count_evaluations, count_memory, count_work, optimizer_bytes
from ..report.summary import peak_memory
from ..rollout import NoiseKey
from ..segmentation import row_to_document, splice
from ..trainer import RA3MidTrainer
from ..versions import enable_checkpointing
from .cost import Cost, Phases, Shape, count_passes, this_machine
from .devices import Device


LOOKED_AT = 256  # chunks of a stream
_TIMED = 4  # documents in the timing
_PROBE = 8  # documents of the probe, which an E-phase looks at ten times
_ELEMENTS = 2**24  # most elements of the tensor on which the optimizer is timed


def estimate(trainer: RA3MidTrainer, processes: int = 1) -> Estimate:
    """Counts, calculates and times shortly; the weights stay as they are.

    Args:
        processes (`int`, *optional*, defaults to `1`):
            Those that will share the run, where this one is not launched as they will be.

    Raises:
        `ValueError`: if the training data are a stream that is empty.
    """
    args, schedule, data = trainer.args, trainer.schedule, trainer.train_dataset
    start = time.time() - psutil.Process().create_time()  # imports, weights and data: a run begins with the same
    streams, anchored = isinstance(data, IterableDataset), bool(args.kl_coef) or trainer.loop.holds_gate
    rows = list(islice(data, LOOKED_AT)) if streams else data.select_columns(["think", "input_ids", "context"])
    if not rows:
        raise ValueError("`train_dataset` is a stream that gives no row; give it some code.")
    sizes = np.array([(sum(map(bool, r["think"])), len(r["input_ids"]) - max(r["context"], 1)) for r in rows])
    # Of a stream these first chunks stand for the rest.
    counts = {"chunks": len(sizes)} | dict(zip(("boundaries", "tokens"), sizes.sum(0).tolist(), strict=True))
    work = count_work(sizes, args, schedule, not streams)
    timing = Timing(trainer, rows if streams else data, sizes, anchored)
    seconds = {"start": start} | timing.seconds(work, max(processes, args.world_size))
    machine = f"{args.device.type}, {torch.get_num_threads()} threads"
    return Estimate(
        counts=counts if streams else trainer.cut.counts["train"],
        held_out=sum(split["documents"] for name, split in trainer.cut.counts.items() if name != "train"),
        evaluations=count_evaluations(args, schedule, trainer.eval_dataset is not None, len(sizes)),
        updates=f"{schedule.iterations} x ({schedule.e_steps} E + {schedule.m_steps} M), "
        f"{args.train_batch_size * args.world_size * args.gradient_accumulation_steps} chunks each",
        workload=work,
        memory=count_memory(trainer.policy.backbone, args, schedule, anchored),
        peak=peak_memory() + optimizer_bytes(trainer.policy.model, args),
        hours={phase: value / 3600 for phase, value in seconds.items()},
        machine=torch.cuda.get_device_name() if args.device.type == "cuda" else machine,
        streams=streams,
        processes=max(processes, args.world_size),
    )


def estimate_cost(trainer: RA3MidTrainer, estimated: Estimate, device: Device, devices: int) -> Cost:
    """Calculates what the run would take on devices, and the same for this machine, which was timed."""
    args, counts, causal_lm = trainer.args, estimated.counts, trainer.policy.backbone.causal_lm
    chunk_tokens, line = (counts["tokens"] / max(counts[name], 1) for name in ("chunks", "boundaries"))
    together = args.train_batch_size * args.gradient_accumulation_steps

    def phases(processes: int) -> Phases:
        return count_passes(estimated.workload.of_each(args, processes), args, chunk_tokens, line, together)

    return Cost(
        device=device,
        devices=devices,
        shape=Shape.of(causal_lm),
        phases=phases(devices),
        memory=sum(estimated.memory.values()),
        here=this_machine(args.device, torch.bfloat16 if args.bf16 else torch.float32),
        local=phases(estimated.processes),
        timed={name: 3600 * hours for name, hours in estimated.hours.items()},
    )


class Timing:
    """
    Times what a run does on a few documents, from short to long.

    Args:
        trainer ([`~ra3_trl.RA3MidTrainer`]):
            Of the run. Its weights and its head stay as they are.
        rows (`datasets.Dataset` or `list[dict]`), sizes (`numpy.ndarray`):
            Training rows, all or the first of a stream; their boundaries and predicted tokens, `[rows, 2]`.
        anchored (`bool`):
            Whether an E-phase keeps the weights at its start.
    """

    def __init__(self, trainer: RA3MidTrainer, rows: Dataset | list[dict], sizes: np.ndarray, anchored: bool):
        self.trainer, self.args, self.policy, self.anchored = trainer, trainer.args, trainer.policy, anchored
        chosen = spread(sizes, self.args.uses_latents)
        self.documents = [row_to_document(rows[int(i)]) for i in chosen]
        # How much more than a document of these one of the run has, in boundaries and tokens.
        self.more_boundaries, self.more_tokens = sizes.mean(0) / np.maximum(sizes[chosen].mean(0), 1e-9)
        longest = sizes[:, 1].argsort()[::-1][: self.args.train_batch_size]
        self.longest = [row_to_document(rows[int(i)]) for i in longest]

    def seconds(self, work: Workload, processes: int) -> dict[str, float]:
        """Seconds of each process of the run, by what is done."""
        args, learner = self.args, self.trainer.loop.learner
        if args.activation_checkpointing:
            enable_checkpointing(self.policy.model, args.activation_checkpointing_kwargs)
        each_does, schedule = work.of_each(args, processes), self.trainer.schedule
        e_chunks, m_chunks = each_does.e_chunks, each_does.m_chunks
        per_update = args.train_batch_size * args.gradient_accumulation_steps
        updates = schedule.iterations * schedule.e_steps + math.ceil(m_chunks / per_update)
        each = {}
        # The longest first: what happens once only stays out of the timing, and the peak of memory is theirs.
        self._learn([splice(document, {}) for document in self.longest])
        examples = [splice(document, {}) for document in self.documents]
        if args.e_steps:
            self._e_update(self.longest[:1])
            each["E-phase"], rollouts = timed(self._e_update, self.documents, device=args.device)
            each["E-phase"] *= e_chunks * self.more_boundaries / len(self.documents)
            each["E-phase"] += self._watching()
            if learner is not None:
                each["E-phase"] += updates * self._head(rollouts)  # which it does in M-phases, too
        if args.uses_latents:
            each["annotation"], examples = timed(self._annotate, self.documents, device=args.device)
            each["annotation"] *= m_chunks * self.more_boundaries / len(self.documents)
        seconds, _ = timed(self._learn, examples, device=args.device)
        each["M-phase"] = seconds * m_chunks * self.more_tokens / len(self.documents)
        each["optimizer"] = updates * time_optimizer(self.policy.model, args)
        self.policy.model.zero_grad(set_to_none=True)
        each["evaluation"] = self._evaluation() / processes
        return {name: value for name, value in each.items() if value}

    @cached_property
    def _estep(self) -> EStep:
        """The E-step of a phase, with the snapshots that it keeps."""
        model, reward = self.policy.model, {"frozen": FrozenWeights, "base": BaseWeights}.get(self.args.reward_model)
        start = FrozenWeights(model) if self.anchored else None
        return EStep(self.policy, self.args, reward and reward(model), start, self.trainer.loop.plug_ins)

    def _e_update(self, documents: Sequence[Document]) -> list[Rollout]:
        """An E-update without its optimizer step."""
        policy, plug_ins, step = self.policy, self.trainer.loop.plug_ins, self._estep
        if plug_ins is not None:
            plug_ins.state = self.trainer.state
        with policy.inference(whole=False):
            rollouts = step.roll_out(documents, NoiseKey(self.args.seed, 0, 0))
            step.over_other(rollouts)
        policy.model.train()
        with policy.autocast():
            count = float(max(sum(len(rollout.group.document.boundaries) for rollout in rollouts), 1))
            step.backward(rollouts, count, self.trainer.loop.holds_gate, Gradients(lambda loss: loss.backward()))
        return rollouts

    def _watching(self) -> float:
        """Seconds of the looks at the probe, at the start of each E-phase and after every tenth of it."""
        schedule = self.trainer.schedule
        looks = 1 + (schedule.e_steps - 1) // max(1, schedule.e_steps // 10)
        with self.policy.inference():
            once, _ = timed(lambda: [self.policy.engine.trunk(d) for d in self.documents], device=self.args.device)
        return once * schedule.iterations * looks * _PROBE / len(self.documents)

    def _head(self, rollouts: Sequence[Rollout]) -> float:
        """Seconds in which the abstraction head learns from an update."""
        learner = deepcopy(self.trainer.loop.learner)
        seen = [observe(r.group, r.returns, r.weight_T, self.args) for r in rollouts if r.group.boundaries]
        if learner is None or not seen:
            return 0.0
        return timed(learner.learn, seen, NoiseKey(self.args.seed, 0, 0), device=self.args.device)[0]

    def _annotate(self, documents: Sequence[Document]) -> list[AnnotatedExample]:
        with self.policy.inference():
            return annotate_all(self.policy, documents, NoiseKey(self.args.seed, 1, 0))

    def _learn(self, examples: Sequence[AnnotatedExample]) -> None:
        """An M-update without its optimizer step."""
        self.policy.model.train()
        rows = pack(examples, row_length(self.args), self.args.packing)
        with self.policy.autocast():
            loss, *_ = mstep_loss(self.policy.backbone, rows, float(max(rows.num_tokens, 1)))
            loss.backward()

    def _evaluation(self) -> float:
        """Seconds of all evaluations, 0 for streams."""
        trainer, args = self.trainer, self.args
        sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        seconds = 0.0
        for data in sets.values():
            if data is None or isinstance(data, IterableDataset) or not len(data):
                continue
            rows = data.select_columns(["think", "input_ids", "context"])
            sizes = np.array([(sum(map(bool, r["think"])), len(r["input_ids"]) - max(r["context"], 1)) for r in rows])
            chosen = spread(sizes, args.uses_latents)
            documents = [row_to_document(data[int(i)]) for i in chosen]
            once, _ = timed(self._evaluate, documents, device=args.device)
            seconds += once * sizes[:, 1].sum() / max(sizes[chosen, 1].sum(), 1)
        chunks = len(trainer.train_dataset) if not isinstance(trainer.train_dataset, IterableDataset) else 0
        return seconds * count_evaluations(args, trainer.schedule, trainer.eval_dataset is not None, chunks)

    def _evaluate(self, documents: list[Document]) -> None:
        """What `evaluate()` does: the policy's numbers, and the next-token loss."""
        self.policy.evaluate(documents)
        with self.policy.inference():
            self.trainer.loop.next_token(self.policy.model, self.trainer.loop.next_token.inputs_of(documents))


def spread(sizes: np.ndarray, with_boundaries: bool) -> np.ndarray:
    """Chooses up to `_TIMED` rows from short to long, with boundaries if asked to and there are such."""
    wanted = np.flatnonzero(sizes[:, 0] > 0) if with_boundaries else np.arange(len(sizes))
    wanted = wanted if len(wanted) else np.arange(len(sizes))
    by_length = wanted[sizes[wanted, 1].argsort(kind="stable")]
    places = (np.arange(_TIMED) + 0.5) / _TIMED * len(by_length)
    return by_length[np.unique(places.astype(int))]


def timed(work: Any, *arguments: Any, device: torch.device) -> tuple[float, Any]:
    """Seconds of `work(*arguments)`, and what it returns."""
    begin = time.perf_counter()
    result = work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def time_optimizer(model: torch.nn.Module, args: Any) -> float:
    """Seconds of an optimizer step with clipped gradients, from AdamW's on a part of as many numbers."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = torch.nn.Parameter(torch.zeros(max(min(total, _ELEMENTS), 1), device=args.device))
    optimizer = torch.optim.AdamW([part])
    part.grad = torch.ones_like(part)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([part], 1.0)
        optimizer.step()

    step()  # makes the states
    return timed(step, device=args.device)[0] * total / part.numel()
