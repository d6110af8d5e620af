"""What mid-training on a billion tokens would take on devices that are not here: computed, as docs/scale.md has it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

from ra3_trl.report.cost import DEVICES, Shape, count_flops, phase_seconds
from ra3_trl.report.estimate import Workload


# Weights in products, all weights, layers: Qwen2.5-Coder's (its smaller two have tied embeddings).
MODELS = {
    "0.5B": (494e6, 494e6, 24),
    "1.5B": (1.54e9, 1.54e9, 28),
    "7B": (7.07e9, 7.62e9, 28),
}
TOKENS, PER_LINE, PER_CHUNK = 10**9, 10, 800
E_STEPS, BATCH = 20, 64  # documents an update, on all devices


def measure(device: str = "h100", devices: tuple[int, ...] = (1, 8, 64)) -> list[dict]:
    """One iteration with the defaults: FLOPs, hours by phase and dollars, for each model and number of devices."""
    args = SimpleNamespace(
        max_latent_length=12, horizon=2, kl_coef=0.05, reward_model="live", annotation="resample", uses_latents=True,
        max_branch_tokens=8192, train_batch_size=8, activation_checkpointing=False,
    )  # fmt: skip
    chunks, boundaries, latents = TOKENS // PER_CHUNK, PER_CHUNK // PER_LINE, 8
    e_branches = E_STEPS * BATCH * boundaries // 4 * latents
    work = Workload(
        E_STEPS * BATCH,
        e_branches,
        e_branches * 12,
        chunks,
        chunks * boundaries,
        chunks * boundaries * latents,
        TOKENS,
    )
    rows = []
    for name, (products, weights, layers) in MODELS.items():
        shape = Shape(int(products), int(2 * weights), layers)
        costs = count_flops(shape, work, args, PER_LINE)
        for count in devices:
            hours = {phase: phase_seconds(cost, shape, DEVICES[device], count) / 3600 for phase, cost in costs.items()}
            flops = sum(cost.flops for cost in costs.values())
            dollars = sum(hours.values()) * count * DEVICES[device].price
            rows.append({"model": name, "devices": count, "flops": flops, "hours": hours, "dollars": dollars})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=tuple(DEVICES), default="h100")


def run(args: argparse.Namespace) -> dict:
    """The rows, and as `table` the page's Markdown."""
    rows = measure(args.device)
    table = ["", f"| model | {args.device} | FLOPs | E-phase, h | annotation, h | M-phase, h | dollars |"]
    table += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        hours = " | ".join(f"{row['hours'][phase]:.3g}" for phase in ("E-phase", "annotation", "M-phase"))
        table.append(f"| {row['model']} | {row['devices']} | {row['flops']:.1e} | {hours} | {row['dollars']:,.0f} |")
    return {"computed": True, "device": args.device, "rows": rows, "table": "\n".join(table)}
