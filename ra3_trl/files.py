"""Files: found in a folder or on the Hub, read with care and their version, and written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Any, Union, get_args, get_origin

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError


_ASIDE = "_incomplete-"  # what begins with `_` is never pushed
# What an older checkpoint may have left, by the weights of the new one.
_BESIDE = ("adapter_*", "abstraction_*", "training_args.bin")
_WEIGHTS = ("*.safetensors", "*.bin")
_STALE = {"model": ("model*.safetensors*", "pytorch_model*.bin*", *_BESIDE), "adapter_model": _BESIDE}


def find_file(name: str, filename: str, **place: Any) -> Path | None:
    """Finds a file of the folder or Hub repository `name`; `None` where it has none.

    `place` may have `revision`, `subfolder`, `token`, `cache_dir` and `local_files_only`, as `from_pretrained` takes
    them.

    Raises:
        `OSError`: if the repository can't be reached and nothing of the revision is in the cache.
    """
    if Path(name).is_dir():
        path = Path(name, place.get("subfolder") or "", filename)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, filename, **place))
    except LocalEntryNotFoundError as error:
        # Offline, a file that the repository lacks looks like one that nobody asked for; the cache tells them apart.
        cache = {key: place[key] for key in ("cache_dir", "revision") if place.get(key)}
        if try_to_load_from_cache(name, filename, **cache) is _CACHED_NO_EXIST:
            return None
        raise OSError(
            f"{filename} of {name!r} is not in the cache, and the Hub can't be reached; go online once, so that it is "
            f"known what the repository has, or give a folder. ({error})"
        ) from error
    except EntryNotFoundError:
        return None


def fingerprint(name: str | Path, **place: Any) -> str:
    """Tells the weights of a folder or Hub repository from others, without reading them; `place` as for [`find_file`].

    Raises:
        `ValueError`: if there are no weights.
    """
    if Path(name).is_dir():
        paths = sorted(path for pattern in _WEIGHTS for path in Path(name).glob(pattern))
        if not paths:
            raise ValueError(f"{str(name)!r} is a folder without weights ({', '.join(_WEIGHTS)}).")
        # A folder's weights have no name of their own, unlike a commit of the Hub: files' names, sizes and times do.
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    for filename in ("config.json", "adapter_config.json"):
        if path := find_file(str(name), filename, **place):
            return path.parent.name  # snapshots/COMMIT
    raise ValueError(f"{name!r} has neither config.json nor adapter_config.json on the Hub.")


def public_name(name: str) -> str:
    """`name`, or names with commas, and of each path its last part: where it lay on a machine is nobody's business,
    nor who may read an address.

    Example: `public_name("org/code, ../clients/acme, https://me:secret@host/x") == "org/code, acme, https://host/x"`.
    """
    parts = [name] if os.path.exists(name) else name.split(",")
    return ", ".join(_last_part(part.strip()) for part in parts)


def _last_part(name: str) -> str:
    if "://" in name and not name.startswith("file:"):
        return re.sub(r"(?<=://)[^/@]*@", "", name)
    # `os.path`'s, since `Path.exists` raises where a name is too long for a file.
    if not (re.match(r"[/\\.~]|file:|[A-Za-z]:[/\\]", name) or os.path.exists(name)):
        return name
    last = re.split(r"[/\\]", name.removeprefix("file:").rstrip("/\\"))[-1]
    return "a folder" if last in ("", ".", "..") or last.startswith("~") else last


# What a file that is not what it was makes readers raise. Not all `ValueError`s: ours name the file already.
_SURPRISES = (ArithmeticError, AttributeError, LookupError, RecursionError, SafetensorError, TypeError, UnicodeError)
DAMAGE = (*_SURPRISES, ValueError)


def one_line(error: object, most: int = 300) -> str:
    """The message of an error on one line; what was read may stand in it, however long."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[:most]}..."


@contextmanager
def naming(path: str | Path, cure: str, *more: type[Exception]) -> Iterator[None]:
    """Names the file of which something is read inside, if it is not what it was.

    Raises:
        `ValueError`: for what a damaged file makes readers raise, and `more` errors, with the `cure`.
    """
    try:
        yield
    except (*_SURPRISES, *more) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {one_line(error)}); {cure}.") from error


def parse_json(text: str | bytes, where: str, cure: str = "correct it") -> Any:
    """Parses JSON that stands in `where`.

    Raises:
        `ValueError`: for what is no JSON, no UTF-8, nested too deep or a number of thousands of digits.
    """
    try:
        content = json.loads(text)
        if "\\ud" in (text if isinstance(text, str) else text.decode("utf-8", "ignore")).lower():
            json.dumps(content, ensure_ascii=False).encode()  # halves of a character are no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({one_line(error)}); {cure}.") from error
    return content


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file that are not blank, each with words that say where it stands.

    They end at newlines only: `splitlines` also cuts at separators (U+2028) that may stand within JSON's texts.

    Raises:
        `ValueError`: for what is not UTF-8.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); convert it first.") from error
    return [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def is_a(value: Any, hint: Any) -> bool:
    """Whether what JSON gave is what a type hint says; a whole number will do for a `float`.

    >>> is_a({"a": [1, 2.5]}, dict[str, list[float]]), is_a(True, int), is_a(None, str | None)
    (True, False, True)
    """
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (UnionType, Union):
        return any(is_a(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(is_a(element, parts[0]) for element in value)
    if kind is dict:
        return isinstance(value, dict) and all(is_a(k, parts[0]) and is_a(v, parts[1]) for k, v in value.items())
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    return kind is Any or isinstance(value, kind)


def require_form(content: Any, form: Mapping[str, Any]) -> None:
    """Checks the values of a mapping against type hints by name; what else it has is let be.

    Raises:
        `TypeError`, `KeyError`: naming the field that is missing or of another type.
    """
    for name, hint in form.items():
        if not is_a(content[name], hint):
            raise TypeError(f"`{name}` is {one_line(repr(content[name]), 80)}")


@contextmanager
def read_versioned(path: Path, name: str, newest: int, cure: str) -> Iterator[dict[str, Any]]:
    """The JSON object of a file of `name` whose `version` (1 if it says none) is at most `newest`, to be read inside.

    Raises:
        `ValueError`: for a newer version, and for what is damaged or lacks what is looked for inside, with the `cure`.
    """
    where = f"{path.name} of {name!r}"
    content = parse_json(path.read_bytes(), where, cure)
    with naming(where, cure):
        if not is_a(content.setdefault("version", 1), int):
            raise TypeError(f"`version` is {one_line(repr(content['version']), 80)}")
        if content["version"] > newest:
            raise ValueError(
                f"{where} is of version {content['version']}, and this ra3-trl reads up to {newest}; upgrade ra3-trl."
            )
        yield content


@contextmanager
def renamed_into_place(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder to; it is renamed to `path` when the block ends without an error.

    So `path` is the whole of it or what it was before. A file that is there is replaced, a folder with anything in it
    never (`OSError`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=_ASIDE, dir=path.parent, ignore_cleanup_errors=True) as aside:
        yield Path(aside, path.name)
        os.replace(Path(aside, path.name), path)


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file by [`renamed_into_place`]."""
    with renamed_into_place(path) as aside:
        aside.write_bytes(content)


# A full disk, a quota, the largest size of a file, a broken disk, one that is read only. safetensors, tokenizers and
# torch say it in words of their own.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_FULL_WORDS = re.compile(rf"os error ({'|'.join(map(str, _FULL))})\b|inline_container|PytorchStreamWriter")


@contextmanager
def saying_what_is_full(path: str | Path, cure: str) -> Iterator[None]:
    """Says where there is no room for what is written inside.

    Raises:
        `OSError`: in the place of the errors of a full disk, with the `cure`; others pass.
    """

    def say(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or (number is None and error is not None and _FULL_WORDS.search(str(error))):
            raise OSError(number or errno.ENOSPC, f"{path} can't be written ({one_line(error)}); {cure}") from error
        return False

    with ExitStack() as stack:
        stack.push(say)  # by its words, since tokenizers has no class of errors of its own
        yield


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A new folder to write a checkpoint into; its files go to `folder` when all of them are there.

    Unlike [`renamed_into_place`] it adds to a folder: what fails while files are written leaves `folder` as it was;
    then they are renamed one after the other. Weights, heads and pickles (`training_args.bin` holds a token) in
    `folder` that the new checkpoint does not have are removed, other files stay, and so does a card. The weights
    beside an adapter may be its base's: they stay too.

    Raises:
        `ValueError`: if `folder` is a file.
    """
    folder = Path(folder).resolve()  # a link may lead to another file system, onto which nothing can be renamed
    if folder.is_file():
        raise ValueError(f"`save_directory` is {str(folder)!r}, which is a file; give a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    near = folder if folder.is_mount() else folder.parent
    with TemporaryDirectory(prefix=_ASIDE, dir=near, ignore_cleanup_errors=True) as name:
        aside = Path(name)
        with saying_what_is_full(folder, "free some room there, or save elsewhere"):
            yield aside
        folder.mkdir(exist_ok=True)
        new = {path.relative_to(aside) for path in aside.rglob("*") if path.is_file()}
        if (folder / "README.md").exists():
            new.discard(Path("README.md"))
        kinds = [kind for kind in _STALE if any(path.name.startswith(kind) for path in new)]
        stale = {path for kind in kinds for pattern in _STALE[kind] for path in folder.glob(pattern) if path.is_file()}
        # New files before old ones go: a kill in between leaves too much, not too little.
        for path in sorted(new):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / path, folder / path)
        for path in stale - {folder / path for path in new}:
            path.unlink()
