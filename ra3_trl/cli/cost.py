"""What work would take on devices that are not here: tokens, FLOPs, hours and money, by arithmetic.

A phase is so many passes through the model. A pass takes the longest of three: its matrix products (2 FLOPs a weight
and token forwards, 2 backwards and 2 more where the weight is trained) at a share of the device's peak, reading the
weights, launching its kernels. Left out are attention's own products (a few per cent up to some thousand tokens),
optimizer steps, evaluations and what devices say to each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import RA3Config
from ..policy import WINDOW
from ..report.estimate import Workload
from ..report.summary import duration
from ..rollout import most_cached
from .devices import Device


# Kernels a layer, counted (benchmarks/LOG.md, 2026-11-28): 289 of a forward of 6 layers, 2,776 forwards and backwards.
FORWARD, LEARN = 48, 463
_TAGS = 3  # tokens of think prefix and closure


@dataclass(frozen=True)
class Shape:
    """What counts of a model: weights in matrix products of a token (embeddings that are only read are none, of a
    mixture's experts those that a token goes to), those of them that are trained, bytes of all weights, layers."""

    weights: int
    trained: int
    size: int
    layers: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Reads the shape of a language model; a head that is tied to the embeddings is a product."""
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        config = model.config.get_text_config()
        asked = _asked_experts(config.to_dict())
        products = {
            p: round(p.numel() * (asked if ".experts." in name else 1))
            for name, p in model.named_parameters()
            if p is not embeddings or embeddings is head
        }
        return cls(
            weights=sum(products.values()),
            trained=sum(count for p, count in products.items() if p.requires_grad),
            size=sum(p.numel() * p.element_size() for p in model.parameters()),
            layers=config.num_hidden_layers,
        )


def _asked_experts(config: Mapping[str, Any]) -> float:
    """The share of a mixture's experts that a token goes to; 1 where there is no mixture."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")  # what they are called, by architecture
    experts = next((config[name] for name in names if config.get(name)), 0)
    return config["num_experts_per_tok"] / experts if experts and config.get("num_experts_per_tok") else 1.0


@dataclass(frozen=True)
class Passes:
    """So many passes of `tokens` in all: forwards, and backwards too where it `learns`, for which checkpointing goes
    forwards `again`."""

    count: int
    tokens: float
    learns: bool = False
    again: bool = False

    def flops(self, shape: Shape) -> float:
        """Calculates the FLOPs of all of them."""
        learned = 2 * (shape.weights + shape.trained) if self.learns else 0
        return self.tokens * (2 * shape.weights * (1 + self.again) + learned)


Phases = Mapping[str, tuple[Passes, ...]]


def count_passes(work: Workload, args: RA3Config, chunk_tokens: float, line: float, together: int) -> Phases:
    """Counts the passes of each phase.

    Where `horizon` is above 1 annotation goes through windows of 8 boundaries, one after the other, as it does where
    no latent is placed; with many placed it takes up to twice as many passes.

    Args:
        work ([`~ra3_trl.report.estimate.Workload`]):
            Of one device.
        args ([`RA3Config`]):
            The settings.
        chunk_tokens (`float`), line (`float`):
            Tokens of a chunk and of a line of code, on average.
        together (`int`):
            Documents that are rolled out or annotated in lockstep.
    """
    scored = _TAGS + args.horizon * line  # a branch's, beside its latent
    documents, rounds = work.e_chunks * chunk_tokens, math.ceil(work.e_chunks / together)
    learned = documents + work.e_tokens
    # Documents and latents are read once more by each other model: the weights at the start, frozen or bare ones.
    others = bool(args.kl_coef) + (args.reward_model != "live")
    batch = args.train_batch_size
    e_phase = (
        _read(documents, rounds, args),
        _draw(work.e_branches, rounds, args),
        _read(work.e_branches * scored, rounds, args),
        _read(others * learned, rounds, args),
        _learn(learned, math.ceil(work.e_chunks / batch), args),
    )
    rounds = math.ceil(work.m_chunks / together)
    boundaries = work.annotated_boundaries / max(work.m_chunks, 1)
    windows = rounds if args.horizon == 1 else rounds * math.ceil(boundaries / WINDOW)
    annotation = (
        _read(work.m_tokens, rounds, args),
        _draw(work.annotation_branches, windows, args),
        _read(0 if args.annotation == "policy" else work.annotation_branches * scored, windows, args),
    )
    m_phase = (_learn(work.m_tokens, math.ceil(work.m_chunks / batch), args),)
    phases = {"E-phase": e_phase, "annotation": annotation if work.annotation_branches else (), "M-phase": m_phase}
    return {name: kept for name, passes in phases.items() if (kept := tuple(p for p in passes if p.tokens))}


def _read(tokens: float, rounds: int, args: RA3Config) -> Passes:
    """Passes over tokens that are there, in so many rounds; a pass holds `max_branch_tokens`."""
    return Passes(rounds * math.ceil(tokens / max(rounds, 1) / args.max_branch_tokens), tokens)


def _learn(tokens: float, rounds: int, args: RA3Config) -> Passes:
    return replace(_read(tokens, rounds, args), learns=True, again=bool(args.activation_checkpointing))


def _draw(branches: float, rounds: int, args: RA3Config) -> Passes:
    """Passes that draw latents: one for each token behind the first, which stands behind the think prefix."""
    length = args.max_latent_length
    flight = most_cached(args.max_branch_tokens, length) // (length + 1)  # branches at the same time
    count = (length - 1) * rounds * math.ceil(branches / max(rounds, 1) / flight)
    return Passes(count, branches * (length - 1))


def seconds_of(passes: tuple[Passes, ...], shape: Shape, device: Device) -> float:
    """Calculates the time that passes take on a device."""
    seconds = 0.0
    for p in passes:
        launches = (LEARN if p.learns else FORWARD) * shape.layers
        least = max(shape.size / device.bandwidth, launches * device.launch)  # of a pass, however few its products
        seconds += max(p.flops(shape) / (device.flops * device.share), p.count * least)
    return seconds


def this_machine(device: torch.device, dtype: torch.dtype = torch.float32, size: int = 1024) -> Device:
    """Measures this machine as a [`Device`]: a product of matrices, a read of memory, small operations."""
    x, long, scalar = (torch.ones(n, device=device, dtype=dtype) for n in (size**2, 16 * size**2, 1))
    square = x.view(size, size)
    product = _quickest(lambda: square @ square)
    read = _quickest(lambda: long.sum())
    launch = _quickest(lambda: [scalar.add_(0) for _ in range(100)][-1]) / 100
    return Device("this machine", 2 * size**3 / product, long.nbytes / read, 0, 0, launch=launch)


def _quickest(work: Callable[[], torch.Tensor]) -> float:
    seconds = []
    for _ in range(4):  # the first warms up
        begin = time.perf_counter()
        work().flatten()[0].item()  # read, so that a device has done it
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@dataclass(frozen=True)
class Cost:
    """
    All that `--device` adds to a dry run.

    Args:
        device ([`Device`]), devices (`int`):
            What the work would be done on.
        shape ([`Shape`]):
            Of the model.
        phases (`dict[str, tuple[Passes, ...]]`):
            What one of the devices does.
        memory (`int`):
            Bytes on each device, at most.
        here ([`Device`]), local (`dict[str, tuple[Passes, ...]]`):
            This machine, and what one of its processes would do.
        timed (`dict[str, float]`):
            Seconds of that by the timing.
    """

    device: Device
    devices: int
    shape: Shape
    phases: Phases
    memory: int
    here: Device
    local: Phases
    timed: dict[str, float]

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase, on all devices."""
        return {name: seconds_of(passes, self.shape, self.device) for name, passes in self.phases.items()}

    @property
    def flops(self) -> dict[str, float]:
        """Of each phase, on all devices together."""
        return {name: self.devices * sum(p.flops(self.shape) for p in passes) for name, passes in self.phases.items()}

    @property
    def dollars(self) -> float:
        return sum(self.seconds.values()) / 3600 * self.devices * self.device.price

    def render(self) -> str:
        """Writes it as text."""
        tokens = {name: self.devices * sum(p.tokens for p in passes) for name, passes in self.phases.items()}
        by_phase = ", ".join(f"{name} {duration(s)}" for name, s in self.seconds.items())
        fits = "fits" if self.memory <= self.device.memory else "does not fit: shard it or use an adapter"
        lines = {
            "Device": f"computed, not measured: {self.devices} x {_describe(self.device)}",
            "": f"kernels a layer: {FORWARD} forwards, {LEARN} forwards and backwards",
            "Passes": f"{sum(tokens.values()):.3g} tokens through the model: {_list(tokens)}",
            "FLOPs": f"{sum(self.flops.values()):.3g}: {_list(self.flops)}",
            "Fits": f"at most {self.memory / 1e9:.1f} GB (by part above) of {self.device.memory / 1e9:.0f} GB on each "
            f"device: {fits}",
            "Hours": f"{sum(self.seconds.values()) / 3600:.3g} on all of them: {by_phase}",
            "Money": f"{self.dollars:,.2f} dollars, at {self.device.price:g} for each and hour",
            "Checked": self._check(),
            " ": f"{_describe(self.here)} (peak, memory and launch measured)",
        }
        return "\n".join(f"{name:11} {text}" for name, text in lines.items())

    def _check(self) -> str:
        """Compares the arithmetic with the timing of this machine, phase by phase and all in all."""
        computed = {name: seconds_of(passes, self.shape, self.here) for name, passes in self.local.items()}
        timed = {name: self.timed.get(name, 0.0) for name in computed}
        pairs = {name: (timed[name], computed[name]) for name in computed}
        pairs["all"] = (sum(timed.values()), sum(computed.values()))
        said = [f"{name} ratio {a / max(b, 1e-12):.2f} ({a:.3g} s / {b:.3g} s)" for name, (a, b) in pairs.items()]
        return f"timing here / same arithmetic for this machine: {', '.join(said)}"


def _describe(device: Device) -> str:
    return (
        f"{device.name}, {device.flops / 1e12:.3g} TFLOP/s of which {device.share:.0%} are reached, "
        f"{device.bandwidth / 1e12:.3g} TB/s, {device.launch * 1e6:.3g} us a launch"
    )


def _list(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
