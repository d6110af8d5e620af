"""Files that travel beside a checkpoint: found in a folder or on the Hub, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


# What an older checkpoint may have left, by the weights of the new one.
_BESIDE = ("adapter_*", "abstraction_*", "training_args.bin")
_WEIGHTS = ("*.safetensors", "*.bin")
_STALE = {"model": ("model*.safetensors*", "pytorch_model*.bin*", *_BESIDE), "adapter_model": _BESIDE}


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
    except LocalEntryNotFoundError as error:
        known = {key: place[key] for key in ("cache_dir", "revision") if place.get(key)}
        if try_to_load_from_cache(name, filename, **known) is _CACHED_NO_EXIST:
            return None
        raise OSError(
            f"{filename} of {name!r} is not in the cache, and the Hub can't be reached; go online once, so that it is "
            f"known what the repository has, or give a folder. ({error})"
        ) from error
    except EntryNotFoundError:
        return None


def fingerprint(name: str | Path, **place: Any) -> str:
    """Tells a checkpoint's weights from others without reading them: a folder's by their files' names, sizes and
    times, those of the Hub by their commit.

    Args:
        name (`str` or `Path`):
            Folder or Hub id.
        **place:
            As for [`find_file`].

    Raises:
        `ValueError`: if there are no weights.
    """
    if Path(name).is_dir():
        weights = sorted(p for pattern in _WEIGHTS for p in Path(name).glob(pattern))
        found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weights]
        if not found:
            raise ValueError(f"{str(name)!r} is a folder without weights ({', '.join(_WEIGHTS)}).")
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]
    for filename in ("config.json", "adapter_config.json"):
        if path := find_file(str(name), filename, **place):
            return path.parent.name  # snapshots/COMMIT
    raise ValueError(f"{name!r} has neither config.json nor adapter_config.json on the Hub.")


def public_name(name: str) -> str:
    """`name`, or names with commas, and of each path its last part: where it lay on a machine is nobody's business.

    Example: `public_name("org/code, ../clients/acme") == "org/code, acme"`.
    """
    parts = [name] if os.path.exists(name) else name.split(",")
    return ", ".join(_last_part(part.strip()) for part in parts)


def _last_part(name: str) -> str:
    # `os.path`'s, since `Path.exists` raises where a name is too long for a file.
    if not (re.match(r"[/\\.~]|file:|[A-Za-z]:[/\\]", name) or os.path.exists(name)):
        return name
    last = re.split(r"[/\\]", name.removeprefix("file:").rstrip("/\\"))[-1]
    return "a folder" if last in ("", ".", "..") or last.startswith("~") else last


@contextmanager
def read_versioned(path: Path, name: str, newest: int, cure: str) -> Iterator[dict[str, Any]]:
    """The JSON object of a file of `name` whose `version` (1 if it says none) is at most `newest`, to be read inside.

    Raises:
        `ValueError`: for a newer version, and for what is damaged or lacks what is looked for inside, with the `cure`.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.setdefault("version", 1) > newest:
            raise ValueError(
                f"{path.name} of {name!r} is of version {content['version']}, and this ra3-trl reads up to {newest}; "
                "upgrade ra3-trl."
            )
        yield content
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} of {name!r} is damaged ({error!r}); {cure}.") from error


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A new folder to write a checkpoint into; its files go to `folder` when all of them are there.

    What fails while they are written leaves `folder` as it was; then they are renamed one after the other. Weights,
    heads and pickles (`training_args.bin` holds a token) in `folder` that the new checkpoint does not have are
    removed, other files stay, and so does a card. The weights beside an adapter may be its base's: they stay too.

    Raises:
        `ValueError`: if `folder` is a file.
    """
    folder = Path(folder).resolve()  # a link may lead to another file system, onto which nothing can be renamed
    if folder.is_file():
        raise ValueError(f"`save_directory` is {str(folder)!r}, which is a file; give a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    near = folder if folder.is_mount() else folder.parent
    aside = Path(tempfile.mkdtemp(prefix="_incomplete-", dir=near))  # what begins with `_` is never pushed
    try:
        yield aside
        folder.mkdir(exist_ok=True)
        new = {path.relative_to(aside) for path in aside.rglob("*") if path.is_file()}
        if (folder / "README.md").exists():
            new.discard(Path("README.md"))
        has = [kind for kind in _STALE if any(path.name.startswith(kind) for path in new)]
        stale = {path for kind in has for pattern in _STALE[kind] for path in folder.glob(pattern) if path.is_file()}
        stale -= {folder / path for path in new}
        for path in sorted(new):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / path, folder / path)
        for path in stale:
            path.unlink()
    finally:
        shutil.rmtree(aside, ignore_errors=True)
