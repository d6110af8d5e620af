"""Where the program is in what a model answered, for verdicts and for rewards alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from ..segmentation import PYTHON_NAMES, find_fences


Text: TypeAlias = str | list[dict[str, Any]]  # as in TRL: plain, or the messages of a conversation
_BARE = frozenset(("", "code", "text", "txt", "plain", "plaintext"))  # a block so marked may be a program or output
_IN_A_ROW = re.compile(r"(?i)(?<!`)```(?:python3?|py)[ \t]+([^\n`]+?)[ \t]*```(?!`)")
_DEFINITION = re.compile(r"^\s*(?:async\s+)?(?:def|class)\s+(\w+)", re.MULTILINE)
_BEGINNING = re.compile(r"^(?:(?:async\s+)?def\s|class\s|import\s|from\s+\S+\s+import\s|@)", re.MULTILINE)
_CODE = (ast.Constant, ast.Call, ast.Await)  # expressions that are statements; `Fibonacci` and `top-k` are words


def extract_program(prompt: Text | None, completion: Text) -> str:
    """Finds the program in a completion.

    Args:
        prompt (`str` or `list[dict]`, *optional*):
            The prompt. Where it is the beginning of a program, the completion goes on with it, as it stands: what
            `ra3 evaluate` makes of its `complete` prompts.
        completion (`str` or `list[dict]`):
            The completion. Of an answer with fenced code ([`~ra3_trl.segmentation.find_fences`]) the program is the
            last block of Python; not what the program prints, nor what only uses an earlier block. A block that
            defines something and needs an earlier one is joined to it. Nothing before a `</think>` is answer. Without
            a fence, prose before and behind a program is left out, as EvalPlus does.

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
    text = completion if isinstance(completion, str) else "".join(map(_content, completion))
    if isinstance(prompt, str) and (_begins_program(prompt) or parse_program(prompt + text)):
        return prompt + text, len(prompt)
    return _fenced_program(text.rpartition("</think>")[2]), 0


def _content(message: dict[str, Any]) -> str:
    """The text of a message, which may stand in parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _fenced_program(text: str) -> str:
    """The program among the fenced blocks of an answer, without any that amid its prose."""
    fences = find_fences(text)
    if not fences:
        in_a_row = _IN_A_ROW.findall(text)
        return in_a_row[-1] if in_a_row else _amid_prose(text)
    program, names = "", set[str]()  # and what the blocks so far define
    for fence in fences:
        if fence.language not in PYTHON_NAMES | _BARE:
            continue
        code, tree = fence.code, parse_program(fence.code)
        defines = set(_DEFINITION.findall(code))
        if fence.language in _BARE and program and (tree is None or not _acts(tree) or (names and not defines)):
            continue  # what the program prints
        if not names & _needs(code, tree):
            program = code
        elif defines and tree is not None and not names & set(_imported(tree)):
            program += code
        names |= defines
    return program or text


def _amid_prose(text: str) -> str:
    """The program that begins with a row of `text` and ends before the first row behind it that is prose: at the
    margin, no Python, and no definition. One that is cut off is none, and the whole text stays, as where it parses."""
    begins = [] if parse_program(text) else _BEGINNING.finditer(text)
    for begin in begins:
        rows, at = text[begin.start() :].splitlines(keepends=True), 0
        while rows:
            source = "".join(rows)
            try:
                ast.parse(source)
            except SyntaxError as error:
                at = (error.lineno or 1) - 1
            except (ValueError, RecursionError, MemoryError):
                return text
            else:
                if _DEFINITION.search(source):
                    return source
                break
            if not 0 < at < len(rows) or rows[at][0].isspace() or _BEGINNING.match(rows[at]):
                break
            rows = rows[:at]
    return text


def _acts(tree: ast.Module) -> bool:
    """Whether a program is more than values; `3` and `[1, 2]` are Python too."""
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, (ast.Call, ast.Await)) for node in tree.body)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names that a program takes from modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def _needs(code: str, tree: ast.Module | None) -> set[str]:
    """Names that a block uses, or imports, and does not define; of one that is no Python (a session, a block cut off)
    all its words."""
    if tree is None:
        return set(re.findall(r"\w+", code)) - set(_DEFINITION.findall(code))
    nodes = list(ast.walk(tree))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)} | set(_DEFINITION.findall(code))
    return used - bound | set(_imported(tree))


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
