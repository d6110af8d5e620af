"""A corpus with latents spliced in: what the M-step learns from, as a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset, Features, Value, concatenate_datasets
from tqdm.auto import tqdm

from ..policy import Policy, annotate
from ..records import AnnotatedExample
from ..rollout import NoiseKey
from ..segmentation import (
    RowForms,
    RowReader,
    Segmenter,
    Text,
    Tokens,
    readable_bytes,
    row_to_document,
    segment_dataset,
)


ANNOTATION = Features(
    {
        "annotated_text": Value("string"),
        "latents": [{"line": Value("int32"), "text": Value("string"), "gain": Value("float32")}],
        "num_boundaries": Value("int32"),
    }
)


def annotate_dataset(
    policy: Policy, dataset: Dataset, formatting_func: Callable[[dict], str] | None = None
) -> Dataset:
    """Splices latents of the present weights into a data set; the processes share it out.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            What writes the latents.
        dataset (`datasets.Dataset`):
            Text as the trainer takes it.
        formatting_func (`Callable`, *optional*):
            Makes the text of a row.

    Returns:
        `datasets.Dataset`: the same rows and columns with `annotated_text`, `latents` and `num_boundaries` added, on
        every process. A latent has the 1-based `line` of `annotated_text` that it stands in, its `text`, and the
        `gain` of thinking there in nats where that was measured. Texts that can't be annotated (empty, not of the
        format, not given back by the tokenizer) stay as they are.

    Raises:
        `ValueError`: if the data set is empty, or has one of these columns already.
    """
    if taken := set(ANNOTATION) & set(dataset.column_names):
        raise ValueError(f"the corpus has the columns {sorted(taken)} already; rename them, or annotate the original.")
    if not len(dataset):
        raise ValueError("the corpus is empty; give it at least one row.")
    args, dataset = policy.args, dataset.with_format(None)  # texts are wanted, whatever the rows were made into
    mine = range(args.process_index, len(dataset), args.world_size)
    own = _annotate_rows(policy, dataset.select(mine), mine, formatting_func) if mine else {}
    rows = {number: row for share in gather_object([own]) for number, row in share.items()}
    added = Dataset.from_list([rows[number] for number in range(len(dataset))], features=ANNOTATION)
    return concatenate_datasets([dataset, added], axis=1)


def require_boundaries(annotated: Dataset, action_format: str) -> None:
    """
    Raises:
        `ValueError`: if [`annotate_dataset`] found no place for a latent in any text.
    """
    if not any(annotated["num_boundaries"]):
        raise ValueError(
            f"none of the {len(annotated)} texts has a boundary for `action_format` {action_format!r}: they are of "
            "another format, or empty, or the tokenizer does not give them back. Set `action_format`, or give other "
            "texts. Nothing was written."
        )


def _annotate_rows(
    policy: Policy, dataset: Dataset, numbers: Sequence[int], formatting_func: Callable[[dict], str] | None
) -> dict[int, dict[str, Any]]:
    """Makes the columns of [`annotate_dataset`] for rows that have these `numbers` in the whole data set."""
    args, segmenter = policy.args, policy.segmenter
    data = readable_bytes(policy.tokenizer, segmenter.format)
    forms = RowForms.of(args, formatting_func)
    segmented = segment_dataset(dataset, segmenter, forms=forms)
    reader = RowReader(segmenter, forms)
    texts = [_text_of(segmenter, reader(row)) for row in dataset]
    rows = {n: {"annotated_text": t, "latents": [], "num_boundaries": 0} for n, t in zip(numbers, texts, strict=True)}
    noise, chunks = NoiseKey(args.seed, 1, 0), (row_to_document(row) for row in segmented)
    quiet = args.disable_tqdm or args.process_index > 0
    with policy.inference(), tqdm(total=len(segmented), desc="Annotating", unit="chunk", disable=quiet) as progress:
        for position, documents in groupby(chunks, key=lambda document: document.doc_id):
            number, examples = numbers[position], []
            for document in documents:
                # Noise is keyed by the number, which must not depend on how processes share the rows out.
                examples.append(annotate(policy, replace(document, doc_id=number), noise))
                progress.update()
            if examples[0].document.status == "actions":
                text, latents = join_chunks(texts[position], examples, data)
                boundaries = sum(len(e.document.boundaries) for e in examples)
                rows[number] = {"annotated_text": text, "latents": latents, "num_boundaries": boundaries}
    return rows


def _text_of(segmenter: Segmenter, example: Text | Tokens) -> str:
    """The text of a row as the segmenter sees it."""
    if isinstance(example, Tokens):
        return example.text
    return example.text if segmenter.existing_comments == "keep" else segmenter.format.strip(*example)


def join_chunks(
    text: str, examples: Sequence[AnnotatedExample], data: Sequence[bytes | None]
) -> tuple[str, list[dict[str, Any]]]:
    """Joins the annotated chunks of a document, whose `text` is as the segmenter saw it, and finds the latents' lines.

    `data` holds the bytes of each token, as from `readable_bytes`.
    """
    # Chunks begin with context (BOS, a prompt, the last token before), which is not repeated: what they train on is
    # the end of the text, and what stands before it is taken from the text.
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
    drawn = iter([(latent, e.gains.get(boundary)) for e in examples for boundary, latent in sorted(e.placed.items())])
    latents: list[dict[str, Any]] = []
    for piece, is_latent in pieces:
        if is_latent:
            latent, gain = next(drawn)
            content = b"".join(data[i] or b"" for i in latent.token_ids)
            latents.append({"line": out.count(b"\n") + 1, "text": content.decode(), "gain": gain})
        out += piece
    return out.decode(), latents
