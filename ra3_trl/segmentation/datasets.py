"""Data sets of expert text -> data sets of document chunks, and back to `Document`s."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, IterableDataset, Sequence, Value

from ..records import Action, Boundary, Document
from .documents import Segmenter


_IDS = Sequence(Value("int32"))
FEATURES = Features(
    {"doc_id": Value("int64"), "chunk": Value("int32"), "status": Value("string"), "context": Value("int32")}
    | dict.fromkeys(("input_ids", "index", "start", "end"), _IDS)
    | {"comment": Sequence(Value("bool")), "think": Sequence(_IDS), "close": Sequence(_IDS)}
)
_SUPPORTED = (
    "a text column (`dataset_text_field`), the two text columns 'prompt' and 'completion', or any columns with a "
    "`formatting_func` that returns a string"
)


def document_to_row(document: Document) -> dict[str, Any]:
    """Makes a `Document` one row of a `datasets.Dataset`; [`row_to_document`] reads it back."""
    boundaries = [a.boundary or Boundary((), ()) for a in document.actions]
    return {
        "doc_id": document.doc_id,
        "chunk": document.chunk,
        "status": document.status,
        "context": document.context,
        "input_ids": list(document.input_ids),
        "index": [a.index for a in document.actions],
        "start": [a.start for a in document.actions],
        "end": [a.end for a in document.actions],
        "comment": [a.comment for a in document.actions],
        "think": [list(b.think) for b in boundaries],
        "close": [list(b.close) for b in boundaries],
    }


def row_to_document(row: dict[str, Any]) -> Document:
    """Reads what [`document_to_row`] has written."""
    columns = zip(*(row[name] for name in ("index", "start", "end", "comment", "think", "close")), strict=True)
    actions = tuple(
        Action(index, start, end, Boundary(tuple(think), tuple(close)) if think else None, comment)
        for index, start, end, comment, think, close in columns
    )
    ids = tuple(row["input_ids"])
    return Document(row["doc_id"], row["chunk"], ids, actions, row["context"], row["status"])


def row_text(example: dict[str, Any], text_field: str, formatting_func: Callable | None) -> tuple[str, int]:
    """Finds the text of an example and the number of its characters that are a prompt.

    Raises:
        `ValueError`: for columns that no text is made of.
    """
    if formatting_func is not None:
        text, prompt = formatting_func(example), ""
    elif text_field in example:
        text, prompt = example[text_field], ""
    elif "prompt" in example and "completion" in example:
        prompt, text = example["prompt"], example["completion"]
    else:
        raise ValueError(
            f"`dataset_text_field` is {text_field!r}, and the data has the columns {sorted(example)}; what can be "
            f"read is {_SUPPORTED}."
        )
    for column in (prompt, text):
        if not isinstance(column, str):
            raise ValueError(
                f"`train_dataset` with the columns {sorted(example)} holds {type(column).__name__} and not text (is "
                f"it conversational?); RA3MidTrainer reads {_SUPPORTED}."
            )
    return prompt + text, len(prompt)


def content_id(text: str) -> int:
    """Numbers a document in a stream by 63 bits of its content: the same in whichever shard or pass it comes."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def segment_dataset(
    dataset: Dataset | IterableDataset,
    segmenter: Segmenter,
    text_field: str = "text",
    formatting_func: Callable[[dict], str] | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Cuts every row into document chunks: its text column, its `prompt` and `completion`, or what `formatting_func`
    makes of it. `num_proc` processes share a data set's rows; a stream is cut as it is read.

    Raises:
        `ValueError`: for an empty data set, or a form that is not supported, naming the columns found.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("`train_dataset` (or `eval_dataset`) is empty; give it at least one row.")
    row_text(first, text_field, formatting_func)

    def cut(batch: dict[str, list], indices: list[int] | None = None) -> dict[str, list]:
        out: dict[str, list] = {name: [] for name in FEATURES}
        for position in range(len(next(iter(batch.values())))):
            example = {name: column[position] for name, column in batch.items()}
            text, prompt_chars = row_text(example, text_field, formatting_func)
            doc_id = content_id(text) if indices is None else indices[position]
            for document in segmenter(doc_id, text, prompt_chars):
                for name, value in document_to_row(document).items():
                    out[name].append(value)
        return out

    columns: dict[str, Any] = {"batched": True, "features": FEATURES, "remove_columns": list(first)}
    if not isinstance(dataset, Dataset):
        return dataset.map(cut, batch_size=8, **columns)  # little is read ahead
    options = {"num_proc": num_proc, "load_from_cache_file": False, "desc": "Cutting text into actions"}
    return dataset.map(cut, with_indices=True, batch_size=64, **options, **columns)


def count_documents(rows: Dataset, segmented: Dataset) -> dict[str, int]:
    """Counts where every text went: `documents = with_actions + no_boundary + plain + lossy + empty`; and chunks,
    boundaries, tokens.

    `plain` (does not tokenize as this format), `lossy` (the tokenizer does not give the text back) and `no_boundary`
    (a line only, say) get plain next-token training; `empty` texts have nothing to train.
    """
    per_document: dict[int, str] = {}
    totals: Counter[str] = Counter()
    for row in segmented.select_columns(["doc_id", "status", "think", "input_ids", "context", "comment"]):
        boundaries = sum(1 for think in row["think"] if think)
        status = row["status"] if row["status"] != "actions" else ("with_actions" if boundaries else "no_boundary")
        if per_document.get(row["doc_id"]) != "with_actions":  # one chunk that has some is enough
            per_document[row["doc_id"]] = status
        totals["chunks"] += 1
        totals["boundaries"] += boundaries
        totals["kept_comments"] += sum(row["comment"])
        totals["tokens"] += len(row["input_ids"]) - max(row["context"], 1)
    kinds = Counter(per_document.values())
    counts = {"documents": len(rows)} | {
        name: kinds[name] for name in ("with_actions", "no_boundary", "plain", "lossy")
    }
    counts["empty"] = len(rows) - len(per_document)
    return counts | {name: totals[name] for name in ("chunks", "boundaries", "kept_comments", "tokens")}
