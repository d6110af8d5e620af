"""The notebooks: no outputs in the repository, links that lead somewhere, and, in the slow tests, every cell runs."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CODE = "def f{i}(x):\n    y = x + {i}\n    if y > {i}:\n        return y\n    return x\n"
# What a tiny model can do in seconds, in the place of the cell with the tag `parameters`.
SMALL = {"DOCUMENTS": 8, "E_STEPS": 1, "M_STEPS": 1, "LENGTH": 256, "LATENT": 4, "OUTPUT": "out"}
SMALL |= {"SETTINGS": {"max_length": 256, "max_latent_length": 4}}
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))["cells"]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["first_run", "reading_thoughts", "your_own_reward"]


@by_name
def test_it_is_clean(path):
    """One cell of parameters, all of which the slow test sets; and links from a page of the documentation."""
    tagged = [cell for cell in cells(path) if cell["metadata"].get("tags") == ["parameters"]]
    names = re.findall(r"\b([A-Z_]+)\b(?=[A-Z_, ]* = )", "".join(tagged[0]["source"]))
    assert len(tagged) == 1 and "MODEL" in names and set(names) <= {*SMALL, "MODEL", "CODE"}
    for cell in cells(path):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), path.name, "exec")
            continue
        for link in re.findall(r"\]\(([^)\s:]+)\)", "".join(cell["source"])):
            assert (path.parent / link).exists(), link
    pages = "".join(page.read_text("utf-8") for page in (FOLDER.parents[1] / "docs").glob("*.md"))
    assert f"(../examples/notebooks/{path.name})" in pages


@pytest.mark.slow
@pytest.mark.skipif(
    None in (find_spec("nbclient"), find_spec("ipykernel")), reason="nbclient is missing: pip install '.[notebooks]'"
)
@by_name
def test_it_runs(path, tokenizers, tiny_model, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    tiny_model("llama", tokenizers["newline_indent"], max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tokenizers["newline_indent"].save_pretrained(tmp_path / "model")
    (tmp_path / "code").mkdir()
    for i in range(8):
        (tmp_path / "code" / f"{i}.py").write_text(CODE.format(i=i))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(path, as_version=4)
    values = SMALL | {"MODEL": "model", "CODE": "code"}
    (cell,) = (cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"])
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert {"first_run": "think_rate", "reading_thoughts": "nats", "your_own_reward": "your reward"}[path.stem] in said
