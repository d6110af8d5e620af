"""`ActionFormat`: how a kind of text is cut into actions and what a latent looks like in it.

Another language, prose or tagged latents are other instances of it, not other code: only `segment` and the markers
differ, and nothing outside this room knows which one is in use. The paper tried Python only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ..kinds import checked
from .lines import Line, keep_text, segment_lines
from .markdown import segment_markdown, strip_markdown
from .prose import segment_prose, strip_asides
from .python import parses_as_python, segment_python, strip_python_comments
from .slashes import segment_slashes, strip_slashes


def _none_parses(text: str) -> bool:
    return False


@checked
@dataclass(frozen=True)
class ActionFormat:
    """Cuts text into actions and writes latents between them.

    Args:
        name (`str`):
            Name under which `RA3Config.action_format` finds it.
        segment (`Callable[[str], tuple[Line, ...] | None]`):
            Cuts a text into lines; `None` when the text is not of this format (it then gets plain next-token
            training).
        think (`str`):
            Marker that opens a latent, after the indentation (`"#"` on Python).
        end (`str`):
            What ends a latent: one ASCII character, or a special token of `tags`. Tokens that hold it are the stop
            symbol.
        strip (`Callable[[str, int], str]`, *optional*):
            Removes the expert's own comments from a text, from a character on. The default removes nothing.
        first (`str`, *optional*, defaults to `""`):
            Characters one of which must begin a latent; empty is any but white space alone.
        forbidden (`str`, *optional*, defaults to `""`):
            Characters that a latent never holds, besides control characters.
        forbidden_texts (`tuple[str, ...]`, *optional*, defaults to `()`):
            Texts that a latent never holds, such as what a compiler reads in a comment.
        parses (`Callable[[str], bool]`, *optional*):
            Whether a text that `segment` refuses is of the language all the same; it is then counted apart. The
            default says that none is.
        tags (`Mapping[str, tuple[str, ...]]`, *optional*):
            Special tokens of the format, `think` and `end`, each with the words whose mean embedding it begins as
            ([`~ra3_trl.models.add_tags`]). Empty where the markers are plain text.

    Raises:
        `ValueError`: for an `end` that tokens can't be told by, or tags other than `think` and `end`.
    """

    name: str
    segment: Callable[[str], tuple[Line, ...] | None]
    think: str
    end: str
    strip: Callable[[str, int], str] = keep_text
    first: str = ""
    forbidden: str = ""
    forbidden_texts: tuple[str, ...] = ()
    parses: Callable[[str], bool] = _none_parses
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tags and set(self.tags) != {self.think, self.end}:
            raise ValueError(
                f"`tags` of the action format {self.name!r} are {sorted(self.tags)}; they must be its `think` "
                f"({self.think!r}) and its `end` ({self.end!r})."
            )
        if not self.tags and (len(self.end) != 1 or not self.end.isascii()):
            raise ValueError(
                f"`end` of the action format {self.name!r} is {self.end!r}; use one ASCII character, which can't be "
                "spread over tokens, or special tokens (`tagged`)."
            )

    @property
    def forbidden_bytes(self) -> tuple[bytes, ...]:
        """What a latent never holds, characters and texts."""
        return tuple(text.encode() for text in (*self.forbidden, *self.forbidden_texts))

    def think_text(self, indent: str, carry: str, think: str | None = None) -> str:
        """Writes the think prefix where `indent` is expected and the boundary token already holds `carry`; `think` is
        a line's own marker. A tag stands alone, since a tokenizer reads it as one anywhere.

        >>> PYTHON.think_text("    ", carry="   ")
        ' #'
        """
        rest = indent[len(carry) :] if indent.startswith(carry) and not self.tags else ""
        return rest + (self.think if think is None else think)

    def close_text(self, carry: str) -> str:
        """Writes what ends a latent and gives the expert's next tokens the context they were tokenized in.

        The carry stands once more where the latent's end has begun a new line; a tag begins none, so that what stood
        before the latent still stands there.
        """
        return self.end if self.tags else self.end + carry


def _without_comments(segment: Callable[[str], tuple[Line, ...] | None], text: str) -> tuple[Line, ...] | None:
    lines = segment(text)
    return None if lines is None else tuple(replace(line, comment=False) for line in lines)


@checked
def tagged(
    base: ActionFormat, name: str, words: Sequence[str], think: str = "<think>", end: str = "</think>"
) -> ActionFormat:
    """Makes a format that is `base` with latents between two special tokens, in front of its lines.

    The expert's own comments are lines as any other, or stripped if asked. A text that holds the tags themselves is
    trained as it is, without latents. Latents are of one line: the end tag begins as the newline's embedding, so that
    a model ends a thought where it would have ended a line.

    Args:
        base ([`ActionFormat`]):
            What cuts the text.
        name (`str`):
            Name of the new format.
        words (`Sequence[str]`):
            Words whose mean embedding the opening tag begins as.
        think (`str`, *optional*, defaults to `"<think>"`), end (`str`, *optional*, defaults to `"</think>"`):
            The tags.
    """
    segment = partial(_without_comments, base.segment)
    return ActionFormat(
        name, segment, think, end, base.strip, parses=base.parses, tags={think: tuple(words), end: ("\n",)}
    )


# What Python itself reads in a comment: the encoding of the file on its first two rows (PEP 263; a program may begin
# anywhere, in a fence or behind a prompt, so it is forbidden everywhere), and types under `type_comments`.
PYTHON = ActionFormat(
    "python", segment_python, "#", "\n", strip_python_comments, parses=parses_as_python,
    forbidden_texts=("coding:", "coding=", "type:"),
)  # fmt: skip
# A comment begins with a space: `///` and `//!` are documentation in Rust, `//go:` and `//line` orders to a compiler.
# A backslash would carry it to the next line in C, as its trigraph `??/` may, and is read in Java's comments
# (`\u000a`). The other three are line ends in JavaScript or C#. The other texts are orders behind a space.
SLASHES = ActionFormat(
    "slashes", segment_slashes, "//", "\n", strip_slashes, first=" ", forbidden="\\\u0085\u2028\u2029",
    forbidden_texts=("??/", "+build", "@ts-", "swift-tools-version"),
)  # fmt: skip
# An aside holds no bracket and no line end, so that a reader finds where it began and ended.
PROSE = ActionFormat("prose", segment_prose, "[", "]", strip_asides, forbidden="[")
# Fenced code of both kinds, so that latents are what both take.
MARKDOWN = ActionFormat(
    "markdown", segment_markdown, "#", "\n", strip_markdown, SLASHES.first, SLASHES.forbidden,
    PYTHON.forbidden_texts + SLASHES.forbidden_texts,
)  # fmt: skip
TAGS = tagged(ActionFormat("lines", segment_lines, "", "\n"), "tags", ("think", "reason"))
PYTHON_TAGS = tagged(PYTHON, "python_tags", ("#",))
ACTION_FORMATS = {f.name: f for f in (PYTHON, SLASHES, PROSE, MARKDOWN, TAGS, PYTHON_TAGS)}


def find_format(name: str) -> ActionFormat:
    """Looks up the action format called `name`.

    Raises:
        `ValueError`: if there is none.
    """
    if name not in ACTION_FORMATS:
        raise ValueError(
            f"`action_format` is {name!r}; use one of {', '.join(map(repr, ACTION_FORMATS))}, or register your own: "
            f"`ACTION_FORMATS[{name!r}] = ActionFormat(...)`."
        )
    return ACTION_FORMATS[name]
