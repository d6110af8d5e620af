"""Devices that a dry run calculates for. Nothing here imports torch: what can't be calculated is refused at once."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """A device by its maker's data sheet: `flops` a second of dense products in bfloat16, `bandwidth` in bytes a
    second, `memory` in bytes. Assumed are `price`, in dollars an hour, the `share` of the peak that products reach,
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
OPTIONS = {
    "device": "with `dry_run`: what the work would take on such devices, by arithmetic: FLOPs, hours, money",
    "devices": "how many of them (default: 1)",
    "price_per_hour": "dollars for one of them and an hour (default: what is usual, which is printed)",
}


def choose_device(
    device: str | None, devices: int | None, price_per_hour: float | None, dry_run: bool
) -> tuple[Device, int] | None:
    """Finds the device and says how many of them; `None` where nobody asks.

    Raises:
        `ValueError`: for what can't be calculated.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"`devices` is {devices}; use at least 1.")
    if price_per_hour is not None and not 0 <= price_per_hour < float("inf"):
        raise ValueError(f"`price_per_hour` is {price_per_hour}; give dollars, at least 0.")
    if device is not None and device not in DEVICES:
        raise ValueError(f"`device` is {device!r}; choose one of {', '.join(DEVICES)}.")
    for name, value in (("device", device), ("devices", devices), ("price_per_hour", price_per_hour)):
        if value is not None and not dry_run:
            raise ValueError(f"`{name}` is {value!r}, which is for an estimate; set `dry_run` too, or leave it out.")
        if value is not None and device is None:
            raise ValueError(f"`{name}` is {value!r} without a `device`; name one, such as h100.")
    if device is None:
        return None
    chosen = DEVICES[device]
    return (chosen if price_per_hour is None else replace(chosen, price=price_per_hour)), devices or 1
