"""A small golden/: cases of every kind, recorded and blessed once and copied for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamoe.cases import Case, load_cases
from megamoe.golden import bless, record

CASES = """
[defaults]
breaks = "something"

[[case]]
kind = "staging"
name = "small"
hidden = 128
experts = 2
top_k = 2
tokens = 2

[[case]]
kind = "eplb"
name = "map"
top_k = 2
tokens = 3
logical = 4
physical = 4

[[case]]
kind = "forward"
name = "tiny"
hidden = 128
intermediate = 128
experts = 2
top_k = 2
family = "envelope"
tokens = 2

[[case]]
kind = "errors"
name = "over"
action = "over-capacity"
raises = "ValueError"
message = "x"
"""


def quiet(case: Case, error: str) -> None:
    """Nothing is said of progress."""


def make_golden(root: Path, cases_text: str = CASES) -> Path:
    """``root`` with every case of ``cases_text`` (TOML) blessed, in CI too."""
    (root / "cases").mkdir(parents=True)
    (root / "cases/all.toml").write_text(cases_text)
    cases = load_cases(root)
    assert record(root, cases, 1, quiet) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        bless(root, cases)
    return root


def case_by_name(root: Path, name: str) -> Case:
    """The case of that name."""
    return next(case for case in load_cases(root) if case.name == name)


def content_of(root: Path) -> dict[Path, bytes]:
    """Every file below ``root`` with its bytes."""
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
