"""Around the package: workflows call make targets that exist, versions agree, docs/from_trl.md names what there is."""

from __future__ import annotations

import inspect
import re
import tomllib
from dataclasses import fields
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import yaml
from test_imports import LEVEL
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.refusals import ARGUMENTS, SETTINGS, find


ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


# ---- workflows and hooks ----


def test_there_are_workflows_and_targets():
    assert {path.stem for path in WORKFLOWS} == {"ci", "versions"}
    assert {"install", "lint", "test", "test-slow", "test-versions", "demo"} <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_install_and_run_by_make_alone(path):
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) <= {"push", "pull_request", "workflow_dispatch", "schedule"}  # YAML reads `on` as true
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        runs = [step["run"] for step in job["steps"] if "run" in step]
        uses = {step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step}
        assert uses == {"actions/checkout", "actions/setup-python"}
        made = [command for command in runs if re.match(r"(sudo )?make ", command)]
        assert made and all(command.startswith("sudo sysctl ") for command in runs if command not in made)
        for command in made:
            words = re.sub(r'"[^"]*"|#.*', "", command).split("make ")[1].split()
            assert {word for word in words if "=" not in word} <= TARGETS


def test_hooks_are_those_of_the_virtual_environment():
    (repo,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"  # nothing is cloned
    venv = re.search(r"^VENV := (\S+)$", (ROOT / "Makefile").read_text(), re.M).group(1)
    assert [hook["entry"].split()[:2] for hook in repo["hooks"]] == [
        [f"{venv}/bin/ruff", "check"],
        [f"{venv}/bin/ruff", "format"],
    ]


# ---- templates, citation ----


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_the_environment(path):
    form = read_yaml(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [field for field in form["body"] if "`ra3 env`" in field["attributes"].get("label", "")]
    assert len(asked) == 1
    assert asked[0].get("validations", {}).get("required", False) == (path.stem == "bug_report")
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 1


def test_pull_requests_ask_for_the_environment():
    assert "`ra3 env`" in (ROOT / ".github" / "pull_request_template.md").read_text()


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version"} <= set(citation)
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["authors"] == PYPROJECT["project"]["authors"]
    (paper,) = citation["references"]
    assert paper["url"] == "https://huggingface.co/papers/2509.25810"
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["title"] in (ROOT / "ra3_trl" / "hub" / "shared.md.jinja").read_text()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_and_commands_of_the_pages_exist(page):
    text = (ROOT / page).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:tests|docs|benchmarks)/[\w/]+\.\w+)`", text)
    assert [path for path in (*links, *paths) if not (ROOT / path).exists()] == []
    assert set(re.findall(r"(?:^|`)make\s+([a-z-]+)", text, re.M)) <= TARGETS


# ---- docs/from_trl.md ----

INHERITED = {field.name for field in fields(TrainingArguments)}
OURS = {field.name for field in fields(RA3Config)} | set(inspect.signature(RA3MidTrainer).parameters)


def tables() -> dict[str, list[list[str]]]:
    """The page's tables by heading, row by row and cell by cell, without their heads."""
    sections = re.split(r"^## (.*)$", (ROOT / "docs" / "from_trl.md").read_text("utf-8"), flags=re.M)[1:]
    rows = {
        title: [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line[:1] == "|"]
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    }
    return {title: lines[2:] for title, lines in rows.items()}


def names(cell: str) -> list[str]:
    """`num_generations` and the like in backticks; `vllm_*` too."""
    return re.findall(r"`([a-z]\w*\*?)`", cell)


def test_every_setting_of_trl_is_on_the_page_and_none_that_it_lacks():
    data, rollouts, arguments, _ = tables().values()
    patterns = [name for cells in (*data, *rollouts) for name in names(cells[0])]
    theirs = {field.name for config in (SFTConfig, GRPOConfig) for field in fields(config)} - INHERITED
    assert [name for name in theirs if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    listed = {name for cells in arguments for name in names(cells[0])}
    taken = set().union(*(inspect.signature(t).parameters for t in (SFTTrainer, GRPOTrainer)))
    assert taken <= listed
    newest = re.search(r"\(trl (\d+\.\d+)\)", (ROOT / "docs" / "from_trl.md").read_text("utf-8")).group(1)
    if version("trl").startswith(f"{newest}."):  # older ones of the range lack some
        assert [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in theirs)] == []
        assert taken == listed


def test_every_name_here_is_real():
    *rows, defaults = tables().values()
    for cells in (cells for table in rows for cells in table):
        assert len(cells) == 3
        if cells[1] == "not here":
            assert cells[2]  # the reason
        elif cells[1] == "the same":
            assert set(names(cells[0])) <= OURS
        else:
            assert names(cells[1]) and set(names(cells[1])) <= OURS
    assert {name for cells in defaults for name in names(cells[0])} <= INHERITED


def test_the_page_says_not_here_of_what_the_table_of_refusals_has():
    data, rollouts, arguments, _ = tables().values()
    for rows, table in (([*data, *rollouts], SETTINGS), (arguments, ARGUMENTS)):
        for cells in rows:
            for name in names(cells[0]):
                if "`loss_type` of `GRPOConfig`" in cells[0] and name == "loss_type":
                    continue  # it is `SFTConfig`'s
                here = cells[1] == "the same" or name in names(cells[1])
                assert here is (name in OURS) is (find(table, name) is None), name
                if not here and cells[1] != "not here":
                    assert set(names(find(table, name).instead.replace("args.", ""))) & set(names(cells[1])), name


def test_a_script_of_sft_changes_in_five_lines():
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "from_trl.md").read_text("utf-8"), re.S).group(1)
    lines = diff.splitlines()
    assert len([line for line in lines if line[:1] in ("-", "+")]) == 5
    before, after = ("\n".join(line[1:] for line in lines if line[:1] in (sign, " ", "")) for sign in "-+")
    calls = [Mock(), Mock()]
    for script, trainer, call in zip((before, after), ("trl.SFTTrainer", "ra3_trl.RA3MidTrainer"), calls, strict=True):
        with patch(trainer, call), patch("trl.SFTConfig", dict):
            exec(script, {"dataset": None})
        call.return_value.train.assert_called_once_with()
    assert calls[0].call_args == calls[1].call_args
    assert set(calls[1].call_args.kwargs) <= OURS


def test_the_defaults_that_the_page_names():
    (latents,) = [cells for cells in tables()["Rollouts and rewards, as in `GRPOTrainer`"] if "max_comp" in cells[0]]
    config = RA3Config(use_cpu=True)
    assert f"{config.max_latent_length} by default" in latents[2]
    assert (config.kl_coef, config.log_latents_steps, config.logging_steps) == (0.05, 10, 1)
    assert (config.learning_rate, config.e_learning_rate) == (2e-5, 2e-5)
    assert (config.bf16, config.activation_checkpointing) == (False, False)
    for ours, trl in ((RA3Config, SFTConfig), (RA3Config, GRPOConfig)):
        defaults = [{field.name: field.default for field in fields(config)} for config in (ours, trl)]
        assert defaults[0]["logging_steps"] == 1 and defaults[1]["logging_steps"] == 10
        assert defaults[1]["gradient_checkpointing"] is True and defaults[1]["bf16"] is None  # on where it can be


def test_contributing_has_the_rooms_in_their_levels():
    """The table "Where does it go" is the ladder that tests/test_imports.py holds."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Where does it go")[1].split("\n## ")[0]
    level, rooms = 0, {}
    for row in section.split("\n"):
        if (cells := row.split("|"))[1:] and "`" in row and row.startswith("|"):
            level = int(cells[1]) if cells[1].strip() else level
            rooms |= dict.fromkeys(re.findall(r"`(\w+)(?:\.py|/)`", cells[2]), level)
    assert rooms == LEVEL
