"""`ra3 annotate`: a checkpoint and a corpus in, the corpus with latents spliced in out."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import DatasetCard

from ..config_file import read_experimental
from ..experimental.hindsight import attach
from ..files import public_name
from ..hub import (
    MANIFEST,
    Corpus,
    CorpusFacts,
    DatasetPush,
    Manifest,
    Origin,
    RowAnnotator,
    ShardedAnnotation,
    Share,
    checkpoint_hash,
    cut_into_shards,
    refuse_annotated,
    refuse_without_boundaries,
    render_dataset_card,
    rows_of_a_shard,
)
from ..policy import Annotation, Policy
from ..policy.prompted import AnnotatorError, ModelAnnotator
from .annotate_cost import estimate, tell_cost
from .annotators import ANNOTATORS, SETTINGS, check_annotator, check_format, opened_annotation, origin_of, telling
from .checkpoint import flag_settings, open_policy, saved_settings
from .data import STANDARD_LIBRARY, load_splits
from .devices import choose_device
from .early import check_output
from .estimate_annotation import annotation_cost, estimate_annotation
from .options import ANNOTATE, PROPOSALS
from .options import annotate_parser as _parser


_MACHINE = ("engine", "max_branch_tokens")  # shape no result
_SHARD = re.compile(r"(\d+)/(\d+)")


def _check(options: argparse.Namespace) -> DatasetPush | None:
    """Refuses what can't work, and says where to push to."""
    estimated = choose_device(options.device, options.devices, options.price_per_hour, options.dry_run)
    if estimated or (options.dry_run and options.annotator in ANNOTATORS):
        if options.annotator != "policy":
            raise ValueError(
                f"`annotator` is {options.annotator!r}, and `dry_run` estimates the policy's own latents; leave one "
                "out."
            )
        return None
    check_output(options)
    check_annotator(options)
    if options.tokens and options.push_to_hub:
        raise ValueError("`tokens` and `push_to_hub` are both set; tokens serve one checkpoint: push the text.")
    share = _share(options.shard)
    if not options.output_dir and share.count > 1 and not options.dry_run:
        raise ValueError("`output_dir` is not set; several processes or jobs need a folder that they share.")
    if not options.push_to_hub or options.dry_run:
        return None
    names = ("license_column", "dataset_license", "allow_missing_licenses", "allow_secrets")
    how = {name: vars(options)[name] for name in names}
    return DatasetPush(options.push_to_hub, private=options.private or None, **how)


def _share(shard: str | None) -> Share:
    """What this process does: of the job that `--shard` says, the part that `accelerate launch` or torchrun says."""
    match = _SHARD.fullmatch(shard or "0/1")
    job, jobs = map(int, match.groups()) if match else (0, 0)
    if job >= jobs:
        raise ValueError(f"`shard` is {shard!r}; write I/N with I from 0 to N - 1, such as 0/8.")
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return Share(job * processes + rank, jobs * processes, processes)


def _read_corpus(options: argparse.Namespace) -> Corpus:
    splits = load_splits(
        options.dataset_name, options.code_dir, options.dataset_split, options.dataset_config, options.streaming
    )
    corpus: Corpus = splits[options.dataset_split]
    if not isinstance(corpus, Dataset):
        corpus = corpus.take(options.max_documents) if options.max_documents else corpus
    elif options.max_documents:
        corpus = corpus.select(range(min(options.max_documents, len(corpus))))
    refuse_annotated(corpus.column_names or ())
    return corpus.with_format(None)


def _check_rows(push: DatasetPush, corpus: Corpus, share: Share, shard_rows: int) -> None:
    """Refuses rows that may not be published before the work on any; those of a stream are checked as they come."""
    if isinstance(corpus, Dataset):
        numbers = [number for number in range(len(corpus)) if share.has(number // shard_rows)]
        push.check(corpus.select(numbers), numbers)


def _manifest(
    options: argparse.Namespace, policy: Policy, annotation: Annotation | None, corpus: Corpus, folder: Path
) -> Manifest:
    """Opens the manifest of a folder, new or of the same corpus, checkpoint and settings."""
    rows = len(corpus) if isinstance(corpus, Dataset) else None
    settings = {n: getattr(policy.args, n) for n in ANNOTATE if n not in _MACHINE} | policy.proposer.settings
    settings |= {n: vars(options)[n] for n in ("dtype", "dataset_config", "dataset_split")}
    settings |= origin_of(options, policy, annotation)
    if options.push_to_hub:  # a column is added
        settings |= {n: vars(options)[n] for n in ("license_column", "dataset_license")}
    source = public_name(options.dataset_name or options.code_dir or STANDARD_LIBRARY)
    form = "tokens" if options.tokens else "text"
    name = public_name(options.checkpoint)
    shard_rows = options.shard_rows or rows_of_a_shard(rows)
    return Manifest(folder, Origin(settings, name, checkpoint_hash(policy), source, rows, shard_rows, form))


def _open(options: argparse.Namespace, saved: dict[str, Any]) -> Policy:
    # The gate is asked for by name, so that it is refused where there is no head for the format, and not replaced.
    flags = {"gate": saved.get("gate", "token")} | (SETTINGS if options.annotator != "policy" else {})
    flags |= flag_settings(options, ANNOTATE)
    # Without an accelerator the processes that a launcher started know of each other only so.
    use_cpu = options.use_cpu or not torch.accelerator.is_available()
    policy = open_policy(options, flags | {"use_cpu": use_cpu})
    check_format(options, policy.args.action_format)
    trained = read_experimental(options.checkpoint, revision=options.model_revision)
    return attach(policy, trained, **flag_settings(options, PROPOSALS))


def _annotate(
    options: argparse.Namespace, corpus: Corpus, policy: Policy, folder: Path, push: DatasetPush | None
) -> None:
    """Annotates this process's share into `folder`, pushes it and says how far the whole has come."""
    refuse_without_boundaries(RowAnnotator(policy), corpus)
    share, source = _share(options.shard), options.dataset_name or options.code_dir or STANDARD_LIBRARY

    def card(facts: CorpusFacts, full_name: str) -> DatasetCard:
        licence = push and push.dataset_license
        return render_dataset_card(policy, facts, full_name, options.checkpoint, source, licence)

    with opened_annotation(options, policy) as annotation:
        manifest = _manifest(options, policy, annotation, corpus, folder)
        annotator = RowAnnotator(policy, annotation=annotation)
        work = ShardedAnnotation(
            annotator, corpus, manifest, share, push, card, skip_broken_rows=options.skip_broken_rows
        )
        with telling(annotation, options.report):
            try:
                url = work.run()
            except AnnotatorError as error:
                kept = f"{len(manifest.finished())} files are finished and kept; run the same command again."
                raise AnnotatorError(f"{error} {kept}") from error
    entries = manifest.finished().values()
    latents, boundaries = sum(e.latents for e in entries), sum(e.boundaries for e in entries)
    documents = sum(e.rows_out for e in entries)
    if share.index % share.processes == 0:
        print(f"{documents:,} documents, {latents:,} latents at {boundaries:,} boundaries in {len(entries):,} files.")
        if options.output_dir:
            print(f"Saved to {options.output_dir}; `datasets.load_dataset` reads it.")
    if url:
        print(f"Pushed to {url}.")


def _dry_run(options: argparse.Namespace, policy: Policy, corpus: Corpus) -> None:
    """Prints what the annotation would take; nothing is asked or written."""
    if options.annotator != "policy":
        _tell_requests(options, policy, corpus)
        return
    refuse_without_boundaries(RowAnnotator(policy), corpus)
    print("Timing the annotation of a few rows ...", file=sys.stderr)
    estimated = estimate_annotation(policy, corpus, _share(options.shard).count)
    print(estimated.render())
    asked = choose_device(options.device, options.devices, options.price_per_hour, True)
    if asked is not None:
        print(annotation_cost(policy, estimated, *asked).render())


def _tell_requests(options: argparse.Namespace, policy: Policy, corpus: Corpus) -> None:
    """Prints what a language model would be asked; of a folder that was begun what is left."""
    folder, rows = Path(options.output_dir or ""), len(corpus) if isinstance(corpus, Dataset) else None
    with opened_annotation(options, policy) as annotation:
        begun = bool(options.output_dir) and (folder / MANIFEST).is_file()
        done = _manifest(options, policy, annotation, corpus, folder).finished() if begun else {}
        shards = cut_into_shards(corpus, options.shard_rows or rows_of_a_shard(rows), _share(options.shard).has)
        left = (shard.rows for number, shard in shards if shard is not None and number not in done)
        assert annotation is not None and isinstance(annotation.annotator, ModelAnnotator)
        tell_cost(estimate(RowAnnotator(policy), annotation.annotator, left), annotation.annotator, options)


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 annotate`; see `ra3 annotate --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    push = _check(options)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    saved = saved_settings(options)  # first, since it says best that there is no such checkpoint
    corpus = _read_corpus(options)
    if push:
        rows = len(corpus) if isinstance(corpus, Dataset) else None
        _check_rows(push, corpus, _share(options.shard), options.shard_rows or rows_of_a_shard(rows))
    policy = _open(options, saved)
    if options.dry_run:
        _dry_run(options, policy, corpus)
    elif options.output_dir:
        _annotate(options, corpus, policy, Path(options.output_dir), push)
    else:
        with TemporaryDirectory() as folder:
            _annotate(options, corpus, policy, Path(folder), push)
    return 0


if __name__ == "__main__":
    from .main import guarded

    raise SystemExit(guarded(main, sys.argv[1:]))
