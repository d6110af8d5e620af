"""Data sets as the loop takes them: cut into chunks, counted, refused where nothing could be learned from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..models import context_length
from ..policy import Policy, chunk_length
from ..records import Document
from ..segmentation import (
    FEATURES,
    ROW,
    RowForms,
    Segmenter,
    as_dataset,
    count_documents,
    row_to_document,
    segment_dataset,
)
from .stream import own_share


logger = get_logger(__name__)  # of the main process


def collate(rows: list[dict[str, Any]]) -> dict[str, list[Document]]:
    """Rows of segmented data as a batch of documents."""
    return {"documents": [row_to_document(row) for row in rows]}


class Cutter:
    """
    Cuts data sets for a policy, and counts where their texts went.

    Args:
        policy ([`~ra3_trl.policy.Policy`]):
            Its segmenter and settings.
        formatting_func (`Callable`, *optional*):
            Makes the text of an example.
        keep_rows (`bool`, *optional*, defaults to `False`):
            Whether documents of the training data have the columns of their rows, for reward functions.

    Attributes:
        counts (`dict[str, dict[str, int]]`):
            Of each data set that has a length, see [`~ra3_trl.segmentation.count_documents`].
    """

    def __init__(self, policy: Policy, formatting_func: Callable[[dict], str] | None = None, keep_rows: bool = False):
        self.policy = policy
        self.formatting_func = formatting_func
        self.keep_rows = keep_rows
        self.counts: dict[str, dict[str, int]] = {}

    def __call__(self, dataset: Any, split: str) -> Any:
        """Cuts a data set, or each of a dict of them, into rows of chunks; `None` and what is cut already stay.

        Raises:
            `ValueError`: for other containers, rows that can't be read, and training data without a place for a
            latent.
        """
        if dataset is None:
            return None
        name = f"{split if split in ('train', 'test') else 'eval'}_dataset"
        if isinstance(dataset, dict) and split != "train":
            if not dataset:
                raise ValueError(f"`{name}` is an empty dict; give it a data set, or leave it out.")
            return {key: self(value, f"eval_{key}") for key, value in dataset.items()}
        args = self.policy.args
        dataset = as_dataset(dataset, name)
        if set(FEATURES) <= set(dataset.features or ()):
            return dataset
        if args.shuffle_dataset and split == "train":
            dataset = dataset.shuffle(seed=args.seed)
        if isinstance(dataset, IterableDataset):
            dataset = own_share(dataset, args.process_index, args.world_size)
        forms, processes = RowForms.of(args, self.formatting_func), args.dataset_num_proc
        if split == "train":
            kept = (ROW,) if self.keep_rows else ()
        else:  # TRL's callbacks that write completions read prompts off the trainer's evaluation set
            kept = ("prompt",) if "prompt" in (dataset.features or ()) else ()
        segmented = segment_dataset(
            dataset, self._segmenter(split), num_proc=processes, forms=forms, name=name, kept=kept
        )
        if isinstance(segmented, Dataset):
            self._count(dataset, segmented, split)
        return segmented

    def _segmenter(self, split: str) -> Segmenter:
        segmenter, args = self.policy.segmenter, self.policy.args
        if split == "train" or args.uses_latents:
            return segmenter
        # Evaluation always draws latents, so its chunks are the same for next-token prediction: longer ones alone
        # lower its cross-entropy.
        longest = chunk_length(args, context_length(self.policy.backbone.causal_lm), True)
        return Segmenter(segmenter.tokenizer, segmenter.format, longest, segmenter.existing_comments, True)

    def _count(self, dataset: Dataset, segmented: Dataset, split: str) -> None:
        self.counts[split] = counts = count_documents(dataset, segmented)
        logger.info("%s: %s", split, ", ".join(f"{value:,} {key}" for key, value in counts.items() if value))
        if not len(segmented):
            raise ValueError(f"`{split}_dataset` has {len(dataset)} rows and all are empty texts; give it some code.")
        if split == "train" and self.policy.args.e_steps and not counts["boundaries"]:
            cure = "check `action_format`"
            if counts["lossy"] == counts["documents"]:
                cure = "the tokenizer gives none of these texts back, so take another checkpoint or other texts"
            raise ValueError(
                f"`train_dataset` has no place where a latent may stand ({counts}); {cure}, or set `e_steps=0` for "
                "next-token prediction."
            )
