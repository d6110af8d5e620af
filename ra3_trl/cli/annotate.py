"""`ra3 annotate`: a checkpoint and a corpus in, the corpus with latents spliced in out."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..config import RA3Config
from ..em import annotate
from ..records import AnnotatedExample
from ..rollout import NoiseKey
from ..segmentation import find_format, require_tags, row_to_document, segment_dataset, token_bytes
from ..trainer import RA3MidTrainer
from .data import load_splits


_SETTINGS = (
    "annotation", "annotation_think_prob", "prior_alpha", "num_latents", "max_latent_length", "horizon", "discount",
    "temperature", "top_k", "top_p", "action_format", "existing_comments", "max_length", "dataset_text_field",
    "engine", "max_branch_tokens", "seed",
)  # fmt: skip
_FEATURES = Features(
    {
        "annotated_text": Value("string"),
        "latents": [{"line": Value("int32"), "text": Value("string")}],
        "num_boundaries": Value("int32"),
    }
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ra3 annotate",
        description="Splices latents of a checkpoint into a corpus. The result has the corpus's columns and "
        "`annotated_text`, `latents` (the 1-based `line` of `annotated_text` that each stands in, and its `text`) and "
        "`num_boundaries` (places where a latent could stand). Taking the latents out gives the text back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--dataset_name", help="Hub id, folder of save_to_disk, or json(l), parquet, csv file")
    corpus.add_argument("--dataset_config", help="configuration of the dataset")
    corpus.add_argument("--dataset_split", default="train", help="its split")
    corpus.add_argument("--code_dir", help="folder of .py files; with neither, the standard library of this Python")
    corpus.add_argument("--max_documents", type=int, help="the first so many documents only")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="folder to save the dataset to; must not be there yet")
    output.add_argument("--push_to_hub", metavar="ORG/NAME", help="dataset on the Hub to push it to")
    output.add_argument("--public", action="store_true", help="make that dataset public if it is new")
    model = parser.add_argument_group("model")
    model.add_argument("--model_revision", default="main", help="branch, tag or commit of the checkpoint")
    model.add_argument(
        "--dtype", default="float32", choices=("auto", "bfloat16", "float16", "float32"), help="of weights"
    )
    settings = parser.add_argument_group("annotation")
    hints, by_name = get_type_hints(RA3Config), {field.name: field for field in fields(RA3Config)}
    for name in _SETTINGS:
        kind = next((t for t in (int, float, str) if hints[name] in (t, t | None)), str)
        text = by_name[name].metadata["help"]
        settings.add_argument(f"--{name}", type=kind, default=by_name[name].default, help=text)
    return parser


def join_chunks(
    text: str, examples: Sequence[AnnotatedExample], data: Sequence[bytes | None]
) -> tuple[str, list[dict[str, Any]]]:
    """The annotated text of a whole document from the examples of its chunks, and its latents with their lines.

    Chunks begin with context (BOS, a prompt, the last token before), which is not repeated: what the chunks train on
    is the end of the text, and what stands before it is taken from the text.

    Args:
        text (`str`):
            The document, its comments stripped if they were for the segmenter.
        examples (`Sequence[AnnotatedExample]`):
            Its chunks in order.
        data (`Sequence[bytes | None]`):
            Bytes of each token, as from `token_bytes`.
    """
    pieces: list[tuple[bytes, bool]] = []  # joined by runs: expert's bytes, or a latent's with prefix and closure
    for example in examples:
        context = example.document.context
        tokens = zip(example.input_ids[context:], example.is_latent[context:], strict=True)
        for is_latent, run in groupby(tokens, key=lambda pair: pair[1]):
            pieces.append((b"".join(data[i] or b"" for i, _ in run), is_latent))
    original = text.encode()
    missing = len(original) - sum(len(piece) for piece, is_latent in pieces if not is_latent)
    if missing < 0:  # the dummy space that SentencePiece puts before a text
        pieces[0] = (pieces[0][0][-missing:], False)
    out = original[: max(missing, 0)]
    assert out + b"".join(piece for piece, is_latent in pieces if not is_latent) == original
    drawn = iter([z for e in examples for _, z in sorted(e.placed.items())])
    latents: list[dict[str, Any]] = []
    for piece, is_latent in pieces:
        if is_latent:
            content = b"".join(data[i] or b"" for i in next(drawn).token_ids)
            latents.append({"line": out.count(b"\n") + 1, "text": content.decode()})
        out += piece
    return out.decode(), latents


def annotate_dataset(trainer: RA3MidTrainer, dataset: Dataset) -> Dataset:
    """`dataset` with the columns `annotated_text`, `latents` and `num_boundaries` added.

    Texts that can't be annotated (empty, not of the format, not given back by the tokenizer) stay as they are.
    """
    args, data = trainer.args, list(token_bytes(trainer.processing_class))
    for tag in trainer.segmenter.format.tags:
        data[trainer.processing_class.convert_tokens_to_ids(tag)] = tag.encode()
    if taken := set(_FEATURES) & set(dataset.column_names):
        raise ValueError(f"the corpus has the columns {sorted(taken)} already; rename them, or annotate the original.")
    segmented = segment_dataset(dataset, trainer.segmenter, args.dataset_text_field)
    rows = [_unannotated(trainer, row) for row in dataset]
    trainer.model.eval()
    noise = NoiseKey(args.seed, 1, 0)
    chunks = (row_to_document(row) for row in segmented)
    with torch.no_grad(), tqdm(total=len(segmented), desc="Annotating", unit="chunk") as progress:
        for doc_id, documents in groupby(chunks, key=lambda document: document.doc_id):
            examples = []
            for document in documents:
                examples.append(annotate(trainer.engine, document, args, noise))
                progress.update()
            if examples[0].document.status != "actions":
                continue
            text, latents = join_chunks(rows[doc_id]["annotated_text"], examples, data)
            boundaries = sum(len(e.document.sites) for e in examples)
            rows[doc_id] = {"annotated_text": text, "latents": latents, "num_boundaries": boundaries}
    return concatenate_datasets([dataset, Dataset.from_list(rows, features=_FEATURES)], axis=1)


def _unannotated(trainer: RA3MidTrainer, row: dict[str, Any]) -> dict[str, Any]:
    field = trainer.args.dataset_text_field
    prompt, text = ("", row[field]) if field in row else (row["prompt"], row["completion"])
    text = prompt + text
    if trainer.args.existing_comments == "strip":
        text = trainer.segmenter.format.strip(text, len(prompt))
    return {"annotated_text": text, "latents": [], "num_boundaries": 0}


def save_aside(dataset: Dataset, output: Path) -> None:
    """Saves to a folder beside `output` and renames it: the dataset is whole or not there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.incomplete-{os.getpid()}")
    dataset.save_to_disk(str(aside))
    aside.rename(output)


def _check(options: argparse.Namespace) -> None:
    if not options.output and not options.push_to_hub:
        raise ValueError("neither `output` nor `push_to_hub` is set; say where the annotated dataset goes.")
    if options.output and Path(options.output).exists():
        raise ValueError(f"`output` is {options.output!r}, which is there already; remove it or name another folder.")
    if options.max_documents is not None and options.max_documents < 1:
        raise ValueError(f"`max_documents` is {options.max_documents}; it must be at least 1.")


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 annotate`; see `ra3 annotate --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    _check(options)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    settings = {name: vars(options)[name] for name in _SETTINGS}
    loading = {"dtype": options.dtype, "revision": options.model_revision}
    with tempfile.TemporaryDirectory() as aside:  # the trainer makes its output folder; nothing is written there
        e_steps = 1  # latents are wanted, so chunks leave room for them
        baseline = "no_think"  # one latent a boundary is enough to annotate
        args = RA3Config(
            output_dir=aside, report_to="none", e_steps=e_steps, m_steps=0, baseline=baseline,
            model_init_kwargs=loading, **settings,
        )  # fmt: skip
        splits = load_splits(options.dataset_name, options.code_dir, options.dataset_split, options.dataset_config)
        dataset = splits[options.dataset_split]
        if options.max_documents:
            dataset = dataset.select(range(min(options.max_documents, len(dataset))))
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, revision=options.model_revision)
        require_tags(tokenizer, find_format(args.action_format))  # the trainer would add them, untrained
        trainer = RA3MidTrainer(options.checkpoint, args, processing_class=tokenizer)
        annotated = annotate_dataset(trainer, dataset)
    placed, sites = sum(map(len, annotated["latents"])), sum(annotated["num_boundaries"])
    print(f"{len(annotated):,} documents, {placed:,} latents at {sites:,} boundaries.")
    if options.output:
        save_aside(annotated, Path(options.output))
        print(f"Saved to {options.output}; `datasets.load_from_disk` reads it.")
    if options.push_to_hub:
        url = annotated.push_to_hub(options.push_to_hub, private=not options.public).repo_url
        print(f"Pushed to {url}.")
    return 0
