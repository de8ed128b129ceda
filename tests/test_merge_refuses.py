"""Verdicts that cannot be mixed up: what reports may differ in, and everything else is refused."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given

from megamoe.cases import Case
from megamoe.cases.shards import ShardError, durations
from megamoe.golden import GoldenError, bless_durations
from megamoe.judge import STATUSES
from megamoe.suite.merge import merge
from megamoe.suite.shard_report import DECIDES, MAY_DIFFER, NOT_ALWAYS, read_report
from tests.helpers.mutated import many, mutated, result_or_one_line
from tests.helpers.reports import whole

DOCS = Path(__file__).parents[1] / "docs/ci.md"
SELECTION = [Case(f"eplb/c{i}", "eplb", "full", "x", i, {}, Path("a.toml")) for i in range(2)]
NAMES = ("one.json", "two.json")
WORKER = {"python": "3.12.1", "torch": "2.11.0", "numpy": "2.4.6", "triton": "3.6.0",
          "device": "cuda", "processor": "x86_64", "gpu": "H100", "capability": [9, 0],
          "cuda": "13.0"}  # fmt: skip


def pair():
    """Two reports of one judgement, with every key that a report may have."""
    both = []
    for case in SELECTION:
        report = whole([case.id], name="mine", callables=["forward"],
                       worker=copy.deepcopy(WORKER), modules_sha256={"layer.py": "a"})  # fmt: skip
        for key in DECIDES:
            if key.startswith("versions."):
                report["versions"].setdefault(key.removeprefix("versions."), "1.2.3")
        both.append(report)
    return both


def set_key(report, key, value):
    top, _, part = key.partition(".")
    if part:
        report[top][part] = value
    else:
        report[top] = value


def expect_refusal(reports, match):
    with pytest.raises(ShardError, match=match) as error:
        merge(reports, SELECTION, NAMES)
    assert "\n" not in str(error.value)


# --- what decides -----------------------------------------------------------------------------

OTHER = {"batch_invariant": False, "fingerprint": {"sources": "other", "options": "o"},
         "callables": ["eplb_map"], "modules_sha256": {"layer.py": "b"},
         "tier": "quick", "kind": "eplb", "versions.python": "3.12.0", "worker.python": "3.13.0",
         "worker.capability": [10, 0]}  # fmt: skip


@pytest.mark.parametrize("key", DECIDES)
def test_reports_that_differ_in_what_decides_are_not_merged(key):
    one, two = pair()
    merge([one, two], SELECTION)
    set_key(two, key, OTHER.get(key, "other"))
    expect_refusal(
        [one, two], rf"reports differ in {key}: .+ in one.json, .+ in two.json \(.+\); run them"
    )


def test_the_line_has_both_values_and_the_reason():
    one, two = pair()
    two["fingerprint"] = None
    expect_refusal([one, two], "fingerprint: options o, sources s in one.json, None in two.json "
                        r"\(the kernel's sources and options")  # fmt: skip


@pytest.mark.parametrize("key", [k for k in DECIDES if k not in NOT_ALWAYS
                                 and not k.startswith("worker.")])  # fmt: skip
def test_a_report_that_lacks_what_decides_is_not_taken_for_one_that_agrees(key):
    reports = pair()
    top, _, part = key.partition(".")
    for report in reports:  # in all of them, so that they do not differ
        report[top].pop(part) if part else report.pop(top)
    expect_refusal(reports, f"one.json lacks `{key}`; judge it again with this version")


def test_a_report_without_goldens_is_one_clear_line():
    one, two = pair()
    del two["goldens"]
    expect_refusal([one, two], "^two.json lacks `goldens`; judge it again with this version$")


@pytest.mark.parametrize(
    "key", ["name", "callables", "worker", "modules_sha256", "versions.triton"]
)
def test_what_earlier_versions_did_not_write_may_be_missing_in_all_and_not_in_some(key):
    one, two = pair()
    top, _, part = key.partition(".")
    one[top].pop(part) if part else one.pop(top)
    expect_refusal([one, two], rf"reports differ in {key}.*: nothing in one.json, .+ in two.json")
    two[top].pop(part) if part else two.pop(top)
    assert merge([one, two], SELECTION)["counts"]["pass"] == 2


@pytest.mark.parametrize("key", ["rounding", "worker.driver_mode", "versions.cutlass"])
def test_a_key_that_no_table_names_decides_until_somebody_says_why_not(key):
    one, two = pair()
    set_key(one, key, "a")
    set_key(two, key, "b")
    expect_refusal(
        [one, two], rf"reports differ in {key}: a in one.json, b in two.json \(it may decide"
    )


# --- what may differ --------------------------------------------------------------------------


@pytest.mark.parametrize("key", [k for k in MAY_DIFFER if k not in ("cases", "counts")])
def test_reports_may_differ_in_what_decides_nothing(key):
    one, two = pair()
    values = {"seconds": (1, 2), "machine": ({"cores": 2}, {"cores": 64}), "shards": (["a"], ["b"]),
              "longest_shard_seconds": (1, 2)}  # fmt: skip
    for report, value in zip((one, two), values.get(key, ("1/2", "2/2")), strict=True):
        set_key(report, key, value)
    assert merge([one, two], SELECTION)["counts"]["pass"] == 2


def test_patch_releases_of_python_may_differ():
    one, two = pair()
    one["versions"]["python"], two["versions"]["python"] = "3.11.7", "3.11.9"
    merge([one, two], SELECTION)


def test_a_merge_can_be_merged_again():
    one, two = pair()
    one["shard"], two["shard"] = "1/2", "2/2"
    again = merge([merge([one], SELECTION[:1]), two], SELECTION)
    assert again["shards"] == ["1/2", "2/2"] and again["counts"]["pass"] == 2
    assert again == merge([one, two], SELECTION)


@pytest.mark.parametrize("table", [DECIDES, MAY_DIFFER])
def test_the_page_has_the_tables(table):
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", DOCS.read_text(), re.MULTILINE))
    assert {key: rows.get(key) for key in table} == dict(table)


# --- cases ------------------------------------------------------------------------------------


def test_an_unknown_status_is_refused_and_not_dropped():
    one, two = pair()
    two["cases"][0]["status"], two["counts"] = "passed", {"passed": 1}
    expect_refusal([one, two], r"two.json: case eplb/c1 has status 'passed', known: pass, fail")


def test_a_run_that_was_stopped_is_named_with_the_shard_to_run_again():
    one, two = pair()
    two["shard"], two["counts"] = "2/2", {"not-run": 1}
    two["cases"][0] |= {"status": "not-run", "reason": "stopped"}
    message = "two.json: its run was stopped before 1 case, eplb/c1 among them; run shard 2/2 again"
    expect_refusal([one, two], message)
    one, two = pair()
    two["stopped"] = "interrupted"
    expect_refusal([one, two], "two.json: its run was stopped; run it again")


@pytest.mark.parametrize("counts", [{"pass": 2}, {"fail": 1}, {}, {"pass": 1, "passed": 1}])
def test_counts_are_counted_again(counts):
    one, two = pair()
    two["counts"] = counts
    expect_refusal(
        [one, two], r"two.json counts \d x .*, and holds \d such cases; it was edited or cut"
    )


def test_every_status_is_counted_in_the_merge():
    one, two = pair()
    two = {**two, **{k: whole(["eplb/c1"], "skip")[k] for k in ("cases", "counts")}}
    counts = merge([one, two], SELECTION)["counts"]
    assert counts["pass"] == counts["skip"] == 1 and set(counts) == set(STATUSES)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "eplb", "status": "pass", "seconds": 1}, r"cases\[0\] has no id"),
        ({"id": "eplb/c1", "status": "pass", "seconds": 1}, r"cases\[0\] has no kind"),
        ({"id": "eplb/c1", "kind": "eplb", "seconds": 1}, r"cases\[0\] has no status"),
        ({"id": "eplb/c1", "kind": "eplb", "status": "pass"}, r"cases\[0\] has no seconds"),
        ({"id": 3, "kind": "eplb", "status": "pass", "seconds": 1}, r"cases\[0\].id is 3; it must"),
        ({"id": "eplb/c1", "kind": "eplb", "status": "pass", "seconds": "1"}, "must be a number"),
        ({"id": "eplb/c1", "kind": "eplb", "status": "pass", "seconds": -1}, "number from 0"),
        ({"id": "eplb/c1", "kind": "layout", "status": "pass", "seconds": 1}, "has kind layout"),
        ({"id": "eplb/c1", "kind": "eplb", "status": "fail", "seconds": 1}, "has no reason"),
        ("eplb/c1", r"cases\[0\] is 'eplb/c1'; it must be an object"),
    ],
)
def test_an_entry_of_another_form_is_one_clear_line(entry, message):
    one, two = pair()
    two["cases"] = [entry]
    expect_refusal([one, two], f"^two.json: .*{message}")


def test_whatever_stands_in_a_report(tmp_path):
    one, two = pair()
    path = tmp_path / "two.json"

    @many
    @given(mutated(two))
    def holds(document):
        path.write_text(json.dumps(document))
        result_or_one_line(lambda: merge([one, document], SELECTION))
        result_or_one_line(lambda: merge([one, read_report(path)], SELECTION))

    holds()


@pytest.mark.timeout(20)
def test_a_report_that_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a.json: cannot be read as a JSON report: .* is a fifo"):
        read_report(tmp_path / "a.json")


# --- durations --------------------------------------------------------------------------------


def test_whatever_stands_in_durations(tmp_path):
    path = tmp_path / "durations.json"

    @many
    @given(mutated({"eplb/a": 1.5, "eplb/b": 2}))
    def holds(document):
        path.write_text(json.dumps(document))
        result_or_one_line(lambda: sum(durations(tmp_path).values()) + 1 > 0)

    holds()


@pytest.mark.parametrize("seconds", ["1", None, True, float("nan"), -1, float("inf"), 10**400])
def test_a_duration_is_a_number_of_seconds(tmp_path, seconds):
    (tmp_path / "durations.json").write_text(json.dumps({"eplb/a": seconds}))
    message = (
        r"durations.json: it\['eplb/a'\] is .*; it must be a number.*; restore it or delete it"
    )
    with pytest.raises(ShardError, match=message):
        durations(tmp_path)


def test_durations_are_not_taken_from_a_report_of_another_form(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    for report in ({}, {"cases": [{"id": "a", "status": "pass", "seconds": float("nan")}]}):
        with pytest.raises(GoldenError, match=r"report 1: .*; write it again with `megamoe check"):
            bless_durations(tmp_path, [report])
    assert list(tmp_path.iterdir()) == []
