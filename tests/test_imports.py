"""Imports point one way, and trl is used through its public names only. See docs/design.md."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import ra3_trl


PACKAGE = Path(ra3_trl.__file__).parent
ROOT = PACKAGE.parent
LEVELS = (  # imports point from a level to those before it, and never to another room of the same level
    ("kinds",),
    ("records", "files", "markdown", "outgoing", "versions", "refusals"),
    ("config_file", "config_fields"),
    ("config", "trackers"),
    ("segmentation", "rollout", "losses", "models", "sandbox", "analysis"),
    ("generation",),
    ("policy",),
    ("rewards", "evaluation", "hub"),
    ("em", "rlvr"),
    ("report", "arguments", "saving"),
    ("trainer", "testbed"),
    ("experimental", "integrations"),
    ("cli", "examples"),
    ("benchmarks",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PRIVATE = ("trl.trainer", "trl.models", "trl.experimental")


def room_of(path: Path) -> str | None:
    """`ra3_trl/em/estep.py` -> em, `ra3_trl/trainer.py` -> trainer, `examples/x.py` -> examples; `__init__`: None."""
    parts = path.relative_to(ROOT).parts
    if parts[0] != PACKAGE.name:
        return parts[0]
    room = Path(parts[1]).stem
    return None if room in ("__init__", "__main__") and len(parts) == 2 else room


def imported_modules(source: str, path: Path) -> list[str]:
    """Full names of all modules and names a file imports, wherever in it, relative imports resolved."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{stem}.{alias.name}" for alias in node.names]
    return names


def target_room(name: str) -> str | None:
    """`ra3_trl.em.loop` -> em; a public name of the package, `ra3_trl.RA3Config`, is of the room it lives in."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    if package != PACKAGE.name:
        return package if package in ("examples", "benchmarks") else None
    return ra3_trl._HOMES.get(room, room) or None


def wrong_imports(source: str, path: Path) -> list[str]:
    """What is wrong with a file's imports; `[]` when nothing is."""
    here, wrong = room_of(path), []
    for name in imported_modules(source, path):
        if name.startswith(PRIVATE):
            wrong.append(f"{path}: {name} is private to trl")
        there = target_room(name)
        if here in LEVEL and there in LEVEL and here != there and LEVEL[there] >= LEVEL[here]:
            direction = "upward" if LEVEL[there] > LEVEL[here] else "sideways"
            wrong.append(f"{path}: {here} imports {direction} from {there}")
    return wrong


def source_files() -> list[Path]:
    folders = [PACKAGE, *(ROOT / name for name in ("examples", "benchmarks") if (ROOT / name).is_dir())]
    return sorted(p for folder in folders for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def test_imports_point_one_way():
    files = source_files()
    assert len(files) > 20
    assert [wrong for path in files for wrong in wrong_imports(path.read_text("utf-8"), path)] == []


def test_every_room_has_a_level():
    rooms = {room_of(path) for path in source_files()} - {None}
    assert rooms <= set(LEVEL), "put the new room into LEVELS (and into docs/design.md)"


def module_of(room: str) -> str:
    return room if room in ("examples", "benchmarks") else f"{PACKAGE.name}.{room}"


def caught(here: str, there: str) -> bool:
    """Whether an import of one room planted in another is found wrong."""
    path = ROOT.joinpath(*module_of(here).split("."), "planted.py")
    return bool(wrong_imports(f"import {module_of(there)}.planted", path))


@pytest.mark.parametrize("here", LEVEL)
def test_a_room_imports_from_lower_levels_only(here):
    for there in set(LEVEL) - {here}:
        assert caught(here, there) == (LEVEL[there] >= LEVEL[here]), there


@pytest.mark.parametrize("rooms", LEVELS)
def test_a_planted_circle_is_caught_on_every_level(rooms):
    """Two rooms of a level that import each other, and one of it with one of the next."""
    level = LEVEL[rooms[0]]
    beside = LEVELS[level + 1 if level + 1 < len(LEVELS) else level - 1]
    circles = list(itertools.combinations({*rooms, *beside}, 2))
    assert circles and all(caught(one, other) or caught(other, one) for one, other in circles)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ra3_trl/losses/planted.py", "from ..em import EMLoop"),
        ("ra3_trl/records.py", "from .segmentation import Segmenter"),
        ("ra3_trl/rollout/planted.py", "from .. import trainer"),
        ("ra3_trl/rollout/planted.py", "from ..segmentation.documents import splice"),
        ("ra3_trl/sandbox/planted.py", "from ..losses import advantages"),
        ("ra3_trl/evaluation/planted.py", "from ..em import EMLoop"),
        ("ra3_trl/em/planted.py", "from ..experimental import hindsight"),
        ("ra3_trl/em/planted.py", "from .. import RA3MidTrainer"),
        ("ra3_trl/em/planted.py", "def f():\n    import ra3_trl.trainer"),
        ("ra3_trl/em/planted.py", "from ra3_trl.cli.main import main"),
        ("ra3_trl/trainer.py", "import benchmarks.rollout"),
        ("ra3_trl/trainer.py", "from .experimental.hindsight import HindsightConfig"),
        ("ra3_trl/trainer.py", "from trl.trainer.utils import pad"),
        ("ra3_trl/cli/planted.py", "import trl.experimental"),
        ("ra3_trl/cli/planted.py", "from trl.models import utils"),
        ("ra3_trl/cli/planted.py", "from trl import experimental"),
        ("examples/planted.py", "def f():\n    from trl import trainer"),
    ],
)
def test_a_planted_wrong_import_is_caught(file, line):
    assert len(wrong_imports(line, ROOT / file)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ra3_trl/em/planted.py", "from ..losses import advantages"),
        ("ra3_trl/evaluation/planted.py", "from ..sandbox import Judge"),
        ("ra3_trl/rollout/planted.py", "from .engine import RolloutEngine\nfrom ..records import Document"),
        ("ra3_trl/__init__.py", "from .trainer import RA3MidTrainer"),
        ("ra3_trl/em/planted.py", "from .. import RA3Config, __version__"),
        ("examples/planted.py", "from ra3_trl import RA3Config\nfrom ra3_trl.trainer import RA3MidTrainer"),
        ("ra3_trl/cli/planted.py", "from trl import TrlParser"),
    ],
)
def test_right_imports_pass(file, line):
    assert wrong_imports(line, ROOT / file) == []
