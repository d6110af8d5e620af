"""`ActionFormat`: how a kind of text is cut into actions and what a latent looks like in it.

Another language, prose or tagged latents are other instances of it, not other code: only `segment` and the markers
differ, and nothing outside this room knows which one is in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .python import Line, segment_python, strip_python_comments


@dataclass(frozen=True)
class ActionFormat:
    """A way to cut text into actions and to write latents between them.

    Args:
        name (`str`):
            Name under which `RA3Config.action_format` finds it.
        segment (`Callable[[str], tuple[Line, ...] | None]`):
            Cuts a text into lines; `None` when the text is not of this format (it then gets plain next-token
            training).
        think (`str`):
            Marker that opens a latent, after the indentation (`"#"` on Python).
        end (`str`):
            What ends a latent. Tokens that hold it are the stop symbol.
        strip (`Callable[[str, int], str]`):
            Removes the expert's own comments from a text, from a character on.
    """

    name: str
    segment: Callable[[str], tuple[Line, ...] | None]
    think: str
    end: str
    strip: Callable[[str, int], str]

    def think_text(self, indent: str, carry: str) -> str:
        """Text of the think prefix where `indent` is expected and the boundary token already holds `carry`.

        Example: `think_text("    ", "   ") == " #"`.
        """
        rest = indent[len(carry) :] if indent.startswith(carry) else ""
        return rest + self.think

    def close_text(self, carry: str) -> str:
        """Text that ends a latent and gives the expert's next tokens the context they were tokenized in."""
        return self.end + carry


PYTHON = ActionFormat("python", segment_python, "#", "\n", strip_python_comments)
ACTION_FORMATS = {PYTHON.name: PYTHON}
