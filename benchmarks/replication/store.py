"""Results by the hash of their recipe: what was done is not done again, and a killed run goes on.

An entry is a folder `<kind>-<hash>` with `recipe.json`, which anyone can read; what the work leaves there, such as a
checkpoint; and `result.json`, written last, aside and renamed. An entry without it is unfinished and is gone on with.
Only one process works on an entry at a time (`flock`, which a killed process lets go of).
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def described(recipe: Any) -> dict[str, Any]:
    """The recipe as plain values: its kind, all fields, and recursively those of the recipes it starts from."""
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    plain = {k: described(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}
    return {"kind": type(recipe).__name__, **plain}


def _told(recipe: Any) -> dict[str, Any]:
    """As `described`, without fields at their defaults, so that a new field does not throw away what was done."""
    default = {f.name: f.default for f in dataclasses.fields(recipe) if f.default is not dataclasses.MISSING}
    default |= {
        f.name: f.default_factory() for f in dataclasses.fields(recipe) if f.default_factory is not dataclasses.MISSING
    }
    found = {"kind": type(recipe).__name__, "version": recipe.version}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name not in default or value != default[field.name]:
            found[field.name] = _told(value) if dataclasses.is_dataclass(value) else value
    return found


def recipe_hash(recipe: Any) -> str:
    """Twelve hexadecimal digits of a frozen record. Who changes a default raises the recipe's `version`."""
    text = json.dumps(_told(recipe), sort_keys=True)  # infinity is written as such
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Store:
    """Entries in a folder.

    Args:
        root (`str` or `Path`):
            The folder; made when it is not there.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()

    def folder(self, recipe: Any) -> Path:
        return self.root / f"{type(recipe).__name__.lower()}-{recipe_hash(recipe)}"

    def find(self, recipe: Any) -> dict[str, Any] | None:
        """The result, or `None` where there is none yet."""
        path = self.folder(recipe) / "result.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def get(self, recipe: Any, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The result; `work(folder)` makes it where there is none, and goes on with what it finds in the folder.

        Raises:
            `ValueError`: if a number of the result is not finite: a run that diverged is no result to keep.
        """
        folder = self.folder(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.find(recipe)
            if found is None:
                _write(folder / "recipe.json", described(recipe))
                found = json.loads(json.dumps(work(folder)))  # what a later run will read
                wrong = [
                    name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)
                ]
                if wrong:
                    raise ValueError(f"`{folder.name}` gave {wrong} that are not finite; look at its log there.")
                _write(folder / "result.json", found)
        return found

    def entries(self, kind: type) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """Recipe and result (or `None`) of all entries of a kind, by name."""
        for folder in sorted(self.root.glob(f"{kind.__name__.lower()}-*")):
            if (folder / "recipe.json").exists():
                result = folder / "result.json"
                yield (
                    json.loads((folder / "recipe.json").read_text("utf-8")),
                    json.loads(result.read_text("utf-8")) if result.exists() else None,
                )


def _write(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", "utf-8")
    os.replace(aside, path)
