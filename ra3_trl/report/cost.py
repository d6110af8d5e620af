"""What a run would cost on devices that are not here: FLOPs, hours and money, by a stated model of a device.

FLOPs are those of matrix products: 2 a weight and token forwards, 4 backwards; attention's own are left out (a few per
cent up to some thousand tokens). Drawing latents is one token a forward: it takes as long as reading the weights or
launching the kernels, if that is longer than its products. All else runs at `share` of the device's peak. Devices
share the documents and hold the model whole; what they tell each other is in `share`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from ..config import RA3Config
from .estimate import Workload


LAUNCHES = 48  # a layer in a forward that draws: 289 of 6 layers (benchmarks/LOG.md, 2026-11-28)
TAGS = 3  # tokens of think prefix and closure


@dataclass(frozen=True)
class Device:
    """A device by its maker's data sheet: `flops` a second of dense products in bfloat16, `bandwidth` in bytes a
    second, `memory` in bytes. Assumed are `price`, in dollars an hour, the `share` of the peak that training reaches,
    and `launch`, the seconds of a kernel launch."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    price: float
    share: float = 0.4
    launch: float = 5e-6


DEVICES = {
    "a100": Device("A100 80 GB", 312e12, 2.0e12, 80e9, 1.8),
    "l40s": Device("L40S", 362e12, 0.86e12, 48e9, 1.0),
    "h100": Device("H100 SXM", 989e12, 3.35e12, 80e9, 3.0),
    "h200": Device("H200", 989e12, 4.8e12, 141e9, 3.5),
    "b200": Device("B200", 2250e12, 8.0e12, 192e9, 5.0),
}


@dataclass(frozen=True)
class Shape:
    """What counts of a model: weights in matrix products (each embedding read is none), all weights' bytes, layers."""

    weights: int
    size: int
    layers: int

    @classmethod
    def of(cls, model: nn.Module, layers: int) -> Shape:
        """Reads the shape of a language model; a head that is tied to the embeddings is a product."""
        parameters = list(model.parameters())
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(p.numel() for p in parameters) - (0 if head is embeddings else embeddings.numel())
        return cls(weights, sum(p.numel() * p.element_size() for p in parameters), layers)


@dataclass(frozen=True)
class PhaseCost:
    """FLOPs of a phase in all: `products` run at the share of the peak; `drawn` in `forwards` of a token a branch."""

    products: float
    drawn: float = 0.0
    forwards: int = 0

    @property
    def flops(self) -> float:
        return self.products + self.drawn


def count_flops(shape: Shape, work: Workload, args: RA3Config, line: float) -> dict[str, PhaseCost]:
    """Counts the FLOPs of each phase. `line` are the tokens of a line of code, on average.

    Example: a model of 10 weights, an E-branch of 12 tokens and a horizon of 2 lines of 10: 2 x 10 x 12 = 240 FLOPs to
    draw, 2 x 10 x (3 + 20) = 460 to score.
    """
    n, drawn = shape.weights, args.max_latent_length
    forward, learn = 2 * n, (8 if args.activation_checkpointing else 6) * n
    scored = TAGS + args.horizon * line
    e_tokens = work.m_tokens * work.e_chunks / max(work.m_chunks, 1)  # of the documents
    latents = work.e_branches * drawn
    # Documents and latents are read once more for each other model: KL's start, a frozen or bare reward model.
    others = bool(args.kl_coef) + (args.reward_model != "live")
    e_products = forward * (e_tokens + work.e_branches * scored) + (learn + others * forward) * (e_tokens + latents)
    per_forward = max(args.max_branch_tokens // (drawn + 1), 1)  # branches in flight

    def forwards(branches: int, chunks: int) -> int:
        batches = math.ceil(chunks / args.train_batch_size)
        return drawn * batches * math.ceil(branches / max(batches, 1) / per_forward) if branches else 0

    costs = {"E-phase": PhaseCost(e_products, forward * latents, forwards(work.e_branches, work.e_chunks))}
    if args.uses_latents:
        scores = 0 if args.annotation == "policy" else scored
        products = forward * (work.m_tokens + work.annotation_branches * scores)
        ahead = forwards(work.annotation_branches, work.m_chunks)
        costs["annotation"] = PhaseCost(products, forward * work.annotation_branches * drawn, ahead)
    return costs | {"M-phase": PhaseCost(learn * work.m_tokens)}


def phase_seconds(cost: PhaseCost, shape: Shape, device: Device, devices: int = 1) -> float:
    """The time that a phase takes on so many devices."""
    each = max(LAUNCHES * shape.layers * device.launch, shape.size / device.bandwidth)
    drawing = max(cost.forwards * each, cost.drawn / (device.flops * device.share))
    return (drawing + cost.products / (device.flops * device.share)) / devices


def this_machine(device: torch.device, size: int = 1024) -> Device:
    """This machine as a [`Device`]: its peak is that of a product of matrices in float32, and the share 1."""
    x = torch.ones(size, size, device=device)
    rates = []
    for _ in range(4):  # the first warms up
        begin = time.perf_counter()
        float((x @ x)[0, 0])  # read, so that a device has done it
        rates.append(2 * size**3 / (time.perf_counter() - begin))
    return Device("this machine", max(rates), math.inf, 0, 0, share=1.0, launch=0.0)


@dataclass(frozen=True)
class Cost:
    """All that `--device` adds to a dry run. `measured` are the hours by a short timing of this machine, `here` those
    that the same model of a device gives for it."""

    device: Device
    devices: int
    phases: dict[str, PhaseCost]
    hours: dict[str, float]
    memory: int
    measured: float
    here: float

    def render(self) -> str:
        """Writes it as text."""
        flops = ", ".join(f"{name} {cost.flops:.2e}" for name, cost in self.phases.items() if cost.flops)
        hours, device = sum(self.hours.values()), self.device
        by_phase = ", ".join(f"{name} {h:.3g} h" for name, h in self.hours.items() if h)
        fits = "fits" if self.memory <= device.memory else "does not fit: shard it or use an adapter"
        lines = {
            "Device": f"{self.devices} x {device.name}: {device.flops / 1e12:.0f} TFLOP/s, {device.share:.0%} reached",
            "": f"{device.bandwidth / 1e12:.3g} TB/s; {LAUNCHES} launches a layer, {device.launch * 1e6:.0f} us",
            "FLOPs": f"{sum(cost.flops for cost in self.phases.values()):.2e}: {flops}",
            "Fits": f"{self.memory / 1e9:.1f} GB of {device.memory / 1e9:.0f} GB on each device: {fits}",
            "Hours": f"{hours:.3g} on {self.devices} (computed): {by_phase}",
            "Money": f"{hours * self.devices * device.price:,.2f} dollars, at {device.price:g} for each and hour",
            "Checked": f"this machine: {self.measured:.3g} h by the timing, {self.here:.3g} h by the same model, "
            f"ratio {self.measured / max(self.here, 1e-12):.2f}",
        }
        return "\n".join(f"{name:11} {text}" for name, text in lines.items())
