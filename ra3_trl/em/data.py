"""Data sets as the loop takes them: cut into chunks, counted, refused where nothing could be learned from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..models import context_length
from ..policy import Policy, chunk_length
from ..records import Document
from ..segmentation import Segmenter, count_documents, row_to_document, segment_dataset
from .stream import own_share


logger = get_logger(__name__)  # of the main process


def collate(rows: list[dict[str, Any]]) -> dict[str, list[Document]]:
    """Rows of segmented data as a batch of documents."""
    return {"documents": [row_to_document(row) for row in rows]}


def _prompt_and_completion(row: dict[str, str]) -> str:
    return row["prompt"] + row["completion"]


class Cutter:
    """
    Cuts data sets for a policy, and counts where their texts went.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            Its segmenter and settings.
        formatting_func (`Callable`, *optional*):
            Makes the text of an example.

    Attributes:
        counts (`dict[str, dict[str, int]]`):
            Of each data set that has a length, see [`~ra3_trl.segmentation.count_documents`].
    """

    def __init__(self, policy: Policy, formatting_func: Callable[[dict], str] | None = None):
        self.policy = policy
        self.formatting_func = formatting_func
        self.counts: dict[str, dict[str, int]] = {}

    def __call__(self, dataset: Any, split: str) -> Any:
        """Cuts a data set, or each of a dict of them, into rows of chunks; `None` stays.

        Raises:
            `ValueError`: for empty data, and training data without a place for a latent.
        """
        if isinstance(dataset, dict) and split == "train":
            raise ValueError(f"`train_dataset` has the splits {sorted(dataset)}; pass one of them.")
        if isinstance(dataset, dict):
            return {name: self(value, name) for name, value in dataset.items()}
        if dataset is None:
            return None
        args = self.policy.args
        if args.shuffle_dataset:
            dataset = dataset.shuffle(seed=args.seed)
        if isinstance(dataset, IterableDataset):
            dataset = own_share(dataset, args.process_index, args.world_size)
        segmented = segment_dataset(
            dataset, self._segmenter(split), args.dataset_text_field, self._text_of(dataset), args.dataset_num_proc
        )
        if isinstance(segmented, Dataset):
            self._count(dataset, segmented, split)
        return segmented

    def _text_of(self, dataset: Dataset | IterableDataset) -> Callable[[dict], str] | None:
        """`formatting_func`, or what makes one text of prompt and completion where `completion_only_loss` is false."""
        args, columns = self.policy.args, set(next(iter(dataset), {}))
        pairs = {"prompt", "completion"} <= columns and args.dataset_text_field not in columns
        if args.completion_only_loss and (self.formatting_func is not None or not pairs):
            raise ValueError(
                f"`completion_only_loss` is True, but texts come from "
                f"{'`formatting_func`' if self.formatting_func is not None else f'the columns {sorted(columns)}'} and "
                "not from a prompt and a completion; leave it out."
            )
        if args.completion_only_loss is False and pairs and self.formatting_func is None:
            return _prompt_and_completion
        return self.formatting_func

    def _segmenter(self, split: str) -> Segmenter:
        segmenter, args = self.policy.segmenter, self.policy.args
        if split == "train" or args.uses_latents:
            return segmenter
        # Evaluation always draws latents, so its chunks are the same for next-token prediction: longer ones alone
        # lower its cross-entropy.
        longest = chunk_length(args, context_length(self.policy.backbone.causal_lm), True)
        return Segmenter(segmenter.tokenizer, segmenter.format, longest, segmenter.existing_comments)

    def _count(self, dataset: Dataset, segmented: Dataset, split: str) -> None:
        name = split if split == "train" or split.startswith("eval") else f"eval_{split}"
        self.counts[name] = counts = count_documents(dataset, segmented)
        logger.info("%s: %s", name, ", ".join(f"{value:,} {key}" for key, value in counts.items() if value))
        if not len(segmented):
            raise ValueError(f"`{name}_dataset` has {len(dataset)} rows and all are empty texts; give it some code.")
        if split == "train" and self.policy.args.e_steps and not counts["boundaries"]:
            raise ValueError(
                f"`train_dataset` has no place where a latent may stand ({counts}); check `action_format`, or set "
                "`e_steps=0` for next-token prediction."
            )
