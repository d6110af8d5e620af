"""The page of `ra3 play` as a Hugging Face Space: an app of one line, its requirements, and what the Hub asks for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..outgoing import check_upload, process_tokens
from .push import NOT_PUSHED


GRADIO = "6.31.0"  # that of constraints.txt, with which the page was tested
_FOLDER = "checkpoint"
_APP = '''\
"""The page of `ra3 play`, as a Space: https://huggingface.co/docs/hub/spaces-sdks-gradio"""

from ra3_trl.cli.main import main


raise SystemExit(main({words}))
'''
_README = """\
---
{metadata}---

# {title}

Where `{checkpoint}` would think, what it would think there, and what that brings the lines that follow. Made by
`ra3 play --push_to_space`; on a machine of your own the same page is

```bash
pip install '{requirement}'
ra3 play {words}
```
"""


@dataclass(frozen=True)
class SpacePush:
    """
    A Space for the page of a checkpoint.

    Args:
        repo_id (`str`):
            Space on the Hub, `"org/name"` or `"name"` under your own.
        private (`bool`, *optional*):
            Whether it is private if it is new; `None` is your organisation's default.
        requirement (`str`, *optional*):
            Where the Space gets this package from, as pip takes it; `None` is this version with its extra `play`.
        token (`str`, *optional*):
            A token with write permission; `None` is the one that you are logged in with.

    Raises:
        `ValueError`: for a `repo_id` that the Hub can't have.
    """

    repo_id: str
    private: bool | None = None
    requirement: str | None = None
    token: str | None = None

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(
                f"`push_to_space` is {self.repo_id!r}, no name of a Space; write ORG/NAME. ({error})"
            ) from error
        if self.requirement is not None and (not self.requirement.strip() or "\n" in self.requirement):
            raise ValueError(f"`requirement` is {self.requirement!r}; write one requirement as pip takes it.")

    def files(self, checkpoint: str, options: Sequence[str] = ()) -> dict[str, str]:
        """The Space's own files by name.

        Args:
            checkpoint (`str`):
                A Hub id; of a folder, [`upload`] puts its files beside these.
            options (`Sequence[str]`, *optional*):
                Further words of `ra3 play`.
        """
        place = _FOLDER if Path(checkpoint).is_dir() else checkpoint
        name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
        requirement = self.requirement or f"ra3-trl[play]=={metadata.version('ra3-trl')}"
        title = self.repo_id.split("/")[-1]
        card = {
            "title": title, "emoji": "💭", "colorFrom": "purple", "colorTo": "green", "sdk": "gradio",
            "sdk_version": GRADIO, "python_version": "3.12", "app_file": "app.py", "pinned": False,
            "short_description": "Where a model thinks, and what that brings",
        } | ({} if Path(checkpoint).is_dir() else {"models": [checkpoint]})  # fmt: skip
        words = ["play", place, *options]
        return {
            "app.py": _APP.format(words=json.dumps(words)),
            "requirements.txt": f"{requirement}\n",
            "README.md": _README.format(
                metadata=yaml.safe_dump(card, allow_unicode=True, sort_keys=False), title=title, checkpoint=name,
                requirement=requirement, words=shlex.join([name, *options]),
            ),
        }  # fmt: skip

    def upload(self, checkpoint: str, options: Sequence[str] = ()) -> str:
        """Makes the Space if it is not there and uploads everything in one commit; gives its address.

        Raises:
            `ValueError`: for an adapter whose base is a folder, and files with a token of this process in them.
        """
        local = Path(checkpoint) if Path(checkpoint).is_dir() else None
        if local is not None:
            _refuse_local_base(local)
        with TemporaryDirectory() as name:
            folder = Path(name)
            for file, content in self.files(checkpoint, options).items():
                (folder / file).write_text(content, "utf-8")
            if local is not None:
                (folder / _FOLDER).mkdir()
                for path in (path for path in local.iterdir() if path.is_file()):
                    (folder / _FOLDER / path.name).symlink_to(path.resolve())
            unwanted = [f"{_FOLDER}/{pattern}" for pattern in NOT_PUSHED if pattern != "*.bin"]
            unwanted.append(f"{_FOLDER}/training_args.bin")  # pickled, with tokens; other `.bin` may be weights
            ignored = check_upload(folder, process_tokens(token=self.token), unwanted)
            api = HfApi(token=self.token)
            place = api.create_repo(
                self.repo_id, repo_type="space", space_sdk="gradio", private=self.private, exist_ok=True
            )
            api.upload_folder(
                repo_id=place.repo_id, repo_type="space", folder_path=folder, ignore_patterns=ignored,
                commit_message="The page of ra3 play",
            )  # fmt: skip
            return str(place)


def _refuse_local_base(folder: Path) -> None:
    adapter = folder / "adapter_config.json"
    base = json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path") if adapter.is_file() else None
    if base is not None and Path(base).is_dir():
        raise ValueError(
            f"`checkpoint` is {str(folder)!r}, an adapter of the folder {base!r}, which a Space does not have; merge "
            "it, or push its base and name that in adapter_config.json."
        )
