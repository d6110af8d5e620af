"""A corpus with latents spliced in: what the M-step learns from, as a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from types import MappingProxyType
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from ..policy import Annotation, Policy, Proposed, Source, annotate, source_of
from ..records import AnnotatedExample, Document
from ..rollout import NoiseKey
from ..segmentation import RowForms, RowReader, Segmenter, Text, Tokens, content_id, cut_example, readable_bytes


ANNOTATION = Features(
    {
        "annotated_text": Value("string"),
        "latents": [{"line": Value("int32"), "text": Value("string"), "gain": Value("float32")}],
        "num_boundaries": Value("int32"),
    }
)


# What a row, a model or a device may bring about; a full disk or a lost network is not the row's.
FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, RuntimeError)
TOKENS = Features({"input_ids": List(Value("int32")), "completion_mask": List(Value("int8")), "row": Value("int64")})


@dataclass(frozen=True)
class AnnotatedRow:
    """What comes of a row: its text with `latents` in it, places where one could stand, and its chunks."""

    text: str
    latents: list[dict[str, Any]]
    num_boundaries: int
    chunks: list[AnnotatedExample]

    @property
    def tokens(self) -> int:
        """Tokens of its text and its latents."""
        return sum(len(chunk.input_ids) - chunk.document.context for chunk in self.chunks)

    def columns(self) -> dict[str, Any]:
        """Its cells in the columns of `ANNOTATION`."""
        return {"annotated_text": self.text, "latents": self.latents, "num_boundaries": self.num_boundaries}

    def token_rows(self, number: int) -> list[dict[str, Any]]:
        """A row of `TOKENS` for each chunk of the row with this number: what an M-phase trains on, token by token."""
        masks = [[int(label != -100) for label in chunk.labels] for chunk in self.chunks]
        return [
            {"input_ids": list(chunk.input_ids), "completion_mask": mask, "row": number}
            for chunk, mask in zip(self.chunks, masks, strict=True)
        ]


class RowAnnotator:
    """
    Splices latents into rows, one by one. What comes of a row depends on what it holds, on settings and weights, and
    not on its place or its neighbours: noise is keyed by content.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            What writes the latents.
        formatting_func (`Callable`, *optional*):
            Makes the text of a row.
        annotation ([`~ra3_trl.policy.Annotation`], *optional*):
            Who proposes latents in the policy's place, which says what they are worth; it counts what became of them.
    """

    def __init__(
        self,
        policy: Policy,
        formatting_func: Callable[[dict], str] | None = None,
        annotation: Annotation | None = None,
    ):
        self.policy = policy
        self.annotation = annotation
        self._reader = RowReader(policy.segmenter, RowForms.of(policy.args, formatting_func))
        self._bytes = readable_bytes(policy.tokenizer, policy.segmenter.format)
        added = policy.tokenizer.added_tokens_decoder.items()
        self._special = {i: token.content.encode() for i, token in added if self._bytes[i] is None}

    def read(self, row: Mapping[str, Any]) -> Text | Tokens:
        """Reads a row in the forms that the trainer takes.

        Raises:
            `ValueError`: naming the column that can't be read, and why.
        """
        return self._reader(row)

    def has_boundary(self, example: Text | Tokens) -> bool:
        """Whether there is a place for a latent."""
        return any(document.boundaries for document in self.cut(example))

    def source(self, example: Text | Tokens, row: Mapping[str, Any]) -> Source:
        """What an annotator sees of a row. One that can't be cut is empty here, and fails when it is annotated."""
        try:
            text = (_text_of(self.policy.segmenter, example), row, self.cut(example))
        except FAULTS:
            return Source("")
        return source_of(self.policy, text)

    def propose(
        self, examples: Sequence[Text | Tokens], rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[Proposed | None]:
        """Has the annotator propose for rows, ahead of where they are annotated; `None` of each where the policy
        proposes itself."""
        if self.annotation is None:
            return repeat(None, len(examples))
        return self.annotation.propose([self.source(e, row) for e, row in zip(examples, rows, strict=True)])

    def __call__(
        self, example: Text | Tokens, row: Mapping[str, Any] | None = None, proposed: Proposed | None = None
    ) -> AnnotatedRow:
        """Annotates what was [`~RowAnnotator.read`], inside `policy.inference()`; what can't be annotated stays as it
        is. An annotator may want the other columns of its `row`; it is asked unless it has `proposed`."""
        policy, documents = self.policy, self.cut(example)
        text, noise = _text_of(policy.segmenter, example), NoiseKey(policy.args.seed, 1, 0)
        if self.annotation is None:
            examples = [annotate(policy, document, noise) for document in documents]
        elif proposed is None:
            (examples,) = self.annotation(policy, [(text, row or {}, documents)], noise)
        else:
            examples = self.annotation.place(policy, (text, row or {}, documents), proposed, noise)
        if not documents or documents[0].status != "actions":
            return AnnotatedRow(text, [], 0, examples)
        boundaries = sum(len(document.boundaries) for document in documents)
        return AnnotatedRow(*join_chunks(text, examples, self._bytes, self._special), boundaries, examples)

    def cut(self, example: Text | Tokens) -> list[Document]:
        """Cuts what was [`~RowAnnotator.read`] into chunks."""
        return cut_example(self.policy.segmenter, content_id(example), example)


def annotate_dataset(
    policy: Policy,
    dataset: Dataset,
    formatting_func: Callable[[dict], str] | None = None,
    annotation: Annotation | None = None,
) -> Dataset:
    """Splices latents of the present weights into a data set that fits into memory; the processes share it out.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            What writes the latents.
        dataset (`datasets.Dataset`):
            Text as the trainer takes it.
        formatting_func (`Callable`, *optional*):
            Makes the text of a row.
        annotation ([`~ra3_trl.policy.Annotation`], *optional*):
            Who proposes latents in the policy's place.

    Returns:
        `datasets.Dataset`: the same rows and columns with `annotated_text`, `latents` and `num_boundaries` added, on
        every process. A latent has the 1-based `line` of `annotated_text` that it stands in, its `text`, and the
        `gain` of thinking there in nats where that was measured. Texts that can't be annotated (empty, not of the
        format, not given back by the tokenizer) stay as they are.

    Raises:
        `ValueError`: if the data set is empty, has one of these columns already, or a row can't be read.
    """
    refuse_annotated(dataset.column_names)
    if not len(dataset):
        raise ValueError("the corpus is empty; give it at least one row.")
    args, dataset = policy.args, dataset.with_format(None)  # texts are wanted, whatever the rows were made into
    annotator = RowAnnotator(policy, formatting_func, annotation)
    mine = range(args.process_index, len(dataset), args.world_size)
    given = {number: dataset[number] for number in mine}
    examples = {number: _read(annotator, row, number) for number, row in given.items()}  # before the work
    quiet = args.disable_tqdm or args.process_index > 0
    with policy.inference(), tqdm(examples.items(), desc="Annotating", unit="row", disable=quiet) as progress:
        proposals = annotator.propose([*examples.values()], [*given.values()])
        own = {number: annotator(e, given[number], next(proposals)).columns() for number, e in progress}
    rows = {number: row for share in gather_object([own]) for number, row in share.items()}
    added = Dataset.from_list([rows[number] for number in range(len(dataset))], features=ANNOTATION)
    return concatenate_datasets([dataset, added], axis=1)


def refuse_annotated(columns: Sequence[str]) -> None:
    """
    Raises:
        `ValueError`: if a corpus has the columns of an annotated one.
    """
    if taken := set(ANNOTATION) & set(columns):
        raise ValueError(f"the corpus has the columns {sorted(taken)} already; rename them, or annotate the original.")


def _read(annotator: RowAnnotator, row: Mapping[str, Any], number: int) -> Text | Tokens:
    try:
        return annotator.read(row)
    except ValueError as error:
        raise ValueError(f"the corpus, row {number}: {error}") from error


def require_boundaries(annotated: Dataset, action_format: str) -> None:
    """
    Raises:
        `ValueError`: if [`annotate_dataset`] found no place for a latent in any text.
    """
    if not any(annotated["num_boundaries"]):
        raise no_boundaries(len(annotated), action_format)


def no_boundaries(texts: int, action_format: str) -> ValueError:
    """The error for so many `texts` without a place for a latent."""
    return ValueError(
        f"none of the {texts} texts has a boundary for `action_format` {action_format!r}: they are of "
        "another format, or empty, or the tokenizer does not give them back. Set `action_format`, or give other "
        "texts. Nothing was written."
    )


def _text_of(segmenter: Segmenter, example: Text | Tokens) -> str:
    """The text of a row as the segmenter sees it."""
    if isinstance(example, Tokens):
        return example.text
    return example.text if segmenter.existing_comments == "keep" else segmenter.format.strip(*example)


def join_chunks(
    text: str,
    examples: Sequence[AnnotatedExample],
    data: Sequence[bytes | None],
    special: Mapping[int, bytes] = MappingProxyType({}),
) -> tuple[str, list[dict[str, Any]]]:
    """Joins the annotated chunks of a document, whose `text` is as the segmenter saw it, and finds the latents' lines.

    Args:
        data (`Sequence[bytes | None]`):
            The bytes of each token, as from `readable_bytes`.
        special (`Mapping[int, bytes]`, *optional*):
            How special tokens stand in the text, a chat's for example.
    """
    # Chunks begin with context (BOS, a prompt, the last token before), which is not repeated: what they train on is
    # the end of the text, and what stands before it is taken from the text.
    tokens = [
        pair
        for example in examples
        for pair in list(zip(example.input_ids, example.is_latent, strict=True))[example.document.context :]
    ]
    original = text.encode()
    at, pieces = len(original), list[tuple[bytes, bool]]()  # expert's bytes, or a latent's with prefix and closure
    for position, (token, is_latent) in reversed(list(enumerate(tokens))):
        piece = special.get(token, data[token] or b"")
        if not is_latent:
            if not original.endswith(piece, 0, at):
                # An EOS that the text does not say, or a space that SentencePiece puts before a text or part of one.
                last = position == len(tokens) - 1 and token in special
                if not last and not (piece[:1] == b" " and original.endswith(piece[1:], 0, at)):
                    return text, []  # a special token that swallows white space, say: it stays as it is
                piece = b"" if last else piece[1:]
            at -= len(piece)
        pieces.append((piece, is_latent))
    out = original[:at]
    drawn = iter([(latent, e.gains.get(boundary)) for e in examples for boundary, latent in sorted(e.placed.items())])
    latents: list[dict[str, Any]] = []
    for is_latent, run in groupby(reversed(pieces), key=lambda pair: pair[1]):
        if is_latent:
            latent, gain = next(drawn)
            content = b"".join(data[i] or b"" for i in latent.token_ids)
            latents.append({"line": out.count(b"\n") + 1, "text": content.decode(), "gain": gain})
        out += b"".join(piece for piece, _ in run)
    return out.decode(), latents
