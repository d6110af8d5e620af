"""Curves of a run as a PNG, from the logs of the trainers."""

from __future__ import annotations

from pathlib import Path


def plot_run(logs: dict[str, list[dict]], held_out: dict[str, dict[str, float]], path: str | Path) -> None:
    """Draws what a mid-training run did.

    Args:
        logs (`dict[str, list[dict]]`):
            `trainer.state.log_history` of each run, by name; the first is the one with an E-phase.
        held_out (`dict[str, dict[str, float]]`):
            Held-out nats per code token: measure -> model -> value.
        path (`str` or `Path`):
            The PNG to write. Needs matplotlib (`pip install "ra3-trl[plots]"`).
    """
    import matplotlib  # an optional dependency, and slow to load

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = ["#1b6ca8", "#d1495b", "#8d8d8d"]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    first = next(iter(logs.values()))
    for axis, key, title in (
        (axes[0], "estep/gain", "E-phase: gain of a latent (nats)"),
        (axes[1], "estep/think_rate", "E-phase: P(think)"),
    ):
        points = [(entry["step"], entry[key]) for entry in first if key in entry]
        axis.plot(*zip(*points, strict=True) if points else ([], []), color=colors[0], marker="o", markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
    axes[0].axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes[1].set_ylim(bottom=0)
    for color, (name, log) in zip(colors, logs.items(), strict=False):
        points = [(entry["step"], entry["mstep/code_loss"]) for entry in log if "mstep/code_loss" in entry]
        axes[2].plot(
            *zip(*points, strict=True) if points else ([], []), color=color, marker="o", markersize=3, label=name
        )
    axes[2].set_title("M-phase: loss of code tokens (nats)", fontsize=10)
    axes[2].set_xlabel("update")
    axes[2].legend(frameon=False, fontsize=9)
    models = list(next(iter(held_out.values())))
    for i, (color, model) in enumerate(zip([colors[2], colors[1], colors[0]], models, strict=False)):
        at = [x + 0.25 * (i - (len(models) - 1) / 2) for x in range(len(held_out))]
        values = [row[model] for row in held_out.values()]
        axes[3].plot(at, values, "o", color=color, label=model)
        for x, value in zip(at, values, strict=True):
            text = f"{value:.3f}"
            axes[3].annotate(text, (x, value), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    axes[3].margins(x=0.25, y=0.3)
    axes[3].set_xticks(range(len(held_out)), list(held_out))
    axes[3].set_title("Held-out, nats per code token (lower is better)", fontsize=10)
    axes[3].legend(frameon=False, fontsize=8, ncols=len(models), loc="upper center")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
