"""The documentation: every page is in the site's navigation, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without mkdocs."""


def navigation(items) -> list[str]:
    """The pages of a navigation, sections within sections."""
    if isinstance(items, str):
        return [items]
    values = items.values() if isinstance(items, dict) else items
    return [page for item in values for page in navigation(item)]


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links to them, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation_once():
    pages = navigation(yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Loader)["nav"])
    assert sorted(pages) == sorted(page.name for page in PAGES)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files of the repository, and headings in them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_what_the_reference_names_is_public():
    """Each public name is in the reference, where it lives."""
    import ra3_trl

    names = set(re.findall(r"^::: ra3_trl\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M))
    wanted = {f"{home}.{name}" for name, home in ra3_trl._HOMES.items() if name != "ACTION_FORMATS"}
    assert names == wanted


def test_types_of_the_reference_have_no_marks(monkeypatch):
    """Of TRL's form that mkdocstrings leaves in the page; the hooks need no more of mkdocs than three names here."""
    for module, name in (
        ("config.defaults", "MkDocsConfig"),
        ("structure.files", "File"),
        ("structure.pages", "Page"),
    ):
        stand_in = types.ModuleType(f"mkdocs.{module}")
        stand_in.Files = None
        setattr(stand_in, name, None)
        monkeypatch.setitem(sys.modules, f"mkdocs.{module}", stand_in)
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for marked, plain in {
        "(<code>`str` or [`~transformers.PreTrainedModel`]</code>)": "(<code>str or PreTrainedModel</code>)",
        "(<code>`int`, *optional*, defaults to `8`</code>, default: <code>8</code>)": (
            "(<code>int, optional</code>, default: <code>8</code>)"
        ),
        "<code>`ValueError`</code>": "<code>ValueError</code>",
        "see [<code>~ra3_trl.rewards.RewardPlugIns</code>]": "see <code>RewardPlugIns</code>",
        "<code>a[0]</code> [x]": "<code>a[0]</code> [x]",
    }.items():
        assert hooks.as_read(marked) == plain
