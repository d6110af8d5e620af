"""The manifest of a corpus that is annotated in shards: what all of them share, and which of them are finished.

A shard is finished when it has its entry, which it gets after its file has its name. So whatever is killed, a file
that `datasets` reads is whole, and what has no entry is done again, with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from ..files import read_versioned
from ..policy import Policy


MANIFEST = "manifest.json"
_VERSION = 1
# Hidden, so that neither `datasets` nor the Hub's client takes what is in it.
_ASIDE = ".incomplete"
_CURE = "remove the folder and annotate anew"


@dataclass(frozen=True)
class ShardEntry:
    """
    What the manifest says of a finished shard.

    Args:
        shard (`int`), first_row (`int`), rows_in (`int`), rows_out (`int`):
            Its number; its rows in the corpus, from which on and how many; how many are in its file.
        latents (`int`), boundaries (`int`), tokens (`int`), licenses (`dict[str, int]`):
            Counts of what is in it; tokens with those of the latents, rows by licence.
        seconds (`float`), bytes (`int`):
            How long it took, how large its file is.
        rows_hash (`str`), settings_hash (`str`), checkpoint_hash (`str`):
            Of the rows it was made of, of the settings and of the weights and the tokenizer.
        left_out (`list[int]`):
            Rows that could not be annotated.
    """

    shard: int
    first_row: int
    rows_in: int
    rows_out: int
    latents: int
    boundaries: int
    tokens: int
    licenses: dict[str, int]
    seconds: float
    bytes: int
    rows_hash: str
    settings_hash: str
    checkpoint_hash: str
    left_out: list[int] = field(default_factory=list)

    @property
    def file(self) -> str:
        """Name of its file."""
        return shard_file(self.shard)


@dataclass(frozen=True)
class Origin:
    """
    What all shards of a corpus share; another one in the same folder is refused.

    Args:
        settings (`dict[str, Any]`):
            All that shapes what is written but the weights, as JSON has it.
        checkpoint (`str`), checkpoint_hash (`str`):
            Public name of the checkpoint; [`checkpoint_hash`] of it.
        source (`str`), rows (`int`, *optional*), shard_rows (`int`):
            Public name of the corpus, its rows (`None` for a stream), rows of a shard.
        form (`str`, *optional*, defaults to `"text"`):
            What is written: `"text"`, or `"tokens"`, a row for each chunk of a text.
    """

    settings: dict[str, Any]
    checkpoint: str
    checkpoint_hash: str
    source: str
    rows: int | None
    shard_rows: int
    form: str = "text"

    @property
    def settings_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def shard_file(shard: int) -> str:
    """Names the file of a shard: `train-000003.parquet`."""
    return f"train-{shard:06d}.parquet"


def checkpoint_hash(policy: Policy) -> str:
    """Tells weights, head and tokenizer from others by what they hold: a copy elsewhere is the same checkpoint."""
    return weights_hash((policy.model, *(() if policy.head is None else (policy.head.head,))), policy.tokenizer)


def weights_hash(modules: Sequence[torch.nn.Module], tokenizer: PreTrainedTokenizerBase) -> str:
    """Tells the weights of modules, and a tokenizer, from others by what they hold."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


class Manifest:
    """
    The file beside the shards that says which are finished; processes and jobs that share a folder change it in turns.

    Args:
        folder (`Path`):
            Where the shards are, made if it is not there.
        origin ([`Origin`]):
            What all shards share.

    Raises:
        `ValueError`: if the folder has shards of another origin, naming what differs, or is another folder.
    """

    def __init__(self, folder: Path, origin: Origin):
        self.folder, self.origin = folder, origin
        if folder.exists() and not (folder / MANIFEST).exists() and any(p.name != _ASIDE for p in folder.iterdir()):
            raise ValueError(
                f"`output_dir` is {str(folder)!r}, which is there already and has no {MANIFEST}; remove it or name "
                "another folder."
            )
        (folder / _ASIDE).mkdir(parents=True, exist_ok=True)
        with self._changed() as content:
            if "settings" in content:
                self._compare(content)
            else:
                content |= asdict(origin) | {"settings_hash": origin.settings_hash}

    def _compare(self, content: dict[str, Any]) -> None:
        other = f"`output_dir` {str(self.folder)!r} has shards of"
        theirs, ours = content["settings"], json.loads(json.dumps(self.origin.settings))
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"{other} `{name}` {theirs.get(name)!r}, and now it is {ours.get(name)!r}; set it as it was, or "
                    "name another `output_dir`."
                )
        for name in ("source", "rows", "shard_rows", "form"):
            if content[name] != (now := getattr(self.origin, name)):
                raise ValueError(
                    f"{other} a corpus whose `{name}` is {content[name]!r}, and now it is {now!r}; give the corpus as "
                    "it was, or name another `output_dir`."
                )
        if content["checkpoint_hash"] != self.origin.checkpoint_hash:
            raise ValueError(
                f"{other} the checkpoint {content['checkpoint']!r} with the hash {content['checkpoint_hash']}, and "
                f"{self.origin.checkpoint!r} has {self.origin.checkpoint_hash}: weights or tokenizer have changed. "
                "Give the checkpoint as it was, or name another `output_dir`."
            )

    def _read(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.exists():
            return {"version": _VERSION, "shards": [], "failed": {}}
        with read_versioned(path, str(self.folder), _VERSION, _CURE) as content:
            # What lacks one of these is damaged.
            content |= {name: content[name] for name in ("failed", *Origin.__dataclass_fields__)}
            for entry in content["shards"]:
                ShardEntry(**{name: value for name, value in entry.items() if name not in ("file", "pushed")})
            return content

    @contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        with self.lock("manifest"):
            content = self._read()
            yield content
            content["shards"].sort(key=lambda entry: entry["shard"])
            for name in ("rows_in", "rows_out", "latents", "boundaries", "tokens", "seconds"):
                content[name] = round(sum(entry[name] for entry in content["shards"]), 3)
            text = json.dumps(content, indent=1) + "\n"
            self.write(MANIFEST, lambda path: path.write_text(text, "utf-8"))

    def lock(self, name: str) -> FileLock:
        """A lock that all who write to the folder share."""
        return FileLock(self.folder / _ASIDE / f"{name}.lock")

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Lets `write` make a file aside, which then gets its name in the folder."""
        aside = self.folder / _ASIDE / f"{name.partition('.')[0]}.{uuid4().hex}"  # no name that a reader looks for
        try:
            write(aside)
            os.replace(aside, self.folder / name)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def finished(self) -> dict[int, ShardEntry]:
        """Entries of the shards whose files are there as they were written, by number."""
        entries = {}
        for values in self._read()["shards"]:
            entry = ShardEntry(**{name: value for name, value in values.items() if name not in ("file", "pushed")})
            path = self.folder / entry.file
            if path.is_file() and path.stat().st_size == entry.bytes:
                entries[entry.shard] = entry
        return entries

    def add(self, entry: ShardEntry) -> None:
        """Enters a shard whose file is in its place."""
        with self._changed() as content:
            others = [other for other in content["shards"] if other["shard"] != entry.shard]
            content["shards"] = [*others, {"file": entry.file, **asdict(entry), "pushed": None}]
            content["failed"].pop(str(entry.shard), None)

    def failed(self) -> dict[int, str]:
        """What is wrong with shards that were given up, by number."""
        return {int(shard): message for shard, message in self._read()["failed"].items()}

    def fail(self, shard: int, message: str) -> None:
        """Notes why a shard was given up."""
        with self._changed() as content:
            content["failed"][str(shard)] = message

    def forgive(self, shards: Callable[[int], bool]) -> None:
        """Forgets what was wrong with these shards: they are tried anew."""
        with self._changed() as content:
            content["failed"] = {n: why for n, why in content["failed"].items() if not shards(int(n))}

    def unpushed(self) -> tuple[list[int], float | None]:
        """Finished shards that are not on the Hub, and when a shard was last pushed, in seconds since 1970."""
        shards = self._read()["shards"]
        times = [entry["pushed"] for entry in shards if entry["pushed"] is not None]
        return [entry["shard"] for entry in shards if entry["pushed"] is None], max(times, default=None)

    def pushed(self, shards: Iterable[int]) -> None:
        """Notes that these are on the Hub now."""
        now, numbers = round(time.time(), 3), set(shards)
        with self._changed() as content:
            for entry in content["shards"]:
                entry["pushed"] = now if entry["shard"] in numbers else entry["pushed"]

    def licenses(self) -> dict[str, int]:
        """Rows by licence, the most frequent first."""
        total: Counter[str] = Counter()
        for entry in self.finished().values():
            total.update(entry.licenses)
        return dict(total.most_common())

    def clean(self) -> None:
        """Deletes what killed processes left half written; nobody may write any more."""
        for path in (self.folder / _ASIDE).iterdir():
            if path.suffix != ".lock":
                path.unlink(missing_ok=True)
