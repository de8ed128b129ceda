"""Shards: nothing lost, nothing twice, about the same time each; and the proof of it."""

import hashlib
from pathlib import Path

import pytest

from megamoe.cases import Case
from megamoe.cases.shards import ShardError, durations, longest_first, parse, shard
from megamoe.report.views import view
from megamoe.suite import results
from megamoe.suite.merge import merge
from megamoe.suite.summary import verdict_line
from tests.helpers.reports import whole


def cases(count: int) -> list[Case]:
    return [Case(f"eplb/c{i:02}", "eplb", "full", "x", i, {}, Path("a.toml")) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_the_shards_are_a_partition(count):
    every = cases(23)
    seconds = {c.id: float(i % 5) for i, c in enumerate(every)}
    parts = [shard(every, i, count, seconds) for i in range(1, count + 1)]
    assert sorted(c.id for part in parts for c in part) == sorted(c.id for c in every)


def test_they_take_about_the_same_time_whatever_the_order_of_the_files():
    every = cases(20)
    seconds = {c.id: 1.0 + i for i, c in enumerate(every)}
    parts = [shard(every, i, 4, seconds) for i in (1, 2, 3, 4)]
    loads = [sum(seconds[c.id] for c in part) for part in parts]
    assert max(loads) - min(loads) <= 3 and sum(loads) == 210
    assert [shard(every[::-1], i, 4, seconds) for i in (1, 2, 3, 4)] == parts


def test_longest_first_with_ties_by_id():
    every = cases(3)
    assert [c.id for c in longest_first(every[::-1], {"eplb/c02": 9.0})] == [
        "eplb/c02", "eplb/c00", "eplb/c01",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_a_shard_that_is_none(text):
    with pytest.raises(ShardError, match=r"write I/N with 1 <= I <= N"):
        parse(text)


def test_parse():
    assert parse("2/3") == (2, 3)


def test_durations(tmp_path):
    assert durations(tmp_path) == {}
    (tmp_path / "durations.json").write_text('{"a": 1.5}')
    assert durations(tmp_path) == {"a": 1.5}
    (tmp_path / "durations.json").write_text("{")
    with pytest.raises(ShardError, match=r"durations.json: cannot be read"):
        durations(tmp_path)


def test_merge_of_a_whole_selection():
    every = cases(4)
    merged = merge(
        [
            whole(["eplb/c03", "eplb/c00"], shard="1/2", seconds=2.0),
            whole(["eplb/c01", "eplb/c02"], shard="2/2", seconds=3.0),
        ],
        every,
    )
    assert [c["id"] for c in merged["cases"]] == [c.id for c in every]
    assert merged["counts"]["pass"] == 4 and merged["seconds"] == 5.0
    assert merged["shards"] == ["1/2", "2/2"] and "shard" not in merged


def test_a_merge_says_how_long_all_shards_took_and_how_long_the_longest():
    """Shards on two hosts are done when the longest is; a merge of merges knows it too."""
    one, two, three = (whole([f"eplb/c0{i}"], seconds=float(i + 2)) for i in range(3))
    merged = merge([merge([one, three], [cases(3)[i] for i in (0, 2)]), two], cases(3))
    assert (merged["seconds"], merged["longest_shard_seconds"]) == (9.0, 4.0)
    line = verdict_line(merged)
    assert line.endswith(" passed in 9 s of machine time, 4 s of them in the longest shard")
    assert view(merged)["verdict"] == line


def test_processes_of_two_shards_are_no_process_of_the_merge():
    """A red must not seem to have run after a case of another machine."""
    one, two = whole(["eplb/c00", "eplb/c01"]), whole(["eplb/c02", "eplb/c03"])
    one["cases"][1] |= {"process": 2, "calls": [1, 1]}
    two["cases"][0] |= {"process": 1, "calls": [1, 2]}
    merged = merge([one, two], cases(4))
    assert [case.get("process") for case in merged["cases"]] == [None, 2, 3, None]
    assert two["cases"][0]["process"] == 1


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["eplb/c00"], ["eplb/c01"], "1 case lost: eplb/c02"),
        (["eplb/c00", "eplb/c01"], ["eplb/c01", "eplb/c02"], "1 case judged twice: eplb/c01"),
        (["eplb/c00", "eplb/c01"], ["eplb/c02", "eplb/c9"], "not in this selection: eplb/c9"),
    ],
)
def test_merge_names_what_is_wrong(first, second, message):
    with pytest.raises(ShardError, match=message):
        merge([whole(first), whole(second)], cases(3))


def test_merge_names_the_shard_that_lacks_with_its_command_and_one_that_came_twice():
    one, two = whole(["eplb/c00"], shard="1/3"), whole(["eplb/c01"], shard="2/3")
    with pytest.raises(ShardError) as error:
        merge([one, two], cases(3))
    command = "megamoe check --backend b --tier full --shard 3/3 --json FILE"
    assert str(error.value) == (f"1 case lost: eplb/c02; no report of shard 3/3; run `{command}`")
    with pytest.raises(ShardError, match=r"; shard 2/3 came twice; no report of shard 3/3; run"):
        merge([one, two, two], cases(3))


def test_reports_of_two_contents_of_one_file_are_not_merged():
    """The kernel has no fingerprint: its file is hashed all the same."""
    one = whole(["eplb/c00"], file_sha256="a")
    with pytest.raises(ShardError, match="reports differ in file_sha256: a in report 1, b in"):
        merge([one, whole(["eplb/c01"], file_sha256="b")], cases(2))
    assert merge([one, whole(["eplb/c01"], file_sha256="a")], cases(2))["file_sha256"] == "a"


def test_the_report_of_a_file_has_its_digest(tmp_path):
    (tmp_path / "k.py").write_text("x = 1")
    digest = results._digest_of(f"{tmp_path}/k.py:Kernel")["file_sha256"]
    assert digest == hashlib.sha256(b"x = 1").hexdigest()
    assert results._digest_of("eager") == {} == results._digest_of("gone.py:Kernel")


def test_merge_refuses_different_runs():
    with pytest.raises(
        ShardError,
        match=r"reports differ in backend: a in report 1, b in report 2 \(.*\); run them alike",
    ):
        merge([whole(["eplb/c00"], backend="a"), whole(["eplb/c01"])], cases(2))
    with pytest.raises(ShardError, match="no reports to merge"):
        merge([], cases(1))
