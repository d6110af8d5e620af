"""Files that travel beside a checkpoint: found in a folder or on the Hub, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


_STALE = ("model*.safetensors", "model.safetensors.index.json", "adapter_*", "abstraction_*", "pytorch_model*.bin*")
_STALE += ("training_args.bin",)


def find_file(name: str, filename: str, **place: Any) -> Path | None:
    """A file of a folder or of a Hub repository, `None` where it has none.

    Args:
        name (`str`):
            Folder or Hub id.
        filename (`str`):
            The file.
        **place:
            `revision`, `subfolder`, `token`, `cache_dir` and `local_files_only`, as `from_pretrained` takes them.

    Raises:
        `OSError`: if the repository can't be reached and nothing of the revision is in the cache.
    """
    if Path(name).is_dir():
        path = Path(name, place.get("subfolder") or "", filename)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, filename, **place))
    except LocalEntryNotFoundError as error:  # offline: where the revision is in the cache, this file is not in it
        if _is_cached(name, place):
            return None
        raise OSError(
            f"{name!r} is no folder, and it is not in the cache while the Hub can't be reached; go online once or "
            f"give a folder. ({error})"
        ) from error
    except EntryNotFoundError:
        return None


def _is_cached(name: str, place: dict[str, Any]) -> bool:
    for filename in ("config.json", "adapter_config.json"):
        try:
            hf_hub_download(name, filename, **place | {"local_files_only": True})
        except EntryNotFoundError:
            continue
        return True
    return False


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A new folder to write a checkpoint into; its files go to `folder` when all of them are there.

    What fails on the way leaves `folder` as it was. Weights, heads and pickles (`training_args.bin` holds a token) in
    `folder` that the new checkpoint does not have are removed, other files stay.

    Raises:
        `ValueError`: if `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"`save_directory` is {str(folder)!r}, which is a file; give a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield aside
        folder.mkdir(exist_ok=True)
        new = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
        stale = {path for pattern in _STALE for path in folder.glob(pattern)} - {folder / path for path in new}
        for path in new:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / path, folder / path)
        for path in stale:
            path.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
