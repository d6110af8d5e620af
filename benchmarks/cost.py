"""What mid-training on a billion tokens would take on devices that are not here: computed, as docs/scale.md has it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

from ra3_trl.cli.cost import Shape, count_passes, seconds_of
from ra3_trl.cli.devices import DEVICES
from ra3_trl.report.estimate import Workload


# Qwen2.5-Coder's. Of the smaller two embeddings are tied to the head, so that all weights are in products.
MODELS = {
    "0.5B": (Shape(494_000_000, 494_000_000, 2 * 494_000_000, 24), 494_000_000),
    "1.5B": (Shape(1_540_000_000, 1_540_000_000, 2 * 1_540_000_000, 28), 1_540_000_000),
    "7B": (Shape(7_070_000_000, 7_070_000_000, 2 * 7_620_000_000, 28), 7_620_000_000),
}
TOKENS, PER_LINE, PER_CHUNK = 10**9, 10, 800
BATCH, PER_DEVICE = 64, 8  # chunks an update on all devices; at most so many in a pass of one
# The defaults of `RA3Config`, as far as they shape the work.
DEFAULTS: dict[str, Any] = {
    "e_steps": 20, "num_latents": 8, "max_latent_length": 12, "horizon": 2, "boundary_budget": 0.25, "kl_coef": 0.05,
    "reward_model": "live", "annotation": "resample", "max_branch_tokens": 8192,
}  # fmt: skip


def workload() -> Workload:
    """One iteration on all devices: an E-phase, and an epoch in which every boundary is annotated."""
    chunks, boundaries, latents = TOKENS // PER_CHUNK, PER_CHUNK // PER_LINE, DEFAULTS["num_latents"]
    e_chunks = DEFAULTS["e_steps"] * BATCH
    e_branches = round(e_chunks * boundaries * DEFAULTS["boundary_budget"] * latents)
    return Workload(
        e_chunks=e_chunks,
        e_branches=e_branches,
        e_tokens=e_branches * DEFAULTS["max_latent_length"],
        m_chunks=chunks,
        annotated_boundaries=chunks * boundaries,
        annotation_branches=chunks * boundaries * latents,
        m_tokens=TOKENS,
    )


def measure(device: str = "h100", counts: tuple[int, ...] = (1, 8, 64)) -> list[dict[str, Any]]:
    """FLOPs, hours by phase, dollars and memory of each model on so many devices. `rows_hours` is the annotation by
    `ra3 annotate`, row after row, in the place of the trainer's, which has all documents of an update in lockstep."""
    rows = []
    for name, (shape, weights) in MODELS.items():
        for count in counts:
            together = BATCH // count
            settings: Any = SimpleNamespace(
                **DEFAULTS, activation_checkpointing=False, train_batch_size=min(together, PER_DEVICE),
            )  # fmt: skip
            each = workload().shared_by(count, count)
            alone, phases = (count_passes(each, settings, PER_CHUNK, PER_LINE, n) for n in (1, together))
            hours = {phase: seconds_of(passes, shape, DEVICES[device]) / 3600 for phase, passes in phases.items()}
            flops = count * sum(p.flops(shape) for passes in phases.values() for p in passes)
            # Weights and gradients in bfloat16, AdamW's two states in float32; caches and activations come to it.
            whole, shard = 12 * weights, 2 * weights + 12 * weights / count
            sharded = whole > 0.8 * DEVICES[device].memory and count > 1
            rows.append(
                {
                    "model": name,
                    "devices": count,
                    "flops": flops,
                    "hours": hours,
                    "rows_hours": seconds_of(alone["annotation"], shape, DEVICES[device]) / 3600,
                    "dollars": sum(hours.values()) * count * DEVICES[device].price,
                    "memory_gb": (shard if sharded else whole) / 1e9,
                    "sharded": sharded,
                }
            )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=tuple(DEVICES), default="h100")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The rows, and as `table` the page's Markdown."""
    rows, device = measure(args.device), DEVICES[args.device]
    table = [
        "",
        f"| model | {args.device} | GB on each | FLOPs | E-phase, h | annotation, h | M-phase, h | dollars | `ra3 "
        "annotate`, h |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        hours = " | ".join(f"{row['hours'][phase]:.3g}" for phase in ("E-phase", "annotation", "M-phase"))
        memory = f"{row['memory_gb']:.1f}" + (", in shards" if row["sharded"] else "")
        memory += ", too much" if row["memory_gb"] > device.memory / 1e9 else ""
        table.append(
            f"| {row['model']} | {row['devices']} | {memory} | {row['flops']:.1e} | {hours} | {row['dollars']:,.0f} | "
            f"{row['rows_hours']:.3g} |"
        )
    return {"computed": True, "device": device.name, "rows": rows, "table": "\n".join(table)}
