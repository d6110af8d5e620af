"""What is run: presets, and the stages that follow from them."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ra3_trl.experimental.hindsight import HindsightConfig, make_proposals


ARMS = ("base", "ntp", "ntp_compute", "ra3", "ra3_compute", "hindsight")
OURS = ("ra3", "ra3_compute", "hindsight")  # with latents: of the policy alone, and also proposed in hindsight
MATCHED = {"ntp_compute": ("ntp", "ra3"), "ra3_compute": ("ra3", "hindsight")}  # the one, for the other's time
MEASURES = "measures.json"
# Settings of the training that matter where it is measured.
_HELD_OUT = ("max_length", "max_latent_length", "horizon", "existing_comments", "max_boundaries", "bf16", "use_cpu")
TRAINED = "trainer_state.json"  # the last thing that `ra3 train` and `ra3 rlvr` write beside their weights
EVALUATED = "eval_results.json"  # of `ra3 train` at its end, with its seconds


@dataclass(frozen=True)
class Preset:
    """A size of the comparison.

    Args:
        e_steps, m_steps (`int`):
            Updates of RA3's phases; next-token prediction has as many in all.
        train (`dict`):
            Options of `ra3 train` for all arms.
        seeds (`tuple[int, ...]`):
            Of data order, held-out documents and noise; tasks and RLVR are for the first only.
        tasks (`tuple[str, ...]`):
            For `ra3 compare --task`; `()` leaves pass@k out.
        compare (`dict`):
            Options of `ra3 compare`.
        hindsight (`dict`):
            Further options of `ra3 train` for the arm of that name: its proposals.
        rlvr (`dict` or `None`):
            Options of `ra3 rlvr`; `None` leaves it out.
        model (`str` or `None`):
            Folder or Hub id; `None` is the demo's SmolLM2-135M.
        code_dir (`str` or `None`):
            The corpus; `None` is the standard library.
        dataset (`str` or `None`):
            A file of rows in its place.
        eval_documents (`int`):
            Documents held out.
    """

    e_steps: int
    m_steps: int
    train: Mapping[str, Any]
    hindsight: Mapping[str, Any]
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = ()
    compare: Mapping[str, Any] = field(default_factory=dict)
    rlvr: Mapping[str, Any] | None = None
    model: str | None = None
    code_dir: str | None = None
    dataset: str | None = None
    eval_documents: int = 64

    @property
    def updates(self) -> int:
        """Of both phases."""
        return self.e_steps + self.m_steps


_SHARED = {
    "lr_scheduler_type": "constant", "existing_comments": "strip", "save_strategy": "steps", "save_total_limit": 1,
    "report_to": "none", "logging_steps": 1, "log_latents_steps": 0, "eval_strategy": "no",
    "boundary_selection": "random",  # `max_boundaries` of them
    "eval_max_boundaries": 1, "eval_num_latents": 2,  # `measure` does what `ra3 train` does at its end
}  # fmt: skip
PRESETS = {
    "cpu": Preset(
        e_steps=4, m_steps=10, seeds=(0,), eval_documents=12, hindsight={"proposal": "causal+chat"},
        train=_SHARED | {
            "max_length": 192, "per_device_train_batch_size": 2, "num_latents": 4, "max_latent_length": 10,
            "horizon": 1, "max_boundaries": 6, "e_learning_rate": 1e-5, "learning_rate": 2e-5, "save_steps": 5,
            "use_cpu": True, "abstraction_head": False,
        },
    ),
    "cpu_short": Preset(  # for half a billion parameters on two cores
        e_steps=4, m_steps=8, seeds=(0,), eval_documents=12, hindsight={"proposal": "causal+chat"},
        train=_SHARED | {
            "max_length": 96, "per_device_train_batch_size": 2, "num_latents": 4, "max_latent_length": 10,
            "horizon": 1, "max_boundaries": 3, "e_learning_rate": 5e-6, "learning_rate": 1e-5, "save_steps": 6,
            "use_cpu": True, "abstraction_head": False,
        },
    ),
    "h100": Preset(
        e_steps=60, m_steps=240, seeds=(0,), eval_documents=256, tasks=("humaneval", "mbpp"),
        hindsight={"proposal": "causal+fim"},
        train=_SHARED | {
            "max_length": 1024, "per_device_train_batch_size": 16, "num_latents": 8, "max_latent_length": 16,
            "horizon": 2, "max_boundaries": 16, "e_learning_rate": 2e-6, "learning_rate": 1e-5, "save_steps": 20,
            "bf16": True, "max_branch_tokens": 65536, "abstraction_head": False,
        },
        compare={
            "num_samples": 5, "temperature": 0.8, "k": "1,5", "max_new_tokens": 512, "batch_size": 160,
            "dtype": "bfloat16", "no_ce": True,
        },
        rlvr={
            "task": "mbpp", "max_steps": 120, "per_device_train_batch_size": 32, "num_generations": 8,
            "max_completion_length": 256, "learning_rate": 2e-6, "save_steps": 10, "logging_steps": 1,
            "bf16": True, "report_to": "none", "save_total_limit": 1,
        },
    ),
    "toy": Preset(
        e_steps=2, m_steps=2, eval_documents=2,
        hindsight={"proposal": "causal+template", "proposal_template": "{prefix}{suffix}{think}"},
        train=_SHARED | {
            "max_length": 128, "per_device_train_batch_size": 2, "num_latents": 4, "max_latent_length": 4,
            "max_boundaries": 2, "save_steps": 1, "use_cpu": True,
        },
        compare={"num_samples": 2, "k": "1,2", "temperature": 0.8, "max_new_tokens": 8, "no_ce": True},
        rlvr={
            "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8,
            "save_steps": 1, "logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": "none",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A command, done when `done` is there; what it needs is done by the stages before it.

    Args:
        name (`str`):
            Unique in a plan; seconds are counted under it.
        words (`tuple[str, ...]`):
            What follows `python`.
        done (`Path`):
            A file that it writes last.
        output (`Path`, *optional*):
            Where it leaves checkpoints, if it goes on from them when told to.
        stop (`signal.Signals`, *optional*, defaults to `SIGINT`):
            What it is asked by to end in time.
    """

    name: str
    words: tuple[str, ...]
    done: Path
    output: Path | None = None
    stop: signal.Signals = signal.SIGINT


def options(values: Mapping[str, Any]) -> tuple[str, ...]:
    """`{"k": 1, "no_ce": True}` as `--k 1 --no_ce true`; flags of `ra3 compare` stand alone."""
    words = []
    for name, value in values.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        words += [f"--{name}"] if name == "no_ce" else [f"--{name}", text]
    return tuple(words)


def arm_folder(folder: Path, preset: Preset, arm: str, seed: int) -> str:
    """Where the checkpoint of an arm is."""
    return str(preset.model) if arm == "base" else str(folder / f"seed-{seed}" / arm)


def ra3_words(command: str, *words: str) -> tuple[str, ...]:
    return ("-m", "ra3_trl.cli.main", command, *words)


def train_stage(folder: Path, preset: Preset, arm: str, seed: int, updates: int) -> Stage:
    """Mid-training of an arm; `updates` are those of next-token prediction, or RA3's in both phases, in the preset's
    shares."""
    output = Path(arm_folder(folder, preset, arm, seed))
    e_steps = round(updates * preset.e_steps / preset.updates) if arm in OURS else 0
    proposals = preset.hindsight if arm == "hindsight" else {}
    data = {"code_dir": preset.code_dir} if preset.code_dir else {}
    data = {"dataset_name": preset.dataset} if preset.dataset else data
    settings = {
        "model_name_or_path": preset.model, **data, "output_dir": output, "seed": seed, "e_steps": e_steps,
        "m_steps": updates - e_steps, "eval_documents": preset.eval_documents, **preset.train, **proposals,
    }  # fmt: skip
    words = ra3_words("train", *options(settings))
    return Stage(f"{arm}-{seed}", words, output / TRAINED, output, signal.SIGTERM)  # on which it saves


def measure_stage(folder: Path, preset: Preset, arm: str, seed: int) -> Stage:
    """Held-out numbers of an arm."""
    done = folder / f"seed-{seed}" / f"{arm}-{MEASURES}"
    words = [arm_folder(folder, preset, arm, seed), str(done), str(seed), str(preset.eval_documents)]
    settings = {name: preset.train[name] for name in _HELD_OUT if name in preset.train}
    words += [preset.code_dir or "", json.dumps(settings)]
    return Stage(f"measure-{arm}-{seed}", ("-m", "benchmarks.gpu.measure", *words), done)


def later_stages(folder: Path, preset: Preset) -> list[Stage]:
    """Pass@k of all arms, GRPO from three of them, and pass@k after it."""
    seed = preset.seeds[0]
    places = {arm: arm_folder(folder, preset, arm, seed) for arm in ARMS}
    stages = [_compare(folder / f"compare-{Path(task).stem}", task, places, preset.compare) for task in preset.tasks]
    if preset.rlvr is None:
        return stages
    learned = {}
    for arm in ("base", "ntp", "ra3"):
        output = folder / f"rlvr-{arm}"
        learned[f"{arm}-grpo"] = str(output)
        settings = {"model_name_or_path": places[arm], "output_dir": output, "seed": seed, **preset.rlvr}
        stages.append(Stage(f"rlvr-{arm}", ra3_words("rlvr", *options(settings)), output / TRAINED, output))
    return stages + [
        _compare(folder / f"compare-{Path(task).stem}-grpo", task, learned, preset.compare) for task in preset.tasks
    ]


def _compare(output: Path, task: str, places: Mapping[str, str], settings: Mapping[str, Any]) -> Stage:
    known = {"output_dir": output, **settings}
    if task != "mbpp":
        known.pop("task_file", None)
    words = ra3_words("compare", *places.values(), "--names", *places, "--task", task, *options(known))
    return Stage(output.name, words, output / "compare.json")


def check_proposals(preset: Preset) -> None:
    """Refuses proposals that the model's tokenizer can't make, before anything is trained.

    Raises:
        `ValueError`: with the cure.
    """
    settings = {"e_steps": preset.e_steps, "num_latents": preset.train["num_latents"], **preset.hindsight}
    tokenizer = AutoTokenizer.from_pretrained(preset.model)
    make_proposals(HindsightConfig("unused", report_to="none", use_cpu=True, **settings), tokenizer, None)


def fitted(
    preset: Preset, model: str | None, code_dir: str | None, mbpp: str | None, proposal: str | None = None
) -> Preset:
    """A preset with the user's model, corpus, MBPP file and proposals."""
    changes: dict[str, Any] = {"hindsight": {"proposal": proposal}} if proposal else {}
    if mbpp:
        changes["compare"] = {**preset.compare, "task_file": mbpp}
        changes["rlvr"] = preset.rlvr and {**preset.rlvr, "task_file": mbpp}
    return replace(preset, model=model or preset.model, code_dir=code_dir or preset.code_dir, **changes)
