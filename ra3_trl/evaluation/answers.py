"""Where the program is in what a model answered, for verdicts and for rewards alike."""

from __future__ import annotations

import ast
import re
from typing import Any, TypeAlias


Text: TypeAlias = str | list[dict[str, Any]]  # as in TRL: plain, or the messages of a conversation
_CODE = (ast.Constant, ast.Call, ast.Await)  # expressions that are statements; `Fibonacci` and `top-k` are words


def extract_program(prompt: Text | None, completion: Text) -> str:
    """Finds the program in a completion.

    Args:
        prompt (`str` or `list[dict]`, *optional*):
            The prompt. Where it is the beginning of a program, the completion goes on with it, as it stands: what
            `ra3 evaluate` makes of its `complete` prompts.
        completion (`str` or `list[dict]`):
            The completion. Of an answer with fenced code (three backticks) the last block is the program.

    Returns:
        `str`: the program's source.

    Example:

    ```python
    >>> extract_program("def f(x):\\n", "    return x\\n")
    'def f(x):\\n    return x\\n'
    ```
    """
    return locate_answer(prompt, completion)[0]


def locate_answer(prompt: Text | None, completion: Text) -> tuple[str, int]:
    """Returns what [`extract_program`] does, and the character of it at which the completion begins."""
    text = completion
    if not isinstance(text, str):
        text = "".join(message["content"] or "" for message in text)
    if isinstance(prompt, str) and (_begins_program(prompt) or parse_program(prompt + text)):
        return prompt + text, len(prompt)
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", text, re.DOTALL | re.MULTILINE)
    return (blocks[-1] if blocks else text), 0


def parse_program(source: str) -> ast.Module | None:
    """Parses `source`; `None` if it is no Python, however odd."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _begins_program(prompt: str) -> bool:
    """Whether a prompt is code that waits for more: a docstring, a function's head, ..., but no single word, although
    that parses too."""
    for indent in ("", "    ", "        "):
        if tree := parse_program(f"{prompt.rstrip()}\n{indent}pass\n"):
            return not all(
                isinstance(node, ast.Pass) or isinstance(node, ast.Expr) and not isinstance(node.value, _CODE)
                for node in tree.body
            )
    return False
