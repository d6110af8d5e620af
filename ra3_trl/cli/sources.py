"""Fields of configurations, read from their source: so arguments are checked before torch is imported, which takes
seconds that a slip of the finger should not cost."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class SourceField:
    """A field as its source has it: type hint, and what the call behind it says of meaning, default and choices."""

    name: str
    hint: str
    text: str = ""
    default: Any = None
    choices: tuple[Any, ...] | None = None


def path_of(package: str, file: str) -> Path | None:
    """The file of an installed package, which is not imported; `None` where this version has no such file."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    return path if path is not None and path.is_file() else None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def read_constant(file: str, name: str) -> Any:
    """The literal that is assigned to `name` at the top of a file of this package."""
    for node in _tree(PACKAGE / file).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise LookupError(f"{file} has no literal {name}.")


def read_fields(path: Path, cls: str, order: tuple[str, str] = ("text", "default")) -> dict[str, SourceField]:
    """The annotated fields of a class, without those that it inherits; `{}` if there is no such class.

    Args:
        order (`tuple[str, str]`, *optional*, defaults to `("text", "default")`):
            What the first two arguments of the call behind a field are.
    """
    body = next((n.body for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == cls), [])
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            hint = ast.unparse(node.annotation)
            if not hint.startswith("ClassVar"):
                fields[node.target.id] = _field(node.target.id, hint, node.value, order)
    return fields


def _field(name: str, hint: str, value: ast.expr | None, order: tuple[str, str]) -> SourceField:
    if not isinstance(value, ast.Call):
        return SourceField(name, hint)
    said = dict(zip((*order, "choices"), map(_literal, value.args), strict=False))
    said |= {word.arg: _literal(word.value) for word in value.keywords if word.arg == "choices"}
    choices = said.get("choices") if isinstance(said.get("choices"), tuple) else None
    text = said.get("text") if isinstance(said.get("text"), str) else ""
    return SourceField(name, hint, str(text), said.get("default"), choices)


def _literal(node: ast.expr) -> Any:
    """The value of a literal, `None` of any other expression."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
