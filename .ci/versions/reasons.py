"""Why a cell of docs/versions.md is red: one row for each kind of failure, in place of a long list of tests."""

from fnmatch import fnmatch


# (environment, test, why); shell patterns for the first two. A failure without a row here fails `make test-versions`.
REASONS: tuple[tuple[str, str, str], ...] = ()


def reason(cell: str, test: str) -> str | None:
    """Returns why `test` fails in the environment `cell`, or None where nobody has said."""
    return next((why for cells, tests, why in REASONS if fnmatch(cell, cells) and fnmatch(test, tests)), None)
