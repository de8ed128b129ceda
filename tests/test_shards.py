"""Sharding is deterministic, balanced and complete; a merge that lost a case says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe import shards
from megamoe.cases import Case


def case(name: str) -> Case:
    return Case(f"forward/{name}", "forward", "quick", "nothing", 0, {}, Path("test.toml"))


def report(*names: str, **changes: Any) -> dict[str, Any]:
    cases = [{"id": f"forward/{n}", "kind": "forward", "status": "pass"} for n in names]
    return {"backend": "eager", "tier": "quick", "contract": "2026-06", "cases": cases, **changes}


@given(st.lists(st.floats(0.01, 100), max_size=40), st.integers(1, 7))
def test_shards_partition_the_selection(seconds: list[float], count: int) -> None:
    cases = [case(f"c{i}") for i in range(len(seconds))]
    known = {c.id: s for c, s in zip(cases, seconds, strict=True)}
    parts = [shards.shard(cases, i, count, known) for i in range(1, count + 1)]
    assert sorted(c.id for part in parts for c in part) == sorted(c.id for c in cases)
    # Longest-first to the least loaded: no shard exceeds the lightest by more than one case.
    loads = [sum(known[c.id] for c in part) for part in parts]
    assert max(loads) - min(loads) <= max(seconds, default=0.0) + 1e-9


def test_shards_do_not_depend_on_the_order_of_the_files() -> None:
    cases = [case(n) for n in "abcdefg"]
    known = {"forward/c": 9.0}
    assert shards.shard(cases, 1, 2, known) == shards.shard(cases[::-1], 1, 2, known)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_wrong_shard_says_how_to_write_one(text: str) -> None:
    with pytest.raises(shards.ShardError, match="write I/N with 1 <= I <= N"):
        shards.parse(text)


def test_merge_counts_each_case_once() -> None:
    merged = shards.merge([report("b"), report("a", "c")], [case(n) for n in "abc"])
    assert [c["id"] for c in merged["cases"]] == ["forward/a", "forward/b", "forward/c"]
    assert merged["counts"] == {"pass": 3}


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([report("a")], "1 cases lost: forward/b"),
        ([report("a", "b"), report("b")], "1 cases judged twice: forward/b"),
        ([report("a", "b", "z")], "1 cases not in this selection: forward/z"),
        ([report("a"), report("b", backend="other")], "reports differ in backend: eager, other"),
        ([report("a"), report("b", contract="2027")], "reports differ in contract"),
        ([], "no reports to merge"),
    ],
)
def test_merge_refuses_what_does_not_add_up(reports: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(shards.ShardError, match=message):
        shards.merge(reports, [case("a"), case("b")])


def test_damaged_durations_are_named(tmp_path: Path) -> None:
    assert shards.durations(tmp_path) == {}
    (tmp_path / "durations.json").write_text("{")
    with pytest.raises(shards.ShardError, match=r"durations\.json: cannot be read"):
        shards.durations(tmp_path)
