"""What a run would take, by counting and arithmetic: documents, boundaries, branches, tokens, memory, hours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers.trainer_utils import IntervalStrategy

from ..config import RA3Config
from ..config_fields import row_length
from ..em import Schedule
from ..rollout import Backbone, logits_bytes, most_cached
from .summary import duration, size


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

    def of_each(self, args: RA3Config, processes: int) -> Workload:
        """What each of so many processes does, of a workload that was counted for `args.world_size` of them: of epochs
        its part; of so many updates all, on documents of its own."""
        in_epochs = args.m_steps == -1 and args.max_steps <= 0
        return self.shared_by(processes if in_epochs else args.world_size, args.world_size)

    def shared_by(self, m: int, e: int = 1) -> Workload:
        """What each of `m` processes does that share the M-phase, and of `e` that share the E-phase."""
        return Workload(
            e_chunks=round(self.e_chunks / e),
            e_branches=round(self.e_branches / e),
            e_tokens=round(self.e_tokens / e),
            m_chunks=round(self.m_chunks / m),
            annotated_boundaries=round(self.annotated_boundaries / m),
            annotation_branches=round(self.annotation_branches / m),
            m_tokens=round(self.m_tokens / m),
        )


@dataclass(frozen=True)
class Estimate:
    """All that `--dry_run` prints. `counts` are of the training data, of a stream of its first chunks, which stand for
    the rest; `memory`, an upper bound by arithmetic, is in bytes, as is `peak`: what the timing took with the
    optimizer's states; `hours` are by what is done, in each of `processes`."""

    counts: dict[str, int]
    held_out: int
    evaluations: int
    updates: str
    workload: Workload
    memory: dict[str, int]
    peak: int
    hours: dict[str, float]
    machine: str
    streams: bool
    processes: int = 1


def count_work(sizes: np.ndarray, args: RA3Config, schedule: Schedule, whole: bool) -> Workload:
    """Counts what a run does.

    Args:
        sizes (`numpy.ndarray`):
            Boundaries and predicted tokens `[chunks, 2]` of the training data.
        args ([`RA3Config`]), schedule ([`~ra3_trl.em.Schedule`]):
            Of the run.
        whole (`bool`):
            Whether these are all chunks; of a stream they are the first.
    """
    boundaries, tokens = sizes.mean(0)
    share = 1.0 if args.boundary_selection == "random" else args.boundary_budget
    tried = np.minimum(np.ceil(share * sizes[:, 0]), args.max_boundaries or np.inf).mean()
    per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    e_chunks, m_chunks = (schedule.iterations * steps * per_update for steps in (schedule.e_steps, schedule.m_steps))
    in_epochs = args.num_train_epochs * len(sizes)
    if whole and in_epochs < m_chunks < in_epochs + per_update:
        m_chunks = round(in_epochs)  # the last update of an epoch is a smaller one
    e_branches = round(e_chunks * tried * args.num_latents)
    annotated = round(m_chunks * boundaries) if args.uses_latents else 0
    return Workload(
        e_chunks=e_chunks,
        e_branches=e_branches,
        e_tokens=e_branches * args.max_latent_length,
        m_chunks=m_chunks,
        annotated_boundaries=annotated,
        annotation_branches=annotated * (1 if args.annotation == "policy" else args.num_latents),
        m_tokens=round(m_chunks * tokens),
    )


def count_evaluations(args: RA3Config, schedule: Schedule, held_out: bool, chunks: int) -> int:
    """Counts the evaluations of `ra3 train`: before the first update, at steps or ends of epochs, and at the end.

    Args:
        held_out (`bool`):
            Whether anything is held out.
        chunks (`int`):
            Rows of the training data, 0 where it is a stream.
    """
    if not held_out:
        return 0
    per_update = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    total, every = schedule.total, math.inf
    if args.eval_strategy == IntervalStrategy.STEPS:
        steps = args.eval_steps or args.logging_steps
        every = math.ceil(total * steps) if steps < 1 else int(steps)
    elif args.eval_strategy == IntervalStrategy.EPOCH and chunks:
        every = math.ceil(chunks / per_update)
    within = 0 if every == math.inf else total // every
    at_the_end = every == math.inf or total % every > 0
    return int(bool(args.eval_on_start)) + within + int(at_the_end)


def optimizer_bytes(model: nn.Module, args: RA3Config) -> int:
    """Calculates the bytes of the optimizer's states."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return round(trained * 2 * _STATES.get(str(args.optim.value), 1.0))


def count_memory(backbone: Backbone, args: RA3Config, schedule: Schedule, anchored: bool) -> dict[str, int]:
    """Calculates the bytes on one device; caches and activations are upper bounds for the longest document.

    Args:
        anchored (`bool`):
            Whether an E-phase keeps the weights at its start.
    """
    parameters = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in backbone.model.parameters() if p.requires_grad)
    # An E-phase's snapshots stay through the M-phase behind it, which adds the annotator; the last one drops them.
    in_e = (anchored + (args.reward_model == "frozen")) if args.e_steps else 0
    in_m = args.uses_latents + (0 if schedule.iterations == 1 else in_e)
    config = backbone.causal_lm.config.get_text_config()
    values, size = config.to_dict(), next(backbone.model.parameters()).element_size()
    heads = config.num_attention_heads
    head_size = values.get("head_dim") or config.hidden_size // heads
    per_token = 2 * config.num_hidden_layers * (values.get("num_key_value_heads") or heads) * head_size * size
    wide = values.get("intermediate_size") or 4 * config.hidden_size
    width = config.hidden_size if args.activation_checkpointing else 8 * config.hidden_size + 4 * wide
    cached = most_cached(args.max_branch_tokens, args.max_latent_length)
    in_flight = max(row_length(args) * args.train_batch_size, row_length(args) + args.max_branch_tokens)
    return {
        "parameters": parameters,
        "gradients": trained,
        "optimizer": optimizer_bytes(backbone.model, args),
        "frozen snapshots": trained * max(in_e, in_m),
        "document cache": per_token * row_length(args),
        "branch cache": per_token * cached if args.uses_latents else 0,
        "activations": config.num_hidden_layers * width * size * in_flight,
        "logits": logits_bytes(backbone.device, backbone.vocab_size),
    }


def render(estimate: Estimate) -> str:
    """Writes the estimate as text."""
    c, w, hours = estimate.counts, estimate.workload, estimate.hours
    if estimate.streams:
        documents = f"a stream; its first {c['chunks']:,} chunks stand for the rest"
        over, kept = f"the first {c['chunks']:,} chunks", ""
    else:
        names = ("with_actions", "no_boundary", "plain", "untokenized", "lossy", "empty")
        kinds = ", ".join(f"{c[name]:,} {name.replace('_', ' ')}" for name in names if c[name])
        documents = f"{c['documents']:,} to train on ({kinds}), {c['chunks']:,} chunks; {estimate.held_out:,} held out"
        over, kept = "a pass over the data", f"; {c['kept_comments']:,} comments kept"
    memory = "; ".join(f"{name} {size(count)}" for name, count in estimate.memory.items() if count)
    by_phase = ", ".join(f"{phase} {duration(3600 * h)}" for phase, h in hours.items() if h)
    of_each = "in one process" if estimate.processes == 1 else f"in each of {estimate.processes} processes"
    evaluated = f"{estimate.evaluations} evaluations of what is held out" if estimate.evaluations else "no evaluation"
    lines = {
        "Documents": documents,
        "Boundaries": f"{c['boundaries']:,} in {over}{kept}",
        "Updates": estimate.updates,
        "Branches": f"{w.e_branches:,} in the E-phase, about {w.annotation_branches:,} to annotate",
        "Tokens": f"{c['tokens']:,} in {over}; M-phase {w.m_tokens:,} of the expert's; E-phase {w.e_tokens:,} of "
        "latents at most",
        "Memory": f"about {size(estimate.peak)} {of_each} (measured in the timing, with the optimizer's states)",
        "": f"at most {size(sum(estimate.memory.values()))} beside libraries and data, an arithmetic bound: {memory}",
        "Time": f"about {duration(3600 * sum(hours.values()))} {of_each}: {by_phase}",
        " ": f"({estimate.machine}; {evaluated}; saving not counted)",
    }
    return "\n".join(f"{name:11} {text}" for name, text in lines.items())
