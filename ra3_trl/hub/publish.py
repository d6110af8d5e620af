"""What may leave the machine: an annotated corpus with a licence for each row and no secret in any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset
from huggingface_hub import CommitInfo, DatasetCard, HfApi
from huggingface_hub.utils import validate_repo_id

from ..outgoing import process_tokens
from .licenses import row_license
from .secrets import check_card, scan_rows


_SHARD_BYTES = 500_000_000
_LISTED = 8


@dataclass(frozen=True)
class DatasetPush:
    """
    Where an annotated corpus goes, and what it may lack.

    Args:
        repo_id (`str`):
            Data set on the Hub, `"org/name"` or `"name"` under your own.
        license_column (`str`, *optional*, defaults to `"license"`), dataset_license (`str`, *optional*):
            Column that names each row's licence, a text or a list of texts; licence of the rows that name none.
        private (`bool`, *optional*), token (`str`, *optional*):
            Whether the repository is private if it is new; a token with write permission. `None` is your
            organisation's default, and the token that you are logged in with.
        revision (`str`, *optional*), commit_message (`str`, *optional*):
            Branch, made if it is not there (`None` is `main`); message of the commit.
        allow_missing_licenses (`bool`, *optional*), allow_secrets (`bool`, *optional*):
            Publish rows whose licence nobody knows; publish what looks like passwords and keys.

    Raises:
        `ValueError`: for a `repo_id` that the Hub can't have.
    """

    repo_id: str
    license_column: str = "license"
    dataset_license: str | None = None
    private: bool | None = None
    token: str | None = None
    revision: str | None = None
    commit_message: str = "Upload annotated data set"
    allow_missing_licenses: bool = False
    allow_secrets: bool = False

    def __post_init__(self):
        validate_repo_id(self.repo_id)

    def check(self, dataset: Dataset, numbers: Sequence[int] | None = None) -> Dataset:
        """`dataset` with a column `license`, filled with `dataset_license`, if its rows may be published.

        Args:
            dataset (`datasets.Dataset`), numbers (`Sequence[int]`, *optional*):
                Rows, and their numbers in the corpus that they are a part of.

        Raises:
            `ValueError`: for rows without a licence, or with secrets in them.
        """
        dataset = self._licensed(dataset, numbers)
        self.check_secrets(dataset, numbers)
        return dataset

    def check_secrets(self, dataset: Dataset, numbers: Sequence[int] | None = None) -> None:
        """Refuses rows that seem to hold secrets, saying which rows and of what kind; no secret is shown.

        Raises:
            `ValueError`: if there are any.
        """
        tokens = process_tokens(token=self.token)
        secrets = scan_rows(dataset.with_format(None), tokens, numbers)
        if self.allow_secrets:  # of others: this process's own are none that anybody means to publish
            secrets = [secret for secret in secrets if secret.kind in tokens.values()]
        if secrets:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(s.kind for s in secrets).most_common())
            raise ValueError(
                f"{len({secret.row for secret in secrets})} rows seem to hold secrets ({kinds}): "
                f"{_listed(secrets, '; ')}. Take them out, or pass `allow_secrets` if they are none. Nothing was "
                "uploaded."
            )

    def _licensed(self, dataset: Dataset, numbers: Sequence[int] | None) -> Dataset:
        column, columns = self.license_column, dataset.column_names
        if column != "license" and column not in columns:
            raise ValueError(
                f"`license_column` is {column!r}, and the corpus has the columns {sorted(columns)}; name one of them."
            )
        if column != "license" and "license" in columns:
            raise ValueError(
                f"`license_column` is {column!r}, and the corpus has a column `license` besides; drop or rename it."
            )
        cells = dataset.with_format(None)[column] if column in columns else [None] * len(dataset)
        of_rows = [row_license(value) for value in cells]
        filled = [name or row_license(self.dataset_license) for name in of_rows]
        numbers = range(len(filled)) if numbers is None else numbers
        missing = [number for number, name in zip(numbers, filled, strict=True) if name is None]
        if missing and not self.allow_missing_licenses:
            reason = f"column `{column}` names none" if column in columns else "the corpus has no column of licences"
            raise ValueError(
                f"{len(missing)} rows have no licence ({reason}): {_listed(missing)}. Whoever gets a corpus must know "
                "the terms: leave these rows out, name the column with `license_column`, set `dataset_license` to the "
                "licence of all rows that name none, or pass `allow_missing_licenses`. Nothing was uploaded."
            )
        # Nothing to add where the column says it all already, or nobody knows anything.
        if column == "license" and filled == of_rows:
            return dataset
        rest = dataset.remove_columns("license") if "license" in columns else dataset
        return rest.add_column("license", filled)

    def upload(self, dataset: Dataset, card: DatasetCard | Callable[[str], DatasetCard]) -> CommitInfo:
        """Uploads rows that were [`~DatasetPush.check`]ed and their card in one commit, in the place of older data.

        `card` may be a function of the repository's full name, which is known when there is one.
        """
        shards = max(1, min(len(dataset), -(-dataset.data.nbytes // _SHARD_BYTES)))
        with TemporaryDirectory() as folder:
            files = [Path(folder) / f"train-{i:05d}-of-{shards:05d}.parquet" for i in range(shards)]
            for i, file in enumerate(files):
                dataset.shard(shards, i).to_parquet(file)
            return self.upload_files(files, card, in_place=True)

    def upload_files(
        self, files: Sequence[Path], card: DatasetCard | Callable[[str], DatasetCard], in_place: bool
    ) -> CommitInfo:
        """Uploads Parquet files of checked rows and the card in one commit; `in_place` of older data, or beside it."""
        check_card(str(card(self.repo_id) if callable(card) else card), process_tokens(token=self.token))
        api = HfApi(token=self.token)
        repo_id = api.create_repo(self.repo_id, private=self.private, repo_type="dataset", exist_ok=True).repo_id
        if self.revision is not None:
            api.create_branch(repo_id, branch=self.revision, repo_type="dataset", exist_ok=True)
        with TemporaryDirectory() as folder:
            (card(repo_id) if callable(card) else card).save(Path(folder) / "README.md")
            (Path(folder) / "data").mkdir()
            for file in files:
                (Path(folder) / "data" / file.name).symlink_to(file.resolve())
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                repo_type="dataset",
                revision=self.revision,
                commit_message=self.commit_message,
                delete_patterns="data/*.parquet" if in_place else None,
            )


def _listed(items: Sequence[object], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return separator.join(map(str, items[:_LISTED])) + more
