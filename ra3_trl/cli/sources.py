"""Fields of configurations, read from their source: so arguments are checked before torch is imported, which takes
seconds that a slip of the finger should not cost."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).parents[1]
ORDER = ("text", "default", "least", "most", "above")  # of the arguments of `config_fields.setting`
_BOUNDS = ("least", "most", "above", "infinite")


@dataclass(frozen=True)
class SourceField:
    """A field as its source has it: type hint, and what the call behind it says of meaning, default, choices and
    bounds (`least`, `most`, `above`, `infinite`)."""

    name: str
    hint: str
    text: str = ""
    default: Any = None
    choices: tuple[Any, ...] | None = None
    bounds: Mapping[str, Any] = field(default_factory=dict)


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


def read_fields(path: Path, cls: str, order: tuple[str, ...] = ORDER) -> dict[str, SourceField]:
    """The annotated fields of a class, without those that it inherits; `{}` if there is no such class.

    Args:
        order (`tuple[str, ...]`, *optional*, defaults to `ORDER`):
            What the first arguments of the call behind a field are; as in `config_fields.setting`.
    """
    body = next((n.body for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == cls), [])
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            hint = ast.unparse(node.annotation)
            if not hint.startswith("ClassVar"):
                fields[node.target.id] = _field(node.target.id, hint, node.value, order)
    return fields


def _field(name: str, hint: str, value: ast.expr | None, order: tuple[str, ...]) -> SourceField:
    if not isinstance(value, ast.Call):
        return SourceField(name, hint)
    said = dict(zip(order, map(_literal, value.args), strict=False))
    said |= {str(word.arg): _literal(word.value) for word in value.keywords if word.arg in ("choices", *_BOUNDS)}
    choices = said.get("choices") if isinstance(said.get("choices"), tuple) else None
    text = said.get("text") if isinstance(said.get("text"), str) else ""
    bounds = {key: said[key] for key in _BOUNDS if said.get(key) is not None}
    return SourceField(name, hint, str(text), said.get("default"), choices, bounds)


def _literal(node: ast.expr) -> Any:
    """The value of a literal, of `1 << 24` and of a constant of `config_fields.py`; `None` of any other expression."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift):
        return ast.literal_eval(node.left) << ast.literal_eval(node.right)
    if isinstance(node, ast.Name) and node.id == "MOST_UPDATES":
        return read_constant("config_fields.py", node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
