"""`ra3 annotate`: a checkpoint and a corpus in, the corpus with latents spliced in out."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from huggingface_hub import DatasetCard

from ..config_file import read_experimental
from ..experimental.hindsight import attach
from ..files import renamed_into_place
from ..hub import ANNOTATION, DatasetPush, annotate_dataset, render_dataset_card, require_boundaries
from .checkpoint import flag_settings, open_policy, saved_settings
from .data import STANDARD_LIBRARY, load_splits
from .options import ANNOTATE, PROPOSALS
from .options import annotate_parser as _parser


def _check(options: argparse.Namespace) -> DatasetPush | None:
    """Refuses what can't work, and says where to push to."""
    if not options.output_dir and not options.push_to_hub:
        raise ValueError("neither `output_dir` nor `push_to_hub` is set; say where the annotated dataset goes.")
    if options.output_dir and Path(options.output_dir).exists():
        raise ValueError(
            f"`output_dir` is {options.output_dir!r}, which is there already; remove it or name another folder."
        )
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
    policy = open_policy(options, {"gate": saved.get("gate", "token")} | flag_settings(options, ANNOTATE))
    trained = read_experimental(options.checkpoint, revision=options.model_revision)
    policy = attach(policy, trained, **flag_settings(options, PROPOSALS))
    annotated = annotate_dataset(policy, dataset)
    require_boundaries(annotated, policy.args.action_format)
    placed, boundaries = sum(map(len, annotated["latents"])), sum(annotated["num_boundaries"])
    print(f"{len(annotated):,} documents, {placed:,} latents at {boundaries:,} boundaries.")
    if options.output_dir:
        with renamed_into_place(options.output_dir) as aside:
            annotated.save_to_disk(str(aside))
        print(f"Saved to {options.output_dir}; `datasets.load_from_disk` reads it.")
    if push:
        push.check_secrets(annotated.select_columns(list(ANNOTATION)))
        source = options.dataset_name or options.code_dir or STANDARD_LIBRARY

        def card(full_name: str) -> DatasetCard:
            return render_dataset_card(policy, annotated, full_name, options.checkpoint, source, push.dataset_license)

        print(f"Pushed to {push.upload(annotated, card).repo_url}.")
    return 0
