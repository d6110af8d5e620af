"""What must not leave the machine with an upload: the tokens that this process knows, and files that hold such."""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import get_token
from huggingface_hub.utils import filter_repo_objects


_NAMES = (
    ".env", ".env.*", "*.env", ".envrc", "token", "*.token", "stored_tokens", ".netrc", "_netrc", ".git-credentials",
    ".npmrc", ".pypirc", "*.pem", "*.key", "*.p12", "id_rsa", "id_ecdsa", "id_ed25519", "credentials",
    "credentials.json", "secrets.*", ".htpasswd",
)  # fmt: skip
# What is left out of an upload unless somebody names it, in a folder of any depth.
PRIVATE_FILES = [pattern for name in _NAMES for pattern in (name, f"*/{name}")]
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|PWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL")
_LEAST = 8  # characters; a shorter value stands in any text


def process_tokens(**places: Any) -> dict[str, str]:
    """The secrets that this process knows, each with the place where it is from.

    From variables of the environment whose names say so, the login of the Hub, and `places`: texts, or dictionaries
    with a `token`, by the name that a message gives them.
    """
    tokens = {
        value: f"the environment's {name}" for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())
    }
    tokens[get_token() or ""] = "the login of the Hub"
    for place, value in places.items():
        token = value.get("token") if isinstance(value, Mapping) else value
        tokens[token if isinstance(token, str) else ""] = f"`{place}`"
    # A path or a word such as `true` is no secret.
    return {t: place for t, place in tokens.items() if len(t) >= _LEAST and not re.search(r"\s|^[./~]|^[a-z]+$", t)}


def token_in(content: bytes | mmap.mmap, tokens: Mapping[str, str]) -> str | None:
    """The place of the first of `tokens` that stands in `content`, as it is, percent-encoded or as JSON writes it."""
    for token, place in tokens.items():
        forms = {token, quote(token, safe=""), json.dumps(token)[1:-1]}
        if any(content.find(form.encode()) >= 0 for form in forms):
            return place
    return None


def check_upload(folder: str | Path, tokens: Mapping[str, str], ignore_patterns: Iterable[str] = ()) -> list[str]:
    """The patterns of what must be left out of an upload of `folder`, `ignore_patterns` among them.

    Raises:
        `ValueError`: if a file that would leave holds one of `tokens`; it names the file and the token's place.
    """
    patterns = [*ignore_patterns, *PRIVATE_FILES]
    names = (str(path.relative_to(folder)) for path in sorted(Path(folder).rglob("*")) if path.is_file())
    for name in filter_repo_objects(names, ignore_patterns=patterns):
        with open(Path(folder, name), "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:  # weights are large
                if place := token_in(content, tokens):
                    raise ValueError(
                        f"{Path(folder, name)} holds {place}, and would be uploaded; take it out of the file. Nothing "
                        "was uploaded."
                    )
    return patterns
