"""Data sets of expert text -> data sets of document chunks, and back to `Document`s."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Sequence, Value

from ..kinds import shown
from ..records import Action, Boundary, Document
from .documents import Segmenter, Tokens
from .examples import RowForms, RowReader, Text


ROW = "row"  # among the columns that are kept: the whole row, under this name
_NO_ROW = object()
_IDS = Sequence(Value("int32"))
FEATURES = Features(
    {"doc_id": Value("int64"), "chunk": Value("int32"), "status": Value("string"), "context": Value("int32")}
    | dict.fromkeys(("input_ids", "index", "start", "end"), _IDS)
    | {
        "comment": Sequence(Value("bool")),
        "trained": Sequence(Value("bool")),
        "think": Sequence(_IDS),
        "close": Sequence(_IDS),
    }
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
        "trained": [a.trained for a in document.actions],
        "think": [list(b.think) for b in boundaries],
        "close": [list(b.close) for b in boundaries],
    }


def row_to_document(row: dict[str, Any]) -> Document:
    """Reads what [`document_to_row`] has written."""
    columns = zip(
        *(row[name] for name in ("index", "start", "end", "comment", "trained", "think", "close")), strict=True
    )
    actions = tuple(
        Action(index, start, end, Boundary(tuple(think), tuple(close)) if think else None, comment, trained)
        for index, start, end, comment, trained, think, close in columns
    )
    ids = tuple(row["input_ids"])
    return Document(row["doc_id"], row["chunk"], ids, actions, row["context"], row["status"], row.get(ROW) or {})


def as_dataset(data: Any, name: str) -> Dataset | IterableDataset:
    """Takes a data set or a stream, without its format, as which `name` was passed.

    Raises:
        `ValueError`: for other containers, with what makes a data set of them.
    """
    if isinstance(data, dict):
        raise ValueError(
            f"`{name}` has the splits {list(data)}; pass one of them, such as `data[{next(iter(data), 0)!r}]`."
        )
    if not isinstance(data, (Dataset, IterableDataset)):
        kind = type(data).__name__
        cure = {"list": "from_list(rows)", "tuple": "from_list(list(rows))", "DataFrame": "from_pandas(frame)"}
        if isinstance(data, (list, tuple)) and not all(isinstance(row, dict) for row in data):
            cure = dict.fromkeys(cure, "from_dict({'text': texts})")
        way = cure.get(kind, "from_generator(lambda: iter(data))")
        raise ValueError(
            f"`{name}` is a {kind}; give a `datasets.Dataset` or `IterableDataset`: `Dataset.{way}`, or for a file "
            "`load_dataset`."
        )
    if isinstance(data, IterableDataset):
        return data.with_format(None)
    if data.format["type"] == "custom":
        raise ValueError(
            f"`{name}` has a transform, which would be asked once and not at each use; write its result into the rows "
            "by `map`, or take it off by `with_format(None)`."
        )
    # A format may hide columns.
    return data.with_format(None).select_columns(data.format["columns"])


def content_id(example: Text | Tokens | str) -> int:
    """Numbers a document in a stream by 63 bits of its content: the same in whichever shard or pass it comes."""
    text = example if isinstance(example, str) else example.text
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


def cut_example(segmenter: Segmenter, doc_id: int, example: Text | Tokens) -> list[Document]:
    """Cuts what a row holds."""
    return segmenter.cut_tokens(doc_id, example) if isinstance(example, Tokens) else segmenter(doc_id, *example)


def segment_dataset(
    dataset: Dataset | IterableDataset,
    segmenter: Segmenter,
    text_field: str = "text",
    formatting_func: Callable[[dict], str] | None = None,
    num_proc: int | None = None,
    forms: RowForms | None = None,
    name: str = "train_dataset",
    kept: tuple[str, ...] = (),
) -> Dataset | IterableDataset:
    """Cuts every row into document chunks.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Texts, prompts with completions, conversations or tokens, see [`RowReader`].
        segmenter ([`Segmenter`]):
            What cuts them.
        text_field (`str`, *optional*, defaults to `"text"`), formatting_func (`Callable`, *optional*):
            The column of the text, or what makes it.
        num_proc (`int`, *optional*):
            Processes that share a data set's rows; a stream is cut as it is read.
        forms ([`RowForms`], *optional*):
            How rows are read, in place of the two.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            What errors call it.
        kept (`tuple[str]`, *optional*):
            Columns that each chunk has of its row; `ROW` is all of them, as one.

    Raises:
        `ValueError`: for an empty data set, another container, or a row that can't be read, by its number.
    """
    dataset = as_dataset(dataset, name)
    reader = RowReader(segmenter, forms or RowForms(formatting_func, text_field))
    first = next(iter(dataset), _NO_ROW)
    if first is _NO_ROW:
        raise ValueError(f"`{name}` is empty; give it at least one row.")
    if not isinstance(first, Mapping):
        raise ValueError(f"`{name}` gives {shown(first)} for a row; it must give dicts, such as {{'text': ...}}.")

    def read(row: Mapping[str, Any], index: int) -> Text | Tokens:
        try:
            return reader(row)
        except ValueError as error:
            raise ValueError(f"`{name}`, row {index}: {error}") from error

    def cut(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {column: [] for column in (*FEATURES, *kept)}
        for position, index in enumerate(indices):
            whole = {column: values[position] for column, values in batch.items()}
            example = read(whole, index)
            doc_id = index if isinstance(dataset, Dataset) else content_id(example)
            for document in cut_example(segmenter, doc_id, example):
                of_row = {column: whole if column == ROW else whole[column] for column in kept}
                for column, value in (document_to_row(document) | of_row).items():
                    out[column].append(value)
        return out

    read(first, 0)
    columns: dict[str, Any] = {"remove_columns": list(first)}
    if dataset.features or not kept:  # a stream may not say of what types its columns are
        types = dataset.features or {}
        columns["features"] = Features(FEATURES | {c: types if c == ROW else types[c] for c in kept})
    if not isinstance(dataset, Dataset):
        return dataset.map(cut, with_indices=True, batched=True, batch_size=8, **columns)  # little is read ahead
    options = {"num_proc": num_proc, "load_from_cache_file": False, "desc": "Cutting text into actions"}
    return dataset.map(cut, with_indices=True, batched=True, batch_size=64, **options, **columns)


def count_documents(rows: Dataset, segmented: Dataset) -> dict[str, int]:
    """Counts where every text went: `documents = with_actions + no_boundary + plain + untokenized + lossy + empty`.

    Also chunks, boundaries and tokens.

    `plain` (not of this format), `untokenized` (parses as this Python and does not tokenize as every Python would),
    `lossy` (the tokenizer does not give the text back) and `no_boundary` (a line only, say) get plain next-token
    training; `empty` texts have nothing to train.
    """
    per_document: dict[int, str] = {}
    totals: Counter[str] = Counter()
    for row in segmented:
        boundaries = sum(1 for think in row["think"] if think)
        status = row["status"] if row["status"] != "actions" else ("with_actions" if boundaries else "no_boundary")
        if per_document.get(row["doc_id"]) != "with_actions":  # one chunk that has some is enough
            per_document[row["doc_id"]] = status
        totals["chunks"] += 1
        totals["boundaries"] += boundaries
        document = row_to_document(row)
        totals["kept_comments"] += sum(action.comment and action.trained for action in document.actions)
        totals["tokens"] += document.num_trained
    kinds = Counter(per_document.values())
    counts = {"documents": len(rows)} | {
        name: kinds[name] for name in ("with_actions", "no_boundary", "plain", "untokenized", "lossy")
    }
    counts["empty"] = len(rows) - len(per_document)
    return counts | {name: totals[name] for name in ("chunks", "boundaries", "kept_comments", "tokens")}
