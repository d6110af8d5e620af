"""What the abstraction head is for, each against its absence: rollouts, gate, annotation, decoding; and what not to
think costs.

All on the testbed of `benchmarks/gate_testbed.py`, whose expert lines are a guess without a comment and a copy with a
right one, so that the reward and the share of right comments are known. Numbers are counts and rates; the seconds of
decoding alone depend on the machine, and are a ratio of two sides taken in turn.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from functools import partial
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.generation import AutoModelForCausalLMWithAbstractionHead
from ra3_trl.losses import compute_returns
from ra3_trl.policy import annotate
from ra3_trl.rollout import NoiseKey
from ra3_trl.segmentation import load_code_directory, row_to_document, standard_library

from .common import default_model, no_warnings, say
from .gate_testbed import expert, make_tokenizer, pretrain, probe


_UPDATES, _LATENTS, _BOUNDARIES = 44, 4, 24  # boundaries of a program of eight stanzas
ARMS = {
    "all": {"boundary_selection": "random"},
    "random_half": {"boundary_selection": "random", "max_boundaries": _BOUNDARIES // 2},
    "head_half": {"boundary_selection": "head", "boundary_budget": 0.5},
    "head_third": {"boundary_selection": "head", "boundary_budget": 1 / 3},
}
SKIPS = (0.05, 0.1, 0.2)  # values of `annotation_skip`
_RIGHT = 0.7  # share of right comments whose price in rollouts is told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="pre-trained models, each with its own data")
    parser.add_argument("--updates", type=int, default=_UPDATES, help="E-updates of each run")
    parser.add_argument("--real", type=int, default=0, help="E-updates of SmolLM2-135M on real functions, 20 s each")


def make_trainer(model, tokenizer: PreTrainedTokenizerFast, seed: int, folder: str, **settings) -> RA3MidTrainer:
    """A trainer on the testbed, with the rates of `tests/test_gate_hold.py`."""
    settings = {"e_steps": _UPDATES, "m_steps": 0, "logging_steps": 1000} | settings
    args = RA3Config(
        output_dir=folder, seed=seed, e_learning_rate=1e-3, learning_rate=1e-3, num_latents=_LATENTS, horizon=1,
        max_latent_length=2, max_length=128, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        save_strategy="no", log_latents_steps=0, disable_tqdm=True, code_loss_tolerance=10.0,
        **settings,
    )  # fmt: skip
    trainer = RA3MidTrainer(copy.deepcopy(model), args, expert(seed + 100, 400), expert(seed + 900, 16), tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Curve(TrainerCallback):
    """The held-out share of right comments and their gain, every four updates, and the rollouts spent so far, as the
    log counts them."""

    def __init__(self, trainer: RA3MidTrainer):
        self.points: list[tuple[int, float, float]] = []
        self.trainer = trainer
        self.rollouts = 0

    def on_log(self, args, state, control, logs, **kwargs):
        if "estep/tried_rate" not in logs:
            return
        boundaries = args.per_device_train_batch_size * _BOUNDARIES
        self.rollouts += round(logs["estep/tried_rate"] * boundaries) * args.num_latents
        if state.global_step % 4 == 0:
            found = probe(self.trainer)
            self.points.append((self.rollouts, found.right, found.gain))

    def price(self, right: float) -> int | None:
        """Rollouts until the share of right comments was reached."""
        return next((rollouts for rollouts, share, _ in self.points if share >= right), None)


@torch.no_grad()
def objective(trainer: RA3MidTrainer) -> dict[str, float]:
    """J per boundary on the held-out programs, nats; P(think) before assertions and before the other lines."""
    total, hard, easy = [], [], []
    for row in trainer.eval_dataset:
        document = row_to_document(row)
        group = trainer.policy.engine.rollout(
            document, document.boundaries, _LATENTS, 1, NoiseKey(seed=7, phase=0, step=0)
        )
        group = trainer.policy.decide(group)
        returns = compute_returns(group, 1, 1.0)
        p = group.decision_logps_A[list(document.boundaries)].exp()
        total += ((1 - p) * returns.act_T + p * (returns.latent_TG.mean(1) - trainer.args.penalty)).tolist()
        for boundary, prob in zip(document.boundaries, p.tolist(), strict=True):
            action = document.actions[boundary]
            text = trainer.processing_class.decode(document.input_ids[action.start : action.end])
            (hard if text.startswith("assert") else easy).append(prob)
    return {"objective": fmean(total), "think_hard": fmean(hard), "think_easy": fmean(easy)}


def selection(bases, tokenizer, updates: int) -> dict[str, Any]:
    """Rollouts that buy the reward: everywhere, at random, where the head says."""
    found: dict[str, Any] = {}
    prices = {arm: [] for arm in ARMS}
    for arm, settings in ARMS.items():
        finals = []
        for seed, base in enumerate(bases):
            with TemporaryDirectory() as folder:
                trainer = make_trainer(base, tokenizer, seed, folder, e_steps=updates, logging_steps=1, **settings)
                curve = Curve(trainer)
                trainer.add_callback(curve)
                trainer.train()
            prices[arm].append(curve.price(_RIGHT))
            finals.append(curve.points[-1])
            say(f"{arm} seed {seed}: {prices[arm][-1]} rollouts to {_RIGHT}, at the end {finals[-1]}")
        found[f"{arm}_rollouts"] = finals[0][0]
        found[f"{arm}_right"] = [round(point[1], 3) for point in finals]
        found[f"{arm}_gain"] = [round(point[2], 3) for point in finals]
        found[f"{arm}_rollouts_to_{_RIGHT}"] = prices[arm]
    return found


def gates(bases, tokenizer, updates: int) -> dict[str, Any]:
    """The head's gate against the tokens': the objective on held-out programs, and where they think."""
    found: dict[str, Any] = {}
    for gate in ("token", "head"):
        rows = []
        for seed, base in enumerate(bases):
            with TemporaryDirectory() as folder:
                trainer = make_trainer(base, tokenizer, seed, folder, e_steps=updates, gate=gate)
                trainer.train()
                rows.append(objective(trainer))
            say(f"gate {gate} seed {seed}: {rows[-1]}")
        found |= {f"gate_{gate}_{name}": [round(row[name], 3) for row in rows] for name in rows[0]}
    return found


def annotation(bases, tokenizer, updates: int) -> dict[str, Any]:
    """Rollouts that annotation does without, and latents that it then misses."""
    tried, placed = Counter(), Counter()
    for seed, base in enumerate(bases):
        with TemporaryDirectory() as folder:
            trainer = make_trainer(base, tokenizer, seed, folder, e_steps=updates, boundary_selection="head")
            trainer.train()
            trainer.loop.learner.begin_phase()
            for row in trainer.eval_dataset:
                document, noise = row_to_document(row), NoiseKey(seed=3, phase=1, step=0)
                for skip in (0.0, *SKIPS):
                    trainer.args.annotation_skip = skip
                    example = annotate(trainer.policy, document, noise)
                    tried[skip] += len(example.gains)
                    placed[skip] += len(example.placed)
    found = {f"annotation_skip_{skip}_boundaries_tried": tried[skip] / tried[0.0] for skip in SKIPS}
    return found | {f"annotation_skip_{skip}_latents_kept": placed[skip] / placed[0.0] for skip in SKIPS}


def knob(bases, tokenizer, updates: int) -> dict[str, Any]:
    """Assertions that a model states right after the E-phase under each setting, and what the gate costs in decoding.

    Not after an M-phase, in which this model learns in a few updates to copy the value with no comment between.
    """
    right = {think: [] for think in ("always", "auto", "never", "plain")}
    for seed, base in enumerate(bases):
        with TemporaryDirectory() as folder:
            trainer = make_trainer(base, tokenizer, seed, folder, e_steps=updates, gate="head")
            trainer.train()
            trainer.save_model()
            model = AutoModelForCausalLMWithAbstractionHead.from_pretrained(folder, tokenizer=tokenizer).eval()
        for think, shares in right.items():
            shares.append(right_assertions(model, tokenizer, seed, think))
        say(f"knob seed {seed}: {[(think, round(shares[-1], 3)) for think, shares in right.items()]}")
    say("decoding with SmolLM2-135M")
    folder = default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLMWithAbstractionHead.from_pretrained(folder, dtype=torch.float32, tokenizer=tokenizer)
    model.abstraction_head.trained_on(1)  # a fresh one would leave it to the tokens
    return {f"right_{think}": [round(s, 3) for s in shares] for think, shares in right.items()} | {
        "auto_vs_plain_seconds_per_token": gate_overhead(model.eval(), tokenizer)
    }


@torch.no_grad()
def right_assertions(model, tokenizer, seed: int, think: str) -> float:
    """Share of held-out stanzas whose third line the model writes as the expert did, by greedy decoding."""
    prompts, answers = [], []
    for row in expert(seed + 900, 64):
        lines = row["text"].splitlines()
        prompts.append("\n".join(lines[:-1]) + "\n")
        answers.append(lines[-1])
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    if think == "plain":
        out = model.pretrained_model.generate(**inputs, **options)
    else:
        out = model.generate(**inputs, think=think, **options)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    firsts = [next((line for line in text.split("\n") if line and not line.startswith("#")), "") for text in texts]
    return fmean(first == answer for first, answer in zip(firsts, answers, strict=True))


@torch.no_grad()
def gate_overhead(model, tokenizer, rounds: int = 3) -> float:
    """Seconds per token of `generate(think="auto")` over those of the language model alone, sides in turn.

    A threshold of 1 keeps the gate shut, so that both sides write as many tokens of code.
    """
    inputs = tokenizer(["def mean(values):\n", "class Stack:\n"] * 2, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 96, "min_new_tokens": 96, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    seconds = {"plain": [], "auto": []}
    for _ in range(rounds):
        for side, call in (
            ("plain", model.pretrained_model.generate),
            ("auto", partial(model.generate, think="auto", threshold=1.0)),
        ):
            begin = time.perf_counter()
            call(**inputs, **options)
            seconds[side].append(time.perf_counter() - begin)
    return min(seconds["auto"]) / min(seconds["plain"])


def real_code(updates: int) -> dict[str, Any]:
    """SmolLM2-135M on functions of the standard library: what the head knows after a short E-phase, what annotation
    then does without, and the price of banning latents."""
    data = load_code_directory(standard_library()).shuffle(seed=0).filter(lambda row: 200 < len(row["text"]) < 1200)
    with TemporaryDirectory() as folder:
        args = RA3Config(
            output_dir=folder, e_steps=updates, m_steps=0, horizon=1, max_latent_length=10, max_length=400,
            per_device_train_batch_size=4, existing_comments="strip", use_cpu=True, report_to=[], log_latents_steps=0,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        train, held_out = data.select(range(4 * updates)), data.select(range(4 * updates, 4 * updates + 12))
        trainer = RA3MidTrainer(str(default_model()), args, train, held_out)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "head/gain_error" in entry][-4:]
        found = {f"real_{n}": fmean(e[f"head/{n}"] for e in log) for n in ("gain_error", "gain_spread")}
        metrics = trainer.evaluate()
        found |= {f"real_{n}": metrics[f"eval_{n}"] for n in ("ce", "ce_never", "ce_policy", "think_rate", "gain")}
        args = trainer.args
        args.boundary_selection = "head"
        trainer.loop.learner.begin_phase()
        tried, placed = Counter(), Counter()
        for row in trainer.eval_dataset:
            document, noise = row_to_document(row), NoiseKey(seed=3, phase=1, step=0)
            for args.annotation_skip in (0.0, *SKIPS):
                example = annotate(trainer.policy, document, noise)
                tried[args.annotation_skip] += len(example.gains)
                placed[args.annotation_skip] += len(example.placed)
    found |= {f"real_annotation_skip_{skip}_boundaries_tried": tried[skip] / tried[0.0] for skip in SKIPS}
    return found | {f"real_annotation_skip_{skip}_latents_kept": placed[skip] / placed[0.0] for skip in SKIPS}


@no_warnings()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, for each seed."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    say(f"pre-training {args.seeds} models")
    bases = [pretrain(tokenizer, seed) for seed in range(args.seeds)]
    found: dict[str, Any] = {"seeds": args.seeds, "updates": args.updates}
    for part in (selection, gates, annotation, knob):
        say(part.__doc__.split("\n")[0])
        found |= part(bases, tokenizer, args.updates)
    if args.real:
        say(real_code.__doc__.split("\n")[0])
        found |= real_code(args.real)
    return found
