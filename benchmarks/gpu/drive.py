"""Runs the stages of a plan within a time limit, and puts together what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ra3_trl.analysis import Estimate

from ..common import say
from ..replication.base import last_checkpoint
from .evidence import Evidence, evidence_stages
from .plan import ARMS, EVALUATED, MATCHED, MEASURES, OURS, Preset, Stage, later_stages, measure_stage, train_stage


GRACE = 60.0  # seconds between being asked to end and being killed
COUNT = 30.0  # seconds after which a stage's are written down, again and again
_STATE = "state.json"
_ROOT = str(Path(__file__).parents[2])  # where `benchmarks` is
_PAIRS = [(ours, theirs) for ours in OURS for theirs in ARMS[: ARMS.index(ours)]]
_SUMS = {"ce": "log_likelihood", "ce_never": "never", "elbo": "elbo", "bound_multi": "multi_sample"}  # log-likelihoods
_HELD_OUT = ("ce", "ce_never", "elbo", "bound_multi", "think_rate", "gain")


class State:
    """Seconds of each stage over all sittings, and updates that followed from them; a file of the folder."""

    def __init__(self, folder: Path):
        self.path = folder / _STATE
        known = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.updates: dict[str, int] = known.get("updates", {})

    def save(self) -> None:
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps({"seconds": self.seconds, "updates": self.updates}, indent=1) + "\n", "utf-8")
        os.replace(aside, self.path)

    def matched_updates(self, preset: Preset, arm: str, seed: int) -> int:
        """Updates of an arm of [`MATCHED`]: as many as take the time that they are matched to, start and all, but
        without the evaluation at the end; decided once."""
        name = f"{arm}-{seed}"
        if name not in self.updates:
            of_these, as_long = (self._training_seconds(other, seed) for other in MATCHED[arm])
            self.updates[name] = max(preset.updates, round(preset.updates * as_long / of_these))
            self.save()
        return self.updates[name]

    def _training_seconds(self, arm: str, seed: int) -> float:
        evaluated = json.loads((self.path.parent / f"seed-{seed}" / arm / EVALUATED).read_text("utf-8"))
        return self.seconds[f"{arm}-{seed}"] - evaluated["eval_runtime"]


def stages(folder: Path, preset: Preset, state: State) -> Iterator[Stage]:
    """All stages in order; each is asked for when those before it are done."""
    if isinstance(preset, Evidence):
        yield from evidence_stages(folder, preset, state)
        return
    for seed in preset.seeds:
        for arm in ("ntp", "ra3", "hindsight"):
            yield train_stage(folder, preset, arm, seed, preset.updates)
        for arm in MATCHED:
            yield train_stage(folder, preset, arm, seed, state.matched_updates(preset, arm, seed))
        for arm in ARMS:
            yield measure_stage(folder, preset, arm, seed)
    yield from later_stages(folder, preset)


def drive(folder: Path, preset: Preset, seconds: float) -> bool:
    """Does what fits into `seconds`, going on where the last call ended; whether all is done.

    Raises:
        `RuntimeError`: if a stage fails; its output is in `logs/`.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    state, end = State(folder), time.monotonic() + seconds
    for stage in stages(folder, preset, state):
        if stage.done.exists():
            continue
        left = end - time.monotonic() - GRACE
        if left <= 0 or not run_stage(stage, folder / "logs" / f"{stage.name}.log", left, state):
            say(f"{stage.name} is not done; call again")
            return False
    say("all is done")
    return True


def run_stage(stage: Stage, log: Path, seconds: float, state: State) -> bool:
    """Runs a stage for as long as there is time; whether it was done."""
    words = [sys.executable, *stage.words]
    if stage.output is not None and (last := last_checkpoint(stage.output)):
        words += ["--resume_from_checkpoint", last]
    before, begin = state.seconds.get(stage.name, 0), time.monotonic()
    say(f"{stage.name}: {before:.0f} s before")

    def count() -> None:
        state.seconds[stage.name] = before + time.monotonic() - begin
        state.save()

    with log.open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": _ROOT})
        try:
            code = _wait(process, seconds, count)
            if code is None:
                process.send_signal(stage.stop)
                _wait(process, GRACE, count)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    count()
    if stage.done.exists():
        return True
    if code is not None:
        tail = log.read_bytes()[-2000:].decode(errors="replace")
        raise RuntimeError(f"{stage.name} failed with exit code {code}; {log} ends with:\n{tail}")
    return False


def _wait(process: subprocess.Popen[bytes], seconds: float, count: Callable[[], None]) -> int | None:
    """The exit code, or `None` after `seconds`; counts them as it goes, for a call that is killed."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        try:
            return process.wait(min(left, COUNT))
        except subprocess.TimeoutExpired:
            count()
    return None


def by_document(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Differences of arms in nats per token of code, paired by held-out document of all seeds, with intervals over
    documents: what one seed can tell of, but for its noise in training."""
    found: dict[str, Any] = {}
    for name, key in _SUMS.items() if runs else ():
        rows = found[f"{name}_by_document"] = {}
        for ours, theirs in _PAIRS:
            pairs = [pair for run in runs for pair in zip(run[ours]["sums"], run[theirs]["sums"], strict=True)]
            tokens = sum(a["tokens"] for a, _ in pairs) / len(pairs)
            rows[f"{ours} less {theirs}"] = asdict(Estimate.of([(b[key] - a[key]) / tokens for a, b in pairs]))
    return found


def collect(folder: Path, preset: Preset) -> dict[str, Any]:
    """What is there so far: held-out numbers over seeds, pass@k, curves of GRPO, seconds."""
    state = State(folder)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "seeds": list(preset.seeds)}
    found |= {"seconds": state.seconds, "updates": state.updates}
    held_out = {}
    for seed in preset.seeds:
        paths = {arm: folder / f"seed-{seed}" / f"{arm}-{MEASURES}" for arm in ARMS}
        if all(path.exists() for path in paths.values()):
            held_out[seed] = {arm: json.loads(path.read_text("utf-8")) for arm, path in paths.items()}
    for name in _HELD_OUT if held_out else ():
        values = {arm: [one[arm][f"eval_{name}"] for one in held_out.values()] for arm in ARMS}
        found[name] = {arm: asdict(Estimate.of(of_arm)) for arm, of_arm in values.items()}
        for ours, theirs in _PAIRS:
            less = [a - b for a, b in zip(values[ours], values[theirs], strict=True)]
            found[name][f"{ours} less {theirs}"] = asdict(Estimate.of(less))
    found |= by_document(list(held_out.values()))
    for path in sorted(folder.glob("measures*.json")):
        found[path.stem] = json.loads(path.read_text("utf-8"))
    for path in sorted(folder.glob("compare-*/compare.json")):
        found[path.parent.name] = json.loads(path.read_text("utf-8"))
    for path in sorted(folder.glob("rlvr-*/trainer_state.json")):
        log = json.loads(path.read_text("utf-8"))["log_history"]
        found[path.parent.name] = [entry["reward"] for entry in log if "reward" in entry]
    return found
