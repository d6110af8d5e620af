"""Annotation of a corpus in shards, by any number of processes and jobs: what is killed goes on where it was."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, concatenate_datasets
from tqdm.auto import tqdm

from ..segmentation import Text, Tokens
from .annotated import ANNOTATION, FAULTS, TOKENS, AnnotatedRow, RowAnnotator, no_boundaries
from .card import count_licenses
from .dataset_card import CorpusFacts, preview_rows
from .manifest import Manifest, ShardEntry, shard_file
from .publish import DatasetPush


logger = logging.getLogger(__name__)
SHARD_ROWS, _FEWEST_SHARDS = 1000, 16
_PUSH_SECONDS = 60  # between commits, since the Hub takes 128 an hour
_WAIT_SECONDS = 1.0
_LISTED = 8
Corpus = Dataset | IterableDataset


@dataclass(frozen=True)
class Share:
    """
    The shards that one process does: those whose number is `index` modulo `count`.

    Args:
        index (`int`), count (`int`):
            Counted through all processes of all jobs of an array, those of a job one after the other.
        processes (`int`):
            Processes of a job.
    """

    index: int = 0
    count: int = 1
    processes: int = 1

    def has(self, shard: int) -> bool:
        """Whether this process does it."""
        return shard % self.count == self.index

    def job_has(self, shard: int) -> bool:
        """Whether a process of this job does it."""
        return shard % self.count // self.processes == self.index // self.processes


WHOLE = Share()


@dataclass(frozen=True)
class Shard:
    """So many rows of a corpus, `size`, in their order; the first has the number `first_row`. `load` makes them a data
    set, which may fail."""

    number: int
    first_row: int
    size: int
    load: Callable[[], Dataset]

    @cached_property
    def rows(self) -> Dataset:
        return self.load()

    @property
    def numbers(self) -> range:
        return range(self.first_row, self.first_row + self.size)

    def digest(self) -> str:
        """Tells its rows from others."""
        digest = hashlib.blake2b(digest_size=8)
        for row in self.rows:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def rows_of_a_shard(rows: int | None) -> int:
    """Rows of a shard where nobody says it: 1,000, and fewer where there would be fewer than 16 shards; the same
    whatever the number of processes."""
    return SHARD_ROWS if rows is None else max(1, min(SHARD_ROWS, -(-rows // _FEWEST_SHARDS)))


def cut_into_shards(
    corpus: Corpus, shard_rows: int, wanted: Callable[[int], bool] = lambda _: True
) -> Iterator[tuple[int, Shard | None]]:
    """Cuts a corpus into shards of `shard_rows` rows: their numbers in order, and those that are `wanted`. Of a stream
    no more is kept than one of them.

    Raises:
        `ValueError`: where a stream can't be read any further.
    """
    if isinstance(corpus, Dataset):
        for number, first in enumerate(range(0, len(corpus), shard_rows)):
            rows = range(first, min(first + shard_rows, len(corpus)))
            yield number, Shard(number, first, len(rows), partial(corpus.select, rows)) if wanted(number) else None
        return
    # One of a generator has none before its rows: the first ones say for all.
    features = corpus.features or Dataset.from_list(list(corpus.take(SHARD_ROWS))).features
    stream = iter(corpus)
    for number in count():
        mine, first = wanted(number), number * shard_rows
        try:  # rows that are another's are counted and not kept
            block = [row if mine else None for row in islice(stream, shard_rows)]
        except ValueError as error:
            raise ValueError(f"the corpus can't be read behind row {first}: {error}") from error
        if not block:
            return
        yield number, Shard(number, first, len(block), partial(_rows, block, features)) if mine else None


def _rows(block: list[dict[str, Any]], features: Features) -> Dataset:
    return Dataset.from_dict({name: [row.get(name) for row in block] for name in features}, features=features)


def _save(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file; of no rows one without a row group, since `load_dataset` reads none that is empty."""
    if table.num_rows:
        pq.write_table(table, path)
    else:
        pq.ParquetWriter(path, table.schema).close()


def refuse_without_boundaries(annotator: RowAnnotator, corpus: Corpus) -> None:
    """Refuses a corpus without a place for a latent, of which a stream's first rows stand for the whole.

    Raises:
        `ValueError`: if there is none, or no row.
    """
    rows = readable = 0
    for row in corpus if isinstance(corpus, Dataset) else corpus.take(SHARD_ROWS):
        rows += 1
        with suppress(ValueError):  # what is wrong with a row is said when it is its turn
            example = annotator.read(row)
            readable += 1
            if annotator.has_boundary(example):
                return
    if not rows:
        raise ValueError("the corpus is empty; give it at least one row.")
    if readable:
        raise no_boundaries(readable, annotator.policy.args.action_format)


class ShardedAnnotation:
    """
    Annotates the shards of one process and enters them in the manifest.

    Args:
        annotator ([`RowAnnotator`]):
            What annotates rows.
        corpus (`datasets.Dataset` or `datasets.IterableDataset`):
            The whole of it.
        manifest ([`Manifest`]):
            Of the folder that shards go to.
        share ([`Share`], *optional*):
            Shards of this process.
        push ([`DatasetPush`], *optional*), card (`Callable`, *optional*):
            Where finished shards go, and what makes the card of [`CorpusFacts`] and the repository's full name.
        skip_broken_rows (`bool`, *optional*, defaults to `False`):
            Whether rows that can't be annotated are left out, instead of their shard.
    """

    def __init__(
        self,
        annotator: RowAnnotator,
        corpus: Corpus,
        manifest: Manifest,
        share: Share = WHOLE,
        push: DatasetPush | None = None,
        card: Callable[[CorpusFacts, str], Any] | None = None,
        skip_broken_rows: bool = False,
    ):
        self.annotator, self.corpus, self.manifest = annotator, corpus, manifest
        self.share, self.push, self.card = share, push, card
        self.skip_broken_rows = skip_broken_rows
        self.begun = time.time()

    def run(self) -> str | None:
        """Does what is not finished.

        Returns:
            `str`: where the last push went; `None` without one.

        Raises:
            `ValueError`: if shards failed, naming them and their rows; the others are finished.
            `OSError`: if nothing more can be written.
        """
        self.manifest.forgive(self.share.has)
        PartialState().wait_for_everyone()  # else a process could see another one's old failures
        done, total, url = self.manifest.finished(), 0, None
        shards = cut_into_shards(self.corpus, self.manifest.origin.shard_rows, self.share.has)
        with self.annotator.policy.inference(), self._progress(done) as progress:
            for number, shard in shards:
                total = number + 1
                if shard is None or self._is_finished(shard, done.get(number)):
                    continue
                try:
                    self._do(shard, progress)
                except FAULTS as error:
                    message = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
                    logger.warning("Shard %d failed and is left out: %s", shard.number, message)
                    self.manifest.fail(shard.number, message)
                url = self._push(_PUSH_SECONDS) or url
        url = self._push(0) or url
        self._end(total)
        return url

    @staticmethod
    def _is_finished(shard: Shard, entry: ShardEntry | None) -> bool:
        """Whether it has an entry.

        Raises:
            `ValueError`: if that is of other rows.
        """
        if entry is not None and (entry.rows_in, entry.rows_hash) != (shard.size, shard.digest()):
            raise ValueError(
                f"rows {shard.first_row} to {shard.numbers[-1]} of the corpus are not those that {entry.file} was "
                "made of; give the corpus as it was, or name another `output_dir`."
            )
        return entry is not None

    def _do(self, shard: Shard, progress: tqdm) -> None:
        """Annotates a shard, writes its file and enters it."""
        begun = time.perf_counter()
        broken: dict[int, str] = {}
        examples = self._read(shard, broken)
        rows = {}
        readable = shard.rows.select([number - shard.first_row for number in examples])
        proposals = self.annotator.propose(list(examples.values()), readable)
        for (number, example), row in zip(examples.items(), readable, strict=True):
            proposed = next(proposals)  # what is wrong with an annotator is not the row's fault
            said = () if proposed is None else (proposed,)
            try:
                rows[number] = self.annotator(example, row, *said)
            except FAULTS as error:
                broken[number] = f"{type(error).__name__}: {error}"
                self._refuse_broken(broken)
            progress.update()
        kept = shard.rows.select([number - shard.first_row for number in rows])
        if self.push:
            kept = self.push.check(kept, list(rows))
        added = _rows([row.columns() for row in rows.values()], ANNOTATION)
        if self.push:
            self.push.check_secrets(added, list(rows))
        written = concatenate_datasets([kept, added], axis=1)
        if not rows:  # of data sets without rows it gives the first
            written = _rows([], Features({**kept.features, **ANNOTATION}))
        if self.manifest.origin.form == "tokens":
            chunks = [chunk for number, row in rows.items() for chunk in row.token_rows(number)]
            written = _rows(chunks, TOKENS)
        try:  # a disk may have room for the file and none for its entry
            self._write(shard, written)
            self.manifest.add(self._entry(shard, written, rows, broken, time.perf_counter() - begun))
        except OSError as error:
            raise OSError(
                f"{shard_file(shard.number)} can't be written to {str(self.manifest.folder)!r} ({error}); "
                f"{len(self.manifest.finished())} shards are finished and kept: make room, and run the command again."
            ) from error

    def _read(self, shard: Shard, broken: dict[int, str]) -> dict[int, Text | Tokens]:
        """Reads all rows before the work on any; notes what is wrong with `broken` ones."""
        examples = {}
        for number, row in zip(shard.numbers, shard.rows, strict=True):
            try:
                examples[number] = self.annotator.read(row)
            except ValueError as error:
                broken[number] = str(error)
        self._refuse_broken(broken)
        return examples

    def _refuse_broken(self, broken: dict[int, str]) -> None:
        if broken and not self.skip_broken_rows:
            raise ValueError(list_rows(broken))

    def _write(self, shard: Shard, rows: Dataset) -> None:
        table = rows.with_format("arrow")[:].cast(rows.features.arrow_schema)
        self.manifest.write(shard_file(shard.number), partial(_save, table))

    def _entry(
        self, shard: Shard, written: Dataset, rows: dict[int, AnnotatedRow], broken: dict[int, str], seconds: float
    ) -> ShardEntry:
        origin = self.manifest.origin
        return ShardEntry(
            shard=shard.number,
            first_row=shard.first_row,
            rows_in=shard.size,
            rows_out=len(written),
            latents=sum(len(row.latents) for row in rows.values()),
            boundaries=sum(row.num_boundaries for row in rows.values()),
            tokens=sum(row.tokens for row in rows.values()),
            licenses=count_licenses(written),
            seconds=round(seconds, 3),
            bytes=(self.manifest.folder / shard_file(shard.number)).stat().st_size,
            rows_hash=shard.digest(),
            settings_hash=origin.settings_hash,
            checkpoint_hash=origin.checkpoint_hash,
            left_out=sorted(broken),
        )

    def _progress(self, done: Container[int]) -> tqdm:
        """Rows of this process's share that are to be done, with rows a second and, where they are counted, the time
        left. One process of a job shows it."""
        rows, left = self.manifest.origin.rows, None
        if rows is not None:
            size = self.manifest.origin.shard_rows
            mine = (s for s in range(-(-rows // size)) if self.share.has(s) and s not in done)
            left = sum(min(size, rows - s * size) for s in mine)
        args = self.annotator.policy.args
        quiet = args.disable_tqdm or self.share.index % self.share.processes > 0
        return tqdm(total=left, desc="Annotating", unit="row", disable=quiet)

    def _push(self, seconds: float) -> str | None:
        """Pushes finished shards, of whichever process, if none was pushed for so many seconds; says where to."""
        if self.push is None or self.card is None:
            return None
        with self.manifest.lock("push"):
            shards, last = self.manifest.unpushed()
            if not shards or time.time() < (last or self.begun) + seconds:
                return None
            facts = corpus_facts(self.manifest, self.annotator.policy.args.action_format)
            files = [self.manifest.folder / shard_file(shard) for shard in shards]
            info = self.push.upload_files(files, lambda name: self.card(facts, name), in_place=last is None)
            self.manifest.pushed(shards)
        return str(info.repo_url)

    def _end(self, total: int) -> None:
        """Raises what failed; behind the other processes of the job, which a launcher would end with this one."""
        failed = {shard: why for shard, why in self.manifest.failed().items() if self.share.has(shard)}
        if not failed:
            if len(self.manifest.finished()) == total:
                self.manifest.clean()
            return
        of_job = set(filter(self.share.job_has, range(total)))
        while of_job - set(self.manifest.finished()) - set(self.manifest.failed()):
            time.sleep(_WAIT_SECONDS)
        shown = [f"shard {shard}: {why}" for shard, why in sorted(failed.items())[:_LISTED]]
        more = f"; and {len(failed) - _LISTED} more" if len(failed) > _LISTED else ""
        raise ValueError(
            f"{len(failed)} shards failed, {len(self.manifest.finished())} are finished and kept. {'; '.join(shown)}"
            f"{more}. Mend these rows or pass `skip_broken_rows`, and run the command again; it does these shards."
        )


def list_rows(broken: dict[int, str]) -> str:
    """Says what is wrong with rows: `row 3: ...; row 7: ...; and 2 more`."""
    shown = [f"row {number}: {why}" for number, why in sorted(broken.items())[:_LISTED]]
    rest = len(broken) - len(shown)
    return "; ".join(shown) + (f"; and {rest} more" if rest else "")


def corpus_facts(manifest: Manifest, action_format: str) -> CorpusFacts:
    """What a card says of the finished shards; the preview is the first one's that has latents."""
    entries = manifest.finished()
    with_latents = [entry for _, entry in sorted(entries.items()) if entry.latents] or list(entries.values())
    first = Dataset(pq.read_table(manifest.folder / with_latents[0].file))
    return CorpusFacts(
        rows=sum(entry.rows_out for entry in entries.values()),
        latents=sum(entry.latents for entry in entries.values()),
        boundaries=sum(entry.boundaries for entry in entries.values()),
        licenses=manifest.licenses(),
        columns=first.column_names,
        preview=[{**row, "row": row["row"] + with_latents[0].first_row} for row in preview_rows(first, action_format)],
    )
