"""What a run would take, by counting and arithmetic: documents, boundaries, branches, tokens, memory, hours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import RA3Config
from ..config_fields import row_length
from ..em import Schedule
from ..rollout import Backbone, most_cached


_STATES = {"sgd": 0.0, "adafactor": 0.1, "adamw_8bit": 0.5, "adamw_bnb_8bit": 0.5, "paged_adamw_8bit": 0.5}


@dataclass(frozen=True)
class Workload:
    """What a run does, all in all. `e_chunks`, `m_chunks`: documents (chunks of them) that the phases go through.

    Example: 100 chunks of 10 boundaries and 200 tokens, 5 E-updates and one epoch of M-updates at batch 4, G = 4:
    `e_chunks = 20`, `e_branches = 20 * 3 * 4 = 240` (a quarter of the boundaries, rounded up, is tried),
    `m_chunks = 100`, `annotated_boundaries = 1000`,
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
class Estimate:
    """All that `--dry_run` prints. `counts` are of the training data, of a stream of its first chunks, which stand for
    the rest; `memory` is in bytes, as is `peak`, what the timing took; `hours` are by phase, in one process."""

    counts: dict[str, int]
    held_out: int
    updates: str
    workload: Workload
    memory: dict[str, int]
    peak: int
    hours: dict[str, float]
    machine: str
    streams: bool


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
    # As `policy.decisions.choose_to_try` chooses.
    wanted = sizes[:, 0] if args.boundary_selection == "random" else np.ceil(args.boundary_budget * sizes[:, 0])
    tried = np.minimum(wanted, args.max_boundaries or np.inf).mean()
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
        "optimizer": round(trained * 2 * _STATES.get(str(args.optim.value), 1.0)),
        "frozen snapshots": trained * max(in_e, in_m),
        "document cache": per_token * row_length(args),
        "branch cache": per_token * cached if args.uses_latents else 0,
        "activations": config.num_hidden_layers * width * size * in_flight,
    }


def render(estimate: Estimate) -> str:
    """Writes the estimate as text."""
    c, w, hours = estimate.counts, estimate.workload, estimate.hours
    if estimate.streams:
        documents = f"a stream; its first {c['chunks']:,} chunks stand for the rest"
        over, kept = f"the first {c['chunks']:,} chunks", ""
    else:
        names = ("with_actions", "no_boundary", "plain", "lossy", "empty")
        kinds = ", ".join(f"{c[name]:,} {name.replace('_', ' ')}" for name in names if c[name])
        documents = f"{c['documents']:,} to train on ({kinds}), {c['chunks']:,} chunks; {estimate.held_out:,} held out"
        over, kept = "a pass over the data", f"; {c['kept_comments']:,} comments kept"
    memory = "; ".join(f"{name} {_bytes(size)}" for name, size in estimate.memory.items() if size)
    by_phase = ", ".join(f"{phase} {_duration(h)}" for phase, h in hours.items() if h)
    lines = {
        "Documents": documents,
        "Boundaries": f"{c['boundaries']:,} in {over}{kept}",
        "Updates": estimate.updates,
        "Branches": f"{w.e_branches:,} in the E-phase, about {w.annotation_branches:,} to annotate",
        "Tokens": f"{c['tokens']:,} in {over}; M-phase {w.m_tokens:,} of the expert's; E-phase {w.e_tokens:,} of "
        "latents at most",
        "Memory": f"about {_bytes(sum(estimate.memory.values()))}: {memory}",
        "": f"({_bytes(estimate.peak)} at most in the timing, without optimizer)",
        "Time": f"about {_duration(sum(hours.values()))} in one process: {by_phase}",
        " ": f"({estimate.machine}; evaluation and saving not counted)",
    }
    return "\n".join(f"{name:11} {text}" for name, text in lines.items())


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
