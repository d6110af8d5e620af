"""What `RA3MidTrainer` gives to the Hub besides its weights: the model's card, and the corpus that it annotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo, DatasetCard

from ..config import RA3Config
from ..files import write_whole
from ..kinds import checked
from .annotated import ANNOTATION, annotate_dataset, require_boundaries
from .card import card_facts, render_model_card
from .dataset_card import render_dataset_card
from .publish import DatasetPush
from .push import PushMixin


@checked
class HubMixin(PushMixin):
    """The Hub's part of [`RA3MidTrainer`], which has `policy`, `source_dataset`, `cut`, `latent_log` and
    `evaluations`."""

    args: RA3Config
    source_dataset: Dataset | IterableDataset | None

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, **kwargs: Any
    ) -> None:
        """Writes `README.md` into `output_dir`; extra arguments are those of `Trainer.create_model_card`."""
        # The order of arguments is that of TRL's trainers.
        if self.is_world_process_zero():
            card = render_model_card(card_facts(self, model_name, dataset_name, **kwargs))
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "README.md", str(card).encode())

    def push_annotated_dataset(
        self,
        repo_id: str,
        dataset: Dataset | IterableDataset | None = None,
        *,
        dataset_name: str | None = None,
        **options: Any,
    ) -> CommitInfo | None:
        """
        Annotates a corpus with the present weights and pushes it to the Hub with its card, in one commit.

        Rows are checked before they are annotated and once more, with their latents, before anything leaves.

        Args:
            repo_id (`str`):
                Data set on the Hub, `"org/name"` or `"name"` under your own.
            dataset (`datasets.Dataset`, *optional*):
                Text as the trainer takes it; the default is the training data.
            dataset_name (`str`, *optional*):
                The source in words, for the card.
            **options:
                Further fields of [`~ra3_trl.hub.DatasetPush`], such as `private`, `revision` or
                `allow_missing_licenses`. `dataset_license`, `private` and `token` default to `args.dataset_license`,
                `args.hub_private_repo` and `args.hub_token`.

        Returns:
            `CommitInfo` of the upload on the main process, `None` on others.

        Raises:
            `ValueError`: for data without licences or with secrets, and where nothing can be annotated; then nothing
            is uploaded.
        """
        args = self.args
        of_run = {"dataset_license": args.dataset_license, "private": args.hub_private_repo, "token": args.hub_token}
        push = DatasetPush(repo_id, **of_run | {name: value for name, value in options.items() if value is not None})
        annotated = annotate_dataset(self.policy, push.check(self._to_annotate(dataset)), self.cut.formatting_func)
        require_boundaries(annotated, args.action_format)
        push.check_secrets(annotated.select_columns(list(ANNOTATION)))  # the rest is as it was
        if not self.is_world_process_zero():
            return None

        def card(full_name: str) -> DatasetCard:
            return render_dataset_card(
                self.policy, annotated, full_name, None, dataset_name, push.dataset_license, push.revision,
                self.state.global_step,
            )  # fmt: skip

        return push.upload(annotated, card)

    def _to_annotate(self, dataset: Dataset | IterableDataset | None) -> Dataset:
        """The corpus to push, or the training data as they were given."""
        source = self.source_dataset if dataset is None else dataset
        if not isinstance(source, Dataset):
            raise ValueError(
                f"`dataset` is {type(source).__name__ if source is not None else None}, but a corpus to push has a "
                "length: pass a `datasets.Dataset` (of a stream, `Dataset.from_list(list(stream.take(n)))`)."
            )
        if not self.args.uses_latents:
            raise ValueError(
                f"`e_steps` is {self.args.e_steps} and `penalty` {self.args.penalty}: this run is next-token "
                "prediction, which leaves no room for latents; set `e_steps`, or use `ra3 annotate`."
            )
        return source
