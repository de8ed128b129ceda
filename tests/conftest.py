"""Fixtures that several files of tests share, and the order of files in processes of xdist."""

import os
from typing import Final

import pytest

from tests.helpers.warm import Template, warmed

LONG: Final = (
    "hostile", "bisect", "suite", "auto", "recorded", "ab", "step_classes", "workflows", "triton",
    "stops", "bounds_search", "mutants",
)  # fmt: skip
"""Files that take longest, the longest first."""


@pytest.fixture(scope="session")
def template():
    """A process that has imported torch; it starts for the first test that asks."""
    process = Template()
    yield process
    process.close()


@pytest.fixture(scope="module")
def warm(template):
    """Workers are forks of the template. Not for tests of how a process starts or ends."""
    with warmed(template):
        yield template


def pytest_configure():
    """Under pytest-xdist a process inherits COLUMNS=80 from one that has loaded readline, and then
    a table is cut as no user's is."""
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items):
    """Long files first, and in turn to each process: ``--dist worksteal`` deals equal parts.

    Then no process begins a long test when the other has nothing left to take. A file stays in
    one piece, since two processes would both set up what its tests share.
    """
    count = getattr(config, "workerinput", {}).get("workercount", 1)
    if count > 1:
        items[:] = dealt(items, count)


def dealt(items, count):
    """The items, with the long files at the front of each of ``count`` parts."""
    parts: list[list] = [[] for _ in (*LONG, "the rest")]
    for item in items:
        name = item.path.stem.removeprefix("test_")
        parts[LONG.index(name) if name in LONG else -1].append(item)
    *parts, rest = parts
    out, size = [], -(-len(items) // count)
    for turn in range(count):
        mine = [item for part in parts[turn::count] for item in part]
        few = max(0, size - len(mine)) if turn < count - 1 else len(rest)
        out += mine + rest[:few]
        rest = rest[few:]
    return out
