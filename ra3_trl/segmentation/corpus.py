"""A folder of Python files as a data set of functions and classes."""

from __future__ import annotations

import ast
import logging
import re
import sysconfig
from pathlib import Path

from datasets import Dataset

from ..kinds import checked


logger = logging.getLogger(__name__)
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([^\s*#]+)")
_SKIPPED_FOLDERS = {"site-packages", "__pycache__", ".git", ".venv", "venv", "node_modules"}
_SKIPPED_IN_THE_LIBRARY = {"test", "tests", "idlelib"}


def standard_library() -> Path:
    """Finds the standard library of the running Python: the corpus that is always there."""
    return Path(sysconfig.get_path("stdlib"))


def _licence(source: str, folder: Path, root: Path, cache: dict[Path, str]) -> str:
    """Looks for a file's licence: its own tag, else the first line of the licence file nearest above it."""
    if match := _SPDX.search(source):
        return match.group(1)
    if folder not in cache:
        file = next((p for p in sorted(folder.iterdir()) if re.match(r"(?i)(licen[cs]e|copying)", p.name)), None)
        if file is not None and file.is_file():
            lines = file.read_text("utf-8", "replace").split("\n")
            cache[folder] = next((line.strip() for line in lines if line.strip()), "unknown")
        else:
            cache[folder] = "unknown" if folder == root else _licence("", folder.parent, root, cache)
    return cache[folder]


@checked
def load_code_directory(path: str | Path | None = None, min_lines: int = 4, max_lines: int = 200) -> Dataset:
    """Reads the functions and classes of a folder of `.py` files, recursively.

    Args:
        path (`str` or `Path`, *optional*):
            The folder; installed packages, virtual environments and `.git` in it are left out. `None` is the standard
            library of the running Python, without its tests and IDLE.
        min_lines (`int`, *optional*, defaults to `4`):
            Shorter definitions are left out.
        max_lines (`int`, *optional*, defaults to `200`):
            Of a longer class its methods are taken one by one (dedented); a longer function stays whole.

    Returns:
        `datasets.Dataset` with the columns `text`, `path` (relative), `line` (1-based) and `license` (SPDX tag of the
        file, else the first line of the nearest licence file, else `"unknown"`). Files that do not parse are skipped;
        a log line says how many.

    Raises:
        `ValueError`: if the path is no folder or holds no definition that fits.
    """
    root = standard_library() if path is None else Path(path)
    if not root.is_dir():
        raise ValueError(f"`code_dir` is {str(root)!r}, which is not a folder; pass a folder of .py files.")
    licences: dict[Path, str] = {root: "PSF-2.0"} if path is None else {}
    left_out = _SKIPPED_FOLDERS | (_SKIPPED_IN_THE_LIBRARY if path is None else set())
    rows, skipped, files = [], 0, 0
    for file in sorted(root.rglob("*.py")):
        if not file.is_file() or left_out & set(file.relative_to(root).parts[:-1]):
            continue
        files += 1
        try:
            source = file.read_bytes().decode("utf-8-sig")
            if "\r" in source.replace("\r\n", ""):
                raise ValueError("a lone carriage return: Python and we would count lines differently")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # UnicodeDecodeError and NUL bytes are ValueErrors
            skipped += 1
            continue
        licence = _licence(source, file.parent, root, licences)
        place = {"path": file.relative_to(root).as_posix(), "license": licence}
        for line, text in _definitions(tree.body, source.split("\n"), max_lines):
            if text.count("\n") >= min_lines:
                rows.append({"text": text, "line": line, **place})
    if skipped:
        logger.warning("%d of %d files in %s do not parse and were skipped.", skipped, files, root)
    if not rows:
        raise ValueError(
            f"`code_dir` {str(root)!r}: {files} Python files, none with a function or class of at least {min_lines} "
            f"lines ({skipped} do not parse); pass another folder."
        )
    return Dataset.from_list(rows)


def _definitions(body: list[ast.stmt], rows: list[str], max_lines: int) -> list[tuple[int, str]]:
    """Lists functions and classes with the line they begin at; of a long class its methods."""
    definitions = []
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        block = rows[first - 1 : node.end_lineno]
        if isinstance(node, ast.ClassDef) and len(block) > max_lines + 1:
            definitions += _definitions(node.body, rows, max_lines)
            continue
        if node.col_offset:  # a method; left out when dedenting would touch a multi-line string
            indent = block[0][: len(block[0]) - len(block[0].lstrip())]
            if any(row.strip() and not row.startswith(indent) for row in block):
                continue
            block = [row.removeprefix(indent) for row in block]
        definitions.append((first, "\n".join(block) + "\n"))
    return definitions
