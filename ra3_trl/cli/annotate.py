"""`ra3 annotate`: a checkpoint and a corpus in, the corpus with latents spliced in out."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from huggingface_hub import DatasetCard

from ..config_file import read_settings
from ..files import renamed_into_place
from ..hub import ANNOTATION, DatasetPush, annotate_dataset, render_dataset_card, require_boundaries
from ..models import load_tokenizer
from ..segmentation import find_format, require_tags
from ..trainer import RA3MidTrainer
from .checkpoint import add_model_options, add_settings, make_config
from .data import STANDARD_LIBRARY, load_splits


_OF_THE_CHECKPOINT = (
    "annotation", "annotation_think_prob", "prior_alpha", "num_latents", "max_latent_length", "horizon", "discount",
    "temperature", "top_k", "top_p", "action_format", "existing_comments", "max_length", "gate", "boundary_selection",
    "boundary_budget", "annotation_skip", "proposal", "proposal_lines", "proposal_template",
    "proposal_kl_coef",
)  # fmt: skip
# Of this corpus and this machine: a licence above all is not handed on from what the checkpoint was trained on.
_SETTINGS = (*_OF_THE_CHECKPOINT, "dataset_text_field", "engine", "max_branch_tokens", "seed", "dataset_license")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ra3 annotate",
        description="Splices latents of a checkpoint into a corpus. The result has the corpus's columns and "
        "`annotated_text`, `latents` (the 1-based `line` of `annotated_text` that each stands in, its `text`, and the "
        "`gain` of thinking there in nats, where it was measured) and `num_boundaries` (places where a latent could "
        "stand). Taking the latents out gives the text back.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--dataset_name", help="Hub id, folder of save_to_disk, or json(l), parquet, csv file")
    corpus.add_argument("--dataset_config", help="configuration of the dataset")
    corpus.add_argument("--dataset_split", default="train", help="its split (default: %(default)s)")
    corpus.add_argument("--code_dir", help="folder of .py files; with neither, the standard library of this Python")
    corpus.add_argument("--max_documents", type=int, help="the first so many documents only")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="folder to save the dataset to; must not be there yet")
    output.add_argument("--push_to_hub", metavar="ORG/NAME", help="dataset on the Hub to push it to, with a card")
    output.add_argument("--private", action="store_true", help="make that dataset private if it is new")
    output.add_argument(
        "--license_column", default="license", help="column that names each row's licence (default: %(default)s)"
    )
    output.add_argument("--allow_missing_licenses", action="store_true", help="push rows without a licence too")
    output.add_argument("--allow_secrets", action="store_true", help="push what looks like passwords and keys too")
    add_model_options(parser)
    add_settings(parser, "annotation", _SETTINGS, _OF_THE_CHECKPOINT)
    return parser


def _check(options: argparse.Namespace) -> None:
    if not options.output and not options.push_to_hub:
        raise ValueError("neither `output` nor `push_to_hub` is set; say where the annotated dataset goes.")
    if options.output and Path(options.output).exists():
        raise ValueError(f"`output` is {options.output!r}, which is there already; remove it or name another folder.")
    if options.max_documents is not None and options.max_documents < 1:
        raise ValueError(f"`max_documents` is {options.max_documents}; it must be at least 1.")


def _push(options: argparse.Namespace) -> DatasetPush | None:
    if not options.push_to_hub:
        return None
    return DatasetPush(
        options.push_to_hub,
        options.license_column,
        options.dataset_license,
        private=options.private or None,
        allow_missing_licenses=options.allow_missing_licenses,
        allow_secrets=options.allow_secrets,
    )


def _check_head(trainer: RA3MidTrainer, checkpoint: str) -> None:
    args = trainer.args
    if args.gate == "head" and not trainer.learner.head.config.trained_on:
        raise ValueError(
            f"`gate` is 'head', but {checkpoint!r} has no trained abstraction head for {args.action_format!r}; set "
            "`gate` to 'token'."
        )


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 annotate`; see `ra3 annotate --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    _check(options)
    push = _push(options)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    name, place = options.checkpoint, {"revision": options.model_revision}
    tokenizer = load_tokenizer(name, place)  # first, since it says best that there is no such checkpoint
    with tempfile.TemporaryDirectory() as aside:  # the trainer makes its output folder; nothing is written there
        saved = read_settings(name, **place) or {}
        args = make_config(options, saved, _SETTINGS, _OF_THE_CHECKPOINT, aside)
        splits = load_splits(options.dataset_name, options.code_dir, options.dataset_split, options.dataset_config)
        dataset = splits[options.dataset_split]
        if options.max_documents:
            dataset = dataset.select(range(min(options.max_documents, len(dataset))))
        dataset = push.check(dataset) if push else dataset  # before the work
        require_tags(tokenizer, find_format(args.action_format))  # the trainer would add them, untrained
        trainer = RA3MidTrainer(name, args, processing_class=tokenizer)
        _check_head(trainer, name)
        annotated = annotate_dataset(trainer, dataset)
    require_boundaries(annotated, args.action_format)
    placed, boundaries = sum(map(len, annotated["latents"])), sum(annotated["num_boundaries"])
    print(f"{len(annotated):,} documents, {placed:,} latents at {boundaries:,} boundaries.")
    if options.output:
        with renamed_into_place(options.output) as aside:
            annotated.save_to_disk(str(aside))
        print(f"Saved to {options.output}; `datasets.load_from_disk` reads it.")
    if push:
        push.check_secrets(annotated.select_columns(list(ANNOTATION)))
        source = options.dataset_name or options.code_dir or STANDARD_LIBRARY

        def card(full_name: str) -> DatasetCard:
            return render_dataset_card(trainer, annotated, full_name, name, source, push.dataset_license)

        print(f"Pushed to {push.upload(annotated, card).repo_url}.")
    return 0
