"""Which names tests have of the program: those that they use as globals, as Python itself resolves them."""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


_REFLECTION = {"eval", "exec", "globals", "locals", "vars"}  # tests that call them may name anything


@dataclass(frozen=True)
class Names:
    """`names` that the program may give (all of its, if there is none), those `needed` of it, those that tests have
    `bound` themselves, and `modules` of the standard library with the attributes that tests read of them."""

    names: tuple[str, ...]
    needed: tuple[str, ...]
    bound: tuple[str, ...]
    modules: dict[str, tuple[str, ...]]


def names_in(sources: Sequence[str], trees: Sequence[ast.Module], entry_point: str | None) -> Names:
    """Finds the names in tests.

    A name that tests bind is asked for too: they may bind it in another scope, or use it before; the program can't
    bind it anew. What is a builtin is never asked for, or a program's `abs` would judge it; unless it is the entry
    point, or tests name nothing else.
    """
    used = {name for source in sources for name in _globals(symtable.symtable(source, "<tests>", "exec"))}
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used |= {n.target.id for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    reflects = not used.isdisjoint(_REFLECTION)
    bound = {name for tree in trees for name in _bound(tree)}
    modules = {name: _attributes(name, nodes) for name in sorted((used - bound) & sys.stdlib_module_names)}
    modules = {name: attributes for name, attributes in modules.items() if attributes and name != entry_point}
    needed = set() if entry_point is None else {entry_point}
    free = used - set(vars(builtins)) | needed
    if not reflects and not free - bound - set(modules):
        needed = _shadowed(nodes) - bound
    names = () if reflects else tuple(sorted(free | needed))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    return Names(names, tuple(sorted(needed)), tuple(sorted(bound | stored)), modules)


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """Names that are read and may be a global's, here or in a scope within."""
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() in ("module", "class")):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _globals(inner)


def _bound(tree: ast.Module) -> Iterator[str]:
    """Names that the top level of `tree` defines or imports, which hides the program's."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from ((alias.asname or alias.name).split(".")[0] for alias in aliases)


def _attributes(name: str, nodes: Sequence[ast.AST]) -> tuple[str, ...]:
    """Attributes that are read of `name`; none if it is used in another way, as no module is."""
    uses = sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in nodes)
    of_name = [
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name
    ]
    return tuple(sorted(set(of_name))) if uses == len(of_name) else ()


def _shadowed(nodes: Sequence[ast.AST]) -> set[str]:
    """Tests that name nothing but builtins test a function with a builtin's name: the outermost that is called."""
    for node in nodes:
        if isinstance(node, ast.Assert):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name):
                    return {inner.func.id}
    return set()
