"""Streams: each process cuts its own share, and no document is seen twice in a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import TrainingArguments


def own_share(dataset: IterableDataset, rank: int, processes: int) -> IterableDataset:
    """The rows of this process: whole shards if they divide evenly, else every n-th row. Workers of a data loader
    share out its shards again."""
    return split_dataset_by_node(dataset, rank, processes) if processes > 1 else dataset


@contextmanager
def not_evened_out(accelerator: Accelerator) -> Iterator[None]:
    """Loaders that are made inside repeat no row to even processes out: it would count twice where rows are measured,
    and processes need not do as many forwards there."""
    config = accelerator.dataloader_config
    before, config.even_batches = config.even_batches, False
    try:
        yield
    finally:
        config.even_batches = before


def stream_loader(
    dataset: IterableDataset,
    args: TrainingArguments,
    batch_size: int,
    collate: Callable[[list[Any]], Any],
    train: bool,
) -> DataLoader:
    """A loader of what is this process's share already. `accelerate` would have process 0 read for all, or shard once
    more and repeat rows to even out; processes that run dry early get empty batches instead (`em/loop.py`)."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate,
        drop_last=args.dataloader_drop_last and train,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
