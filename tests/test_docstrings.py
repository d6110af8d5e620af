"""The examples in the docstrings of the pure rooms are code, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import ra3_trl


ROOMS = ("records", "losses", "segmentation", "analysis", "rollout")
FEWEST = 20  # examples; a docstring that is no longer read would let all others pass


def modules() -> list[str]:
    """Full names of the modules in these rooms."""
    return [
        module.name
        for module in pkgutil.walk_packages(ra3_trl.__path__, "ra3_trl.")
        if module.name.split(".")[1] in ROOMS
    ]


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in modules() for test in finder.find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in tests) >= FEWEST
