"""`ra3 annotate`: a checkpoint and a corpus in, the corpus with latents spliced in out."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from huggingface_hub import DatasetCard

from ..config_file import read_experimental
from ..experimental.hindsight import HindsightConfig, attach
from ..files import renamed_into_place
from ..hub import ANNOTATION, DatasetPush, annotate_dataset, render_dataset_card, require_boundaries
from ..policy import THINKING
from .checkpoint import add_model_options, add_settings, add_trust, flag_settings, open_policy, saved_settings
from .data import STANDARD_LIBRARY, load_splits


_PROPOSALS = ("proposal", "proposal_lines", "proposal_template", "proposal_kl_coef")
_SETTINGS = (
    "annotation", "prior_alpha", "exploration", "penalty", "num_latents", "max_latent_length", "horizon", "discount",
    "temperature", "top_k", "top_p", "action_format", "existing_comments", "max_length", "gate",
    "boundary_selection", "boundary_budget", "annotation_skip", "dataset_text_field", "engine", "max_branch_tokens",
    "seed",
)  # fmt: skip


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
    # Not the checkpoint's: a licence is not handed on from what it was trained on.
    output.add_argument("--dataset_license", help="licence of the rows that name none")
    output.add_argument("--allow_missing_licenses", action="store_true", help="push rows without a licence too")
    output.add_argument("--allow_secrets", action="store_true", help="push what looks like passwords and keys too")
    add_model_options(parser)
    add_trust(parser)
    add_settings(parser, "annotation", (*_SETTINGS, *_PROPOSALS), (*THINKING, *_PROPOSALS), HindsightConfig)
    return parser


def _check(options: argparse.Namespace) -> DatasetPush | None:
    """Refuses what can't work, and says where to push to."""
    if not options.output and not options.push_to_hub:
        raise ValueError("neither `output` nor `push_to_hub` is set; say where the annotated dataset goes.")
    if options.output and Path(options.output).exists():
        raise ValueError(f"`output` is {options.output!r}, which is there already; remove it or name another folder.")
    if options.max_documents is not None and options.max_documents < 1:
        raise ValueError(f"`max_documents` is {options.max_documents}; it must be at least 1.")
    if not options.push_to_hub:
        return None
    names = ("license_column", "dataset_license", "allow_missing_licenses", "allow_secrets")
    how = {name: vars(options)[name] for name in names}
    return DatasetPush(options.push_to_hub, private=options.private or None, **how)


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 annotate`; see `ra3 annotate --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    push = _check(options)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    saved = saved_settings(options)  # first, since it says best that there is no such checkpoint
    splits = load_splits(options.dataset_name, options.code_dir, options.dataset_split, options.dataset_config)
    dataset = splits[options.dataset_split]
    if options.max_documents:
        dataset = dataset.select(range(min(options.max_documents, len(dataset))))
    dataset = push.check(dataset) if push else dataset  # before the work
    # The gate is asked for by name, so that it is refused where there is no head for the format, and not replaced.
    policy = open_policy(options, {"gate": saved.get("gate", "token")} | flag_settings(options, _SETTINGS))
    trained = read_experimental(options.checkpoint, revision=options.model_revision)
    policy = attach(policy, trained, **flag_settings(options, _PROPOSALS))
    annotated = annotate_dataset(policy, dataset)
    require_boundaries(annotated, policy.args.action_format)
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
            return render_dataset_card(policy, annotated, full_name, options.checkpoint, source, push.dataset_license)

        print(f"Pushed to {push.upload(annotated, card).repo_url}.")
    return 0
