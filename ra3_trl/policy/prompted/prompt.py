"""The prompt: a file that users replace."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


DEFAULT = Path(__file__).with_name("prompt.txt")
_TEXT = "{text}"
_MOST = 100_000  # bytes of a prompt's file


@dataclass(frozen=True)
class Prompt:
    """A prompt with `{text}` in it, once, where the numbered lines stand.

    Raises:
        `ValueError`: if it has none, or several.
    """

    template: str

    def __post_init__(self) -> None:
        if (count := self.template.count(_TEXT)) != 1:
            raise ValueError(
                f"`prompt` has {_TEXT} {count} times; write it once, where the text with its numbered lines is to "
                "stand."
            )

    @classmethod
    def read(cls, path: str | Path = DEFAULT) -> Prompt:
        """Reads a file, the one of this package unless said otherwise.

        Raises:
            `ValueError`: if it can't be read, is longer than 100,000 bytes, or lacks `{text}`.
        """
        try:
            with open(path, "rb") as file:
                data = file.read(_MOST + 1)
            if len(data) > _MOST:
                raise ValueError(f"it is longer than {_MOST:,} bytes")
            template = data.decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise ValueError(f"`prompt` is {str(path)!r}, which is no file of text in UTF-8 ({error}).") from error
        return cls(template.strip())

    @cached_property
    def digest(self) -> str:
        """Tells it from others."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]

    def __call__(self, text: str) -> str:
        """Writes the prompt for a text.

        >>> Prompt("Say: {text}")("x = {text}\\ny")
        'Say: 1 | x = {text}\\n2 | y'
        """
        before, after = self.template.split(_TEXT)
        rows = text.split("\n")
        rows = rows[:-1] if rows[-1] == "" else rows
        return before + "\n".join(f"{number} | {row}".rstrip() for number, row in enumerate(rows, 1)) + after
