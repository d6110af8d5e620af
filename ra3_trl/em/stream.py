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
    """Mixed into a `Trainer` whose iterable data sets hold this process's share already; keeps count of the passes,
    which `Trainer` can't tell from the number of updates where there is no length."""

    _pass: tuple[int, int] = (0, 0)  # its number, and the update it began at

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.schedule.total:  # resumed when all was done: `Trainer` would do one more
            self.control.should_training_stop = True
            return None
        resumed = kwargs["resume_from_checkpoint"] and kwargs["epoch"] == kwargs["epochs_trained"]
        done = kwargs["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps if resumed else 0
        self._pass = (kwargs["epoch"], self.state.global_step - done)
        return super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, max_steps, updates_per_pass, passes, resume_from_checkpoint, trial):
        found = super()._init_training_state(max_steps, updates_per_pass, passes, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None or not isinstance(self.train_dataset, IterableDataset):
            return found
        number, updates = self.resumed_pass(resume_from_checkpoint)
        return number, 0 if self.args.ignore_data_skip else updates * self.args.gradient_accumulation_steps

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs) -> DataLoader:
        """`accelerate` would have process 0 read for all, or shard once more and repeat rows to even out: a stream is
        already shared out, and processes that run dry early get empty batches (see [`WindowMixin`]). Nor may it repeat
        rows of an evaluation set, where they would count twice."""
        if not isinstance(dataset, IterableDataset):
            config = self.accelerator.dataloader_config
            before, config.even_batches = config.even_batches, config.even_batches and kwargs.get("is_training", False)
            try:
                return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
            finally:
                config.even_batches = before
        settings = self.args
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=self.data_collator,
            drop_last=settings.dataloader_drop_last and kwargs.get("is_training", False),
            num_workers=settings.dataloader_num_workers,
            persistent_workers=settings.dataloader_persistent_workers,
            prefetch_factor=settings.dataloader_prefetch_factor,
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
