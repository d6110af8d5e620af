"""The preset `evidence`: a base, next-token prediction and RA3 at equal compute, on two corpora.

`traces` is the replication's domain with several kinds of program, for which the model is prepared first; `mbpp` is
MBPP's training split as output prediction, with pass@k of HumanEval and MBPP. The first call ends with these; `--grpo`
goes on from next-token prediction and RA3. Sizes are by arithmetic (benchmarks/README.md), no GPU was lent yet.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from .domain import PREPARED, PROMPTS, TRAIN
from .plan import PRESETS, TRAINED, Preset, Stage, arm_folder, options, ra3_words, train_stage


ARMS = ("base", "ntp", "ntp_compute", "ra3")
COMPARED = ("base", "ntp_compute", "ra3")  # whose completions are drawn
LEARNERS = ("ntp_compute", "ra3")
BENCHMARKS = ("humaneval", "mbpp")
_REWARD = "benchmarks.replication.assertion.assertion_reward"


class Matching(Protocol):
    """What decides how many updates an arm gets: the seconds of others."""

    def matched_updates(self, preset: Preset, arm: str, seed: int) -> int: ...


@dataclass(frozen=True)
class Evidence(Preset):
    """A corpus of the preset `evidence`.

    Args:
        corpus (`str`):
            `"traces"` or `"mbpp"`.
        rows (`int`):
            Most rows of the corpus, and programs of the preparation.
        prepare (`int`):
            Updates of the preparation, on programs with traces; 0 leaves it out.
        measured (`int`):
            Programs that the arms are measured on.
        grpo (`bool`):
            Whether to go on with GRPO.
        files (`Mapping[str, str]`):
            A file for each of [`BENCHMARKS`], for a machine without a network.
    """

    corpus: str = "traces"
    rows: int = 4000
    prepare: int = 0
    measured: int = 128
    grpo: bool = False
    files: Mapping[str, str] = field(default_factory=dict)


_TRAIN = dict(PRESETS["h100"].train) | {
    "max_length": 512, "per_device_train_batch_size": 32, "num_latents": 8, "max_latent_length": 48, "horizon": 1,
    "boundary_selection": "gate", "max_boundaries": 0, "e_learning_rate": 1e-5, "learning_rate": 2e-5,
    "save_steps": 10, "eval_max_boundaries": 1,
}  # fmt: skip
_DRAWN = {"max_new_tokens": 256, "batch_size": 512, "dtype": "bfloat16", "no_ce": True}
_GRPO = {
    "max_steps": 40, "per_device_train_batch_size": 64, "num_generations": 8, "learning_rate": 5e-6, "save_steps": 10,
    "logging_steps": 1, "bf16": True, "report_to": "none", "save_total_limit": 1,
}  # fmt: skip
_LARGE = Evidence(
    e_steps=8, m_steps=16, train=_TRAIN, hindsight={}, compare=_DRAWN, rlvr=_GRPO, eval_documents=16, prepare=120
)
_TOY_TRAIN = dict(PRESETS["toy"].train) | {"max_length": 160, "num_latents": 2, "existing_comments": "keep"}
_TOY_DRAWN = {"max_new_tokens": 8, "no_ce": True}
_TOY = Evidence(
    e_steps=1, m_steps=1, train=_TOY_TRAIN, hindsight={}, compare=_TOY_DRAWN, rlvr=PRESETS["toy"].rlvr,
    eval_documents=2, prepare=1, rows=12, measured=2,
)  # fmt: skip
SUITES: dict[str, dict[str, Evidence]] = {
    name: {"traces": one, "mbpp": replace(one, corpus="mbpp", prepare=0, tasks=BENCHMARKS)}
    for name, one in (("evidence", _LARGE), ("evidence_toy", _TOY))
}


def evidence_stages(folder: Path, preset: Evidence, state: Matching) -> Iterator[Stage]:
    """All stages of a corpus in order."""
    data, mbpp, seed = folder / "data", preset.files.get("mbpp", ""), preset.seeds[0]
    words = ("-m", "benchmarks.gpu.domain", "data", preset.corpus, str(seed), str(preset.rows), str(data), mbpp)
    yield Stage("data", words, data / PROMPTS)
    if preset.prepare:
        yield _preparation(folder, preset, data)
        preset = replace(preset, model=str(folder / "prepared"))
    preset = replace(preset, dataset=str(data / TRAIN))
    for arm in ("ntp", "ra3"):
        yield train_stage(folder, preset, arm, seed, preset.updates)
    yield train_stage(folder, preset, "ntp_compute", seed, state.matched_updates(preset, "ntp_compute", seed))
    places = {arm: arm_folder(folder, preset, arm, seed) for arm in ARMS}
    yield _measures(folder / "measures.json", preset, places)
    yield from _passk(folder, preset, {arm: places[arm] for arm in COMPARED}, "")
    if preset.grpo:
        yield from _grpo(folder, preset, places)


def _preparation(folder: Path, preset: Evidence, data: Path) -> Stage:
    output = folder / "prepared"
    settings = {
        "model_name_or_path": preset.model, "dataset_name": data / PREPARED, "output_dir": output, "seed": 0,
        "e_steps": 0, "m_steps": preset.prepare, **preset.train, "existing_comments": "keep", "learning_rate": 5e-5,
    }  # fmt: skip
    return Stage("prepared", ra3_words("train", *options(settings)), output / TRAINED, output, signal.SIGTERM)


def _measures(out: Path, preset: Evidence, places: Mapping[str, str]) -> Stage:
    named = [f"{arm}={place}" for arm, place in places.items()]
    words = ("measure", preset.corpus, str(preset.measured), str(out), preset.files.get("mbpp", ""), *named)
    return Stage(out.stem, ("-m", "benchmarks.gpu.domain", *words), out)


def _passk(folder: Path, preset: Evidence, places: Mapping[str, str], suffix: str) -> Iterator[Stage]:
    """Pass@1, greedy, and pass@5, of all problems."""
    ways: dict[str, dict[str, Any]] = {"greedy": {"num_samples": 1, "k": "1"}}
    ways["sampled"] = {"num_samples": 5, "temperature": 0.8, "k": "1,5"}
    for task in preset.tasks:
        for way, drawn in ways.items():
            output = folder / f"compare-{task}-{way}{suffix}"
            files = {"task_file": preset.files[task]} if task in preset.files else {}
            known = {"task": task, **files, "output_dir": output, **preset.compare, **drawn}
            words = ra3_words("compare", *places.values(), "--names", *places, *options(known))
            yield Stage(output.name, words, output / "compare.json")


def _grpo(folder: Path, preset: Evidence, places: Mapping[str, str]) -> Iterator[Stage]:
    """GRPO from next-token prediction and from RA3, on programs rewarded by the sandbox's verdict or on MBPP's tasks,
    and what it led to."""
    if preset.corpus == "traces":
        task: dict[str, Any] = {"dataset_name": folder / "data" / PROMPTS, "reward_funcs": _REWARD}
        task["max_completion_length"] = min(80, int(preset.train["max_length"]))
    else:
        task = {"task": "mbpp", "max_completion_length": preset.compare["max_new_tokens"]}
        task |= {"task_file": preset.files["mbpp"]} if "mbpp" in preset.files else {}
    learned = {}
    for arm in LEARNERS:
        output = folder / f"rlvr-{arm}"
        learned[f"{arm}-grpo"] = str(output)
        settings = {"model_name_or_path": places[arm], "output_dir": output, "seed": 0, **(preset.rlvr or {}), **task}
        yield Stage(output.name, ra3_words("rlvr", *options(settings)), output / TRAINED, output)
    yield _measures(folder / "measures-grpo.json", preset, learned)
    yield from _passk(folder, preset, learned, "-grpo")
