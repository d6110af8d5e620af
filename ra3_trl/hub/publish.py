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

from .licenses import row_license
from .secrets import scan_rows


_SHARD_BYTES = 500_000_000
_LISTED = 8


@dataclass(frozen=True)
class DatasetPush:
    """
    Where an annotated corpus goes, and what it may lack.

    Args:
        repo_id (`str`):
            Data set on the Hub, `"org/name"` or `"name"` under your own.
        license_column (`str`, *optional*, defaults to `"license"`):
            Column that names each row's licence, a text or a list of texts.
        dataset_license (`str`, *optional*):
            Licence of the rows that name none, or of all where there is no such column.
        private (`bool`, *optional*):
            Whether the repository is private if it is new; `None` is your organisation's default.
        token (`str`, *optional*):
            Token with write permission; `None` is the one you are logged in with.
        revision (`str`, *optional*):
            Branch, made if it is not there; `None` is `main`.
        commit_message (`str`, *optional*):
            Message of the commit.
        allow_missing_licenses (`bool`, *optional*, defaults to `False`):
            Publish rows whose licence nobody knows.
        allow_secrets (`bool`, *optional*, defaults to `False`):
            Publish what looks like passwords and keys.

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

    def check(self, dataset: Dataset) -> Dataset:
        """`dataset` with a column `license`, filled with `dataset_license`, if its rows may be published.

        Raises:
            `ValueError`: for rows without a licence, or with secrets in them.
        """
        dataset = self._licensed(dataset)
        self.check_secrets(dataset)
        return dataset

    def check_secrets(self, dataset: Dataset) -> None:
        """
        Raises:
            `ValueError`: if rows seem to hold secrets, saying which rows and of what kind; no secret is shown.
        """
        found = [] if self.allow_secrets else scan_rows(dataset.with_format(None))
        if not found:
            return
        kinds = ", ".join(f"{count} × {kind}" for kind, count in Counter(s.kind for s in found).most_common())
        raise ValueError(
            f"{len({secret.row for secret in found})} rows seem to hold secrets ({kinds}): "
            f"{_listed(found, '; ')}. Take them out, or pass `allow_secrets` if they are none. Nothing was uploaded."
        )

    def _licensed(self, dataset: Dataset) -> Dataset:
        column, columns, of_all = self.license_column, dataset.column_names, row_license(self.dataset_license)
        if column not in columns and column != "license":
            raise ValueError(
                f"`license_column` is {column!r}, and the corpus has the columns {sorted(columns)}; name one of them."
            )
        if column != "license" and "license" in columns:
            raise ValueError(
                f"`license_column` is {column!r}, and the corpus has a column `license` besides; drop or rename it."
            )
        cells = dataset.with_format(None)[column] if column in columns else [None] * len(dataset)
        own = [row_license(value) for value in cells]
        found = [name or of_all for name in own]
        if missing := [number for number, name in enumerate(found) if name is None]:
            names_none = f"column `{column}` names none"
            self._refuse_rows(names_none if column in columns else "the corpus has no column of licences", missing)
        if column == "license" and found == own:  # nothing was filled
            return dataset
        rest = dataset.remove_columns("license") if "license" in columns else dataset
        return rest.add_column("license", found)

    def _refuse_rows(self, reason: str, numbers: Sequence[int]) -> None:
        if self.allow_missing_licenses:
            return
        raise ValueError(
            f"{len(numbers)} rows have no licence ({reason}): {_listed(numbers)}. Whoever gets a corpus must know the "
            "terms: leave these rows out, name the column with `license_column`, set `dataset_license` to the "
            "licence of all rows that name none, or pass `allow_missing_licenses`. Nothing was uploaded."
        )

    def upload(self, dataset: Dataset, card: DatasetCard | Callable[[str], DatasetCard]) -> CommitInfo:
        """Uploads data and card in one commit, in the place of the data that the repository has.

        Args:
            dataset (`datasets.Dataset`):
                From [`~DatasetPush.check`].
            card (`huggingface_hub.DatasetCard` or `Callable[[str], DatasetCard]`):
                Its card, or what makes it of the repository's full name, which is known when there is one.
        """
        api = HfApi(token=self.token)
        repo_id = api.create_repo(self.repo_id, private=self.private, repo_type="dataset", exist_ok=True).repo_id
        if self.revision is not None:
            api.create_branch(repo_id, branch=self.revision, repo_type="dataset", exist_ok=True)
        shards = max(1, min(len(dataset), -(-dataset.data.nbytes // _SHARD_BYTES)))
        with TemporaryDirectory() as folder:
            (card(repo_id) if callable(card) else card).save(Path(folder) / "README.md")
            (Path(folder) / "data").mkdir()
            for i in range(shards):
                name = f"train-{i:05d}-of-{shards:05d}.parquet"
                dataset.shard(shards, i).to_parquet(Path(folder) / "data" / name)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                repo_type="dataset",
                revision=self.revision,
                commit_message=self.commit_message,
                delete_patterns="data/*.parquet",
            )


def _listed(items: Sequence[object], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return separator.join(map(str, items[:_LISTED])) + more
