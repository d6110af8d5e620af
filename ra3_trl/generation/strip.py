"""Generated text without its latents."""

from __future__ import annotations

import re

from ..segmentation import ActionFormat, find_format, statements_end


def strip_latents(text: str, action_format: str = "python") -> str:
    """`text` without latents; code that parses keeps its AST.

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
    found = find_format(action_format)
    if found.tags:
        return re.sub(rf"{re.escape(found.think)}[^\n]*?(?:{re.escape(found.end)}|\Z)", "", text)
    end = _readable(text, found)
    return found.strip(text[:end], 0) + text[end:]


def _readable(text: str, action_format: ActionFormat) -> int:
    """Length of the longest beginning of `text` in whole rows that is of the format."""
    end = statements_end(text) if action_format.name == "python" else len(text)  # else it would be tried row by row
    while end and action_format.segment(text[:end]) is None:
        end = text.rfind("\n", 0, end - 1) + 1
    return end
