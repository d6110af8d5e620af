"""Generated text without its latents."""

from __future__ import annotations

import re

from ..kinds import checked
from ..segmentation import find_format, statements_end


@checked
def strip_latents(text: str, action_format: str = "python") -> str:
    """Removes the latents of `text`; code that parses keeps its AST.

    **Every own-line comment goes**, ordinary ones and those of a prompt too: a latent is a comment, and nothing tells
    one from the other. Strings and comments behind code stay. Of a tagged format the tags go with what stands between
    them, and comments stay; decode such text with `skip_special_tokens=False`, which keeps the tags.

    Args:
        text (`str`):
            A program, or the beginning of one. Of a text cut in the middle of a statement, the longest run of whole
            rows from its start that can be read is stripped, and the rest kept as it is.
        action_format (`str`, *optional*, defaults to `"python"`):
            Name of the format.

    Returns:
        `str`: the text that is left.

    Raises:
        `ValueError`: for an unknown format.

    Example:

    ```python
    >>> strip_latents("def f(x):\\n    # twice\\n    return 2 * x\\n")
    'def f(x):\\n    return 2 * x\\n'
    ```
    """
    format_ = find_format(action_format)
    if format_.tags:
        return re.sub(rf"{re.escape(format_.think)}[^\n]*?(?:{re.escape(format_.end)}|\Z)", "", text)
    end = readable_end(text, action_format)
    return format_.strip(text[:end], 0) + text[end:]


def readable_end(text: str, action_format: str = "python") -> int:
    """Finds where the longest run of whole rows from the start that can be read ends: the text's length, if all can,
    0 if none."""
    format_ = find_format(action_format)
    # By the rows from the end, a text that can't be read would be read as often as it has rows.
    end = statements_end(text) if action_format == "python" else len(text)
    while end and format_.segment(text[:end]) is None:
        end = text.rfind("\n", 0, end - 1) + 1
    return end
