"""What mkdocs does not do by itself: files outside docs/ that pages link to become a part of the site."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
_OUTSIDE = re.compile(r"(\]\()(?:\.\./)+([\w./-]+)((?:#[\w-]+)?\))")
_NAMED = re.compile(r"\[<code>~?(?:\w+\.)*(\w+)</code>\]")  # [`~ra3_trl.Policy`], as a page has it
_TYPE = re.compile(r"(<code>)([^<]*`[^<]*)(</code>)")  # `ValueError`, which mkdocstrings takes as it stands
_WITHIN = re.compile(r"(\]\()(?!https?:|#|/)([\w./-]+)((?:#[\w-]+)?\))")


def linked(docs: Path) -> dict[str, str]:
    """Paths in the repository that pages link to, and what they are called in the site: `source/benchmarks/LOG.md`."""
    pages = sorted(docs.glob("*.md"))
    paths = {match[2] for page in pages for match in _OUTSIDE.finditer(page.read_text("utf-8"))}
    return {path: f"source/{path}" if path.endswith(".md") else f"source/{path}.md" for path in sorted(paths)}


def as_markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook as a page."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    text = "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)
    return re.sub(r"\[([^\]]*)\]\([./][^)]*\)", r"\1", text)  # its links lead to places that the site has not


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the linked files: markdown as it is, others as a page that shows them; folders as a list of their files."""
    for path, name in linked(Path(config.docs_dir)).items():
        there = ROOT / path
        if there.is_dir():
            text = f"# {path}\n\n" + "\n".join(
                f"- `{file.name}`" for file in sorted(there.iterdir()) if file.is_file()
            )
        elif path.endswith(".md"):
            # Its own links lead to places that the site has not.
            text = _WITHIN.sub(r"](#)", there.read_text("utf-8")).replace("](#)", "]()")
            text = re.sub(r"\[([^\]]*)\]\(\)", r"\1", text)
        elif path.endswith(".ipynb"):
            text = as_markdown(json.loads(there.read_text("utf-8")))
        else:
            kind = {".py": "python", ".yaml": "yaml", ".jinja": "jinja"}.get(there.suffix, "text")
            text = f"# {path}\n\n````{kind}\n{there.read_text('utf-8')}\n````\n"
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links out of docs/ into links within the site."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    names = linked(Path(config.docs_dir))
    return _OUTSIDE.sub(lambda match: f"{match[1]}{names[match[2]]}{match[3]}", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes types and names of the reference without the marks that TRL's docstrings have for doc-builder."""
    return as_read(html) if page.file.src_uri == "api.md" else html


def as_read(html: str) -> str:
    """`[`~a.b.C`], *optional*, defaults to `x`` as `C, optional`: mkdocstrings says the default beside it."""

    def plain(match: re.Match[str]) -> str:
        text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"\1", match[2])
        text = re.sub(r", defaults to .*", "", text).replace("*optional*", "optional").replace("`", "")
        return match[1] + text + match[3]

    return _TYPE.sub(plain, _NAMED.sub(r"<code>\1</code>", html))
