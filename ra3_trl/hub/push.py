"""How what a trainer saved gets to the Hub: nothing leaves with a token of this process in it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, auth_check, upload_folder
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress, logging

from ..files import written_aside
from ..kinds import checked
from ..outgoing import check_upload, process_tokens
from .secrets import check_card


logger = logging.get_logger(__name__)
# Files of a checkpoint that are for resuming alone, or whose place the card takes.
NOT_PUSHED = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "*.bin", "trainer_state.json", "README.md",
    "ra3_state.json", "ra3_frozen.safetensors", "ra3_head_state.safetensors",
)  # fmt: skip
_STAYS = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]


@checked
class PushMixin(Trainer):
    """The pushes of [`RA3MidTrainer`] and of RLVR's trainer: `Trainer`'s, through one door."""

    hub_model_id: str  # type: ignore[assignment]
    push_in_progress: PushInProgress | None  # type: ignore[assignment]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As `Trainer`'s; that the repository may be written to is seen now, not after the training."""
        asked = self.args.hub_private_repo
        self.args.hub_private_repo = asked if private is None else private  # an argument from transformers 5.23 on
        try:
            super().init_hf_repo(token)
        finally:
            self.args.hub_private_repo = asked
        if self.is_world_process_zero():
            auth_check(self.hub_model_id, token=self.args.hub_token if token is None else token, write=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """As `Trainer.push_to_hub`, which uploads all that lies in `output_dir`; here nothing leaves with a token of
        this process in it, and files such as `.env` stay.

        Raises:
            `ValueError`: if a file that would leave holds such a token, or the card a secret.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = kwargs.pop("model_name", None) or self.hub_model_id.split("/")[-1]
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        self.create_model_card(model_name=name, tags=tags, **kwargs)
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            self.push_in_progress.wait_until_done()
        return upload_folder(
            repo_id=self.hub_model_id, folder_path=str(self.args.output_dir), commit_message=commit_message,
            run_as_future=not blocking, revision=revision or self.args.hub_revision,
            token=self.args.hub_token if token is None else token,
            ignore_patterns=self._checked(str(self.args.output_dir), _STAYS, token),
        )  # fmt: skip

    def _checked(self, folder: str, ignore_patterns: list[str], token: str | None = None) -> list[str]:
        """What must be left out of an upload of `folder`, whose other files were looked through for secrets."""
        options = self.args.model_init_kwargs
        tokens = process_tokens(hub_token=self.args.hub_token, token=token, model_init_kwargs=options)
        card = Path(folder, "README.md")
        if card.is_file():
            check_card(card.read_text("utf-8"), tokens)
        return check_upload(folder, tokens, ignore_patterns)

    # Private, since `Trainer`'s copies a list of files of its own into `output_dir`, writes `training_args.bin` there,
    # which holds the token, and uploads at once; no hook stands in between.
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint as `Trainer` does, with head, settings and the card that was written before it, and
        without pickled arguments."""
        output_dir, strategy = str(self.args.output_dir), HubStrategy(self.args.hub_strategy)
        before = self.push_in_progress
        busy = before is not None and not before.is_done()
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with written_aside(output_dir) as folder:  # copied, since rotation may remove the checkpoint during the upload
            for path in Path(checkpoint_folder).iterdir():
                if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in NOT_PUSHED):
                    shutil.copy(path, folder)
        message = f"Training in progress, update {self.state.global_step}"
        jobs = [self._upload(output_dir, message, ignore_patterns=_STAYS)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo=place))
        jobs = [job for job in jobs if job is not None]
        if before is not None and busy:
            before.jobs.extend(jobs)  # type: ignore[union-attr]
        else:
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]

    def _upload(
        self, folder: str, message: str, path_in_repo: str | None = None, ignore_patterns: Sequence[str] = ()
    ) -> Future[CommitInfo] | None:
        """Uploads in the background; what failed or is refused is said, and training goes on."""
        try:
            ignored = self._checked(folder, list(ignore_patterns))
        except ValueError as error:
            logger.warning("A push to the Hub was refused, and training goes on without it: %s", error)
            return None
        # One upload after the other: each `HfApi` has a queue of its own, so this is the shared one.
        job: Future[CommitInfo] = upload_folder(
            repo_id=self.hub_model_id, folder_path=folder, commit_message=message, run_as_future=True,
            revision=self.args.hub_revision, token=self.args.hub_token, path_in_repo=path_in_repo,
            ignore_patterns=ignored,
        )  # fmt: skip
        job.add_done_callback(_say_if_failed)
        return job


def _say_if_failed(job: Future[CommitInfo]) -> None:
    if (error := job.exception()) is not None:
        logger.warning("A push to the Hub failed, and training goes on without it: %s", error)
