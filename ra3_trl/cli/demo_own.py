"""`ra3 demo` with a model or code of one's own: a few updates of RA3 and of next-token prediction, side by side.

It shows the mechanics, not a victory: small models mostly harm themselves with their own comments, and a few updates
change little. The numbers say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.table import Table

from .. import RA3Config, RA3MidTrainer, load_code_directory
from ..em import EStep
from ..models import load_tokenizer
from ..policy import EVAL_NOISE
from ..report import latent_rows, latent_table, plot_run
from ..report.summary import peak_memory
from ..segmentation import row_to_document, standard_library
from .data import load_splits
from .smollm2 import console, smollm2


_MODELS = ("base", "ntp", "ra3")


def _corpus(options: argparse.Namespace, train: int, held_out: int) -> tuple[Dataset, Dataset]:
    """Documents to train on and held-out ones, shuffled by the seed; the latter come from other files if they can."""
    if options.dataset_name:
        data = load_splits(options.dataset_name, None, "train")["train"].select_columns(options.dataset_text_field)
    else:
        console.print(f"Reading functions of {options.code_dir or standard_library()} ...")
        data = load_code_directory(options.code_dir, min_lines=5)
    data = data.shuffle(seed=options.seed)
    if not options.dataset_name and not options.code_dir:
        # Short ones with little else than code, so that a few minutes hold many boundaries.
        plain = [i for i, t in enumerate(data["text"]) if len(t) < 700 and '"""' not in t and "'''" not in t]
        data = data.select(plain[: 4 * (train + held_out)])
    if len(data) < 2:
        raise ValueError(f"{len(data)} document in the corpus; the demo needs 2 or more, one of them held out.")
    held_out = min(held_out, len(data) // 2)
    evaluation, rest = data.select(range(held_out)), data.select(range(held_out, len(data)))
    if "path" in data.column_names:
        files = set(evaluation["path"])
        apart = [i for i, path in enumerate(rest["path"]) if path not in files]
        rest = rest.select(apart) if apart else rest
    return rest.select(range(min(train, len(rest)))), evaluation


def run_own(options: argparse.Namespace) -> int:
    """Runs the demo on the model or the code that the options name."""
    begin, output = time.time(), Path(options.output_dir)
    e_steps, m_steps, held_out = (2, 1, 2) if options.smoke else (6, 5, 8)
    name = options.model_name_or_path or str(smollm2())
    trust = {"trust_remote_code": options.trust_remote_code}
    tokenizer = load_tokenizer(name, trust)
    data = _corpus(options, 4 * (e_steps + m_steps), held_out)
    console.print(f"{len(data[0])} documents to train on, {len(data[1])} held out. Model: {Path(name).name}")
    shared = {
        "max_length": 320, "per_device_train_batch_size": 4, "existing_comments": "strip", "num_latents": 4,
        "max_latent_length": 10, "horizon": 1, "max_boundaries": 4, "eval_max_boundaries": 4, "e_learning_rate": 1e-5,
        "learning_rate": 2e-5, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none",
        "seed": options.seed, "dataset_text_field": options.dataset_text_field if options.dataset_name else "text",
        "dataset_license": None if options.dataset_name or options.code_dir else "PSF-2.0", **trust,
    }  # fmt: skip
    # Evaluated where the E-phase ends too; the table of latents there is the card's.
    watched = {"eval_strategy": "steps", "eval_steps": e_steps, "log_latents_steps": e_steps}
    config = RA3Config(output_dir=str(output), e_steps=e_steps, m_steps=m_steps, **watched, **shared)
    ra3 = RA3MidTrainer(name, config, *data, tokenizer)
    ra3.table.following = None  # what changed is said at the end, of both
    console.rule("RA3: before")
    before = ra3.evaluate()
    console.rule(f"RA3: {e_steps} E-updates, then {m_steps} M-updates")
    ra3.train()
    log = ra3.state.log_history
    after_e = next(entry for entry in log if "eval_gain" in entry and entry["step"] == e_steps)
    final = ra3.evaluate()
    ra3.save_model()
    ra3.create_model_card(dataset_name=options.dataset_name or options.code_dir or "Python's standard library")
    documents = [row_to_document(row) for row in ra3.eval_dataset][:4]
    with ra3.policy.inference(whole=False):
        rollouts = EStep(ra3.policy, config).roll_out(documents, EVAL_NOISE)
    latents = latent_rows(ra3.state.global_step, rollouts, tokenizer)
    console.print(latent_table(latents, f"Held-out functions: the best of {len(latents)} latents"))
    rates = [entry["mstep/annotated_rate"] for entry in log if "mstep/annotated_rate" in entry]
    results = {
        "model": Path(name).name, "documents": ra3.cut.counts["train"]["documents"],
        "tokens": int(ra3.state.num_input_tokens_seen), "annotated_rate": sum(rates) / max(len(rates), 1),
        "gain_first": before["eval_gain"], "gain_last": after_e["eval_gain"], "think_rate": final["eval_think_rate"],
        "over_other_first": before.get("eval_gain_over_other"), "over_other_last": after_e.get("eval_gain_over_other"),
        "distinct_rate": after_e.get("eval_distinct_rate"),
    }  # fmt: skip
    ra3_updates = ra3.state.global_step
    del ra3, rollouts  # weights, gradients, optimizer: 2 GB that next-token prediction has use for
    gc.collect()

    console.rule(f"Next-token prediction: {e_steps + m_steps} updates on the same documents")
    config = RA3Config(output_dir=str(output / "ntp"), e_steps=0, m_steps=e_steps + m_steps, **shared)
    ntp = RA3MidTrainer(name, config, *data, tokenizer)
    ntp.table.following = None
    ntp.train()
    metrics = dict(zip(_MODELS, (before, ntp.evaluate(), final), strict=True))
    results |= {f"{key}_{model}": m[f"eval_{key}"] for key in ("ce", "elbo") for model, m in metrics.items()}
    results |= {"seconds": round(time.time() - begin, 1), "peak_mb": round(peak_memory() / 2**20)}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _tell(results, {"ra3": log, "ntp": ntp.state.log_history}, output, bland=ra3_updates <= e_steps)
    return 0


def _tell(results: dict[str, Any], logs: dict[str, list[dict]], output: Path, bland: bool) -> None:
    """Draws and prints what was measured."""
    over = ["unknown" if v is None else f"{v:+.2f}" for k, v in results.items() if k.startswith("over_other_")]
    titles = {"ce": "cross-entropy", "elbo": "negative ELBO"}
    nats = {title: {model: results[f"{key}_{model}"] for model in _MODELS} for key, title in titles.items()}
    plot_run(logs, nats, output / "curves.png")
    table = Table("", "base", "next-token", "RA3", title="Held-out, nats per code token (lower is better)")
    for title, by_model in nats.items():
        table.add_row(title, *(f"{value:.4f}" for value in by_model.values()))
    console.print(
        table,
        f"A latent brought {results['gain_first']:+.2f} nats before and {results['gain_last']:+.2f} after the E-phase "
        f"(same held-out boundaries, same noise); where the model thinks most, {over[0]} and {over[1]} more than "
        "another document's: near 0 it says nothing about its own. The model thinks at "
        f"{results['think_rate']:.2%} of boundaries by itself; {results['annotated_rate']:.1%} got a latent for "
        "the M-step.",
        "This shows the mechanics on a very small model and few updates; it is no evidence for or against the method.",
        *(["The E-phase ended bland, so RA3 has no M-phase here."] if bland else []),
        f"{results['seconds']:.0f} s, {results['peak_mb']} MB at most. Written to {output}/",
        sep="\n",
    )
