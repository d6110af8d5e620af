"""A line of the log, put together of what `Trainer` says and what the loop has measured on all processes."""

from __future__ import annotations

from transformers import TrainerState

from .loop import EMLoop


def log_line(logs: dict[str, float], loop: EMLoop, state: TrainerState, counts: dict[str, int]) -> dict[str, float]:
    """Adds the loop's metrics to a line of training, and gives each phase's loss its own name.

    `Trainer` averages over all updates of a line or a run. `loss` and `train_loss` are those of M-phases,
    cross-entropy as in `SFTTrainer`; `estep/loss` and `train_estep_loss` are an E-phase's surrogate of policy
    gradients.

    Args:
        logs (`dict[str, float]`):
            `Trainer`'s line; the summary of a run is changed in place, since `train` returns it.
        loop ([`EMLoop`]), state (`TrainerState`):
            What has been measured, and where training is.
        counts (`dict[str, int]`):
            Where every text went; in the first line only.
    """
    if "train_loss" in logs and (of_run := loop.losses.averages()):
        del logs["train_loss"]
        logs |= {"train_loss" if kind == "M" else "train_estep_loss": loss for kind, loss in of_run.items()}
    if "loss" not in logs:
        return logs
    metrics = loop.pop_metrics() | dict.fromkeys(("tokens", "num_tokens"), state.num_input_tokens_seen)
    losses = {name: metrics.pop(name) for name in ("loss", "estep/loss") if name in metrics}
    rest = {name: value for name, value in logs.items() if name != "loss"}
    if not any("phase" in entry for entry in state.log_history):  # an evaluation may stand before the first line
        rest |= {f"data/{name}": float(value) for name, value in counts.items()}
    return losses | rest | metrics | {"phase": float(loop.schedule.phase_at(max(state.global_step - 1, 0)).number)}
