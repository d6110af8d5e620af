"""Streams: each process cuts its own share, and no document is seen twice in a pass."""

from __future__ import annotations

from accelerate.data_loader import prepare_data_loader
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader


def own_share(dataset: IterableDataset, rank: int, processes: int) -> IterableDataset:
    """The rows of this process: whole shards if they divide evenly, else every n-th row. Workers of a data loader
    share out its shards again."""
    return split_dataset_by_node(dataset, rank, processes) if processes > 1 else dataset


class StreamMixin:
    """Mixed into a `Trainer` whose iterable data sets hold this process's share already."""

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs) -> DataLoader:
        """`accelerate` would have process 0 read for all, or shard once more and repeat rows to even out: a stream is
        already shared out, and processes that run dry early get empty batches (see [`WindowMixin`])."""
        if not isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        settings = self.args
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=settings.dataloader_num_workers,
            persistent_workers=settings.dataloader_persistent_workers,
            prefetch_factor=settings.dataloader_prefetch_factor,
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
