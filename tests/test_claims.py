"""A claim of too narrow a class is red on a directed case; the table in the docs is that."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("claims", ROOT / "tools/claims.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["claims"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["claims"]


@pytest.fixture(scope="module")
def table(tool):
    return tool.table()


def test_every_wrong_claim_is_red_and_no_right_one(table):
    assert table[1] == []


def test_the_table_of_the_docs_is_the_one_that_the_tool_makes(table):
    assert "\n".join(table[0]) in (ROOT / "docs/backends.md").read_text("utf-8")


def test_directed_cases_are_small(tool):
    for case in tool.cases():
        assert case.params["hidden"] == 128
        assert case.params["intermediate"] <= 256
        assert case.params["tokens"] == 1
