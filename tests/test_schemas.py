"""The JSON Schemas of the reports. Real reports of each verb are checked where tests make them."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path

import pytest

from megamoe import judge
from megamoe.cases import KINDS, TIERS, load_cases
from megamoe.compare.classes import CLASSES
from megamoe.suite.merge import merge
from tests.helpers import results
from tests.helpers.schemas import faults, schemas

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("ab", "bench", "bisect", "coverage", "kernel", "run")


def test_there_is_one_for_each_report_and_the_wheel_has_them():
    assert sorted(schemas()) == sorted([*VERBS, "verdict"])
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "schemas/*.json" in data["package-data"]["megamoe"]


def test_each_is_a_schema():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    for schema in schemas().values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_a_run_is_valid_and_so_is_each_of_its_verdicts():
    run = results.run()
    assert {case["status"] for case in run["cases"]} >= {"pass", "fail", "error", "not-provided"}
    assert faults("run", run) == []
    assert [faults("verdict", case) for case in run["cases"]] == [[]] * len(run["cases"])


def test_a_merge_of_runs_is_valid():
    run = results.run() | {"recorded": {"machine_class": "cpu-x86-64", "file": None},
                           "goldens": {"manifest_sha256": 64 * "0"}}  # fmt: skip
    by_id = {case.id: case for case in load_cases()}
    assert faults("run", merge([run], [by_id[case["id"]] for case in run["cases"]])) == []


def test_the_measurements_in_the_docs_are_valid():
    files = [json.loads(p.read_text()) for p in (ROOT / "docs/performance").glob("h*.json")]
    assert files and [faults("bench", one) for one in files] == [[]] * len(files)


def wrong(change):
    run = copy.deepcopy(results.run())
    change(run, next(c for c in run["cases"] if c["worst"]))
    return faults("run", run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, case: run.pop("contract"), "'contract' is a required property"),
        (lambda run, case: run["counts"].pop("skip"), "'skip' is a required property"),
        (lambda run, case: case.update(status="ok"), "'ok' is not one of"),
        (lambda run, case: case.update(kind="matmul"), "'matmul' is not one of"),
        (lambda run, case: case["worst"].update(actual_bits="3f80"), "'3f80' does not match"),
        (lambda run, case: case["worst"].update(token="2"), "'2' is not of type"),
        (lambda run, case: case["findings"][0].update(rows={"a": 1}), "'a' does not match"),
    ],
)
def test_a_wrong_run_is_not(change, message):
    assert any(message in one for one in wrong(change))


def test_they_list_the_values_that_there_are():
    by_name = schemas()
    verdict = by_name["verdict"]
    assert verdict["$defs"]["status"]["enum"] == list(judge.STATUSES)
    assert verdict["properties"]["kind"]["enum"] == list(KINDS)
    assert by_name["run"]["properties"]["tier"]["enum"] == list(TIERS)
    of_case = by_name["ab"]["properties"]["cases"]["items"]["properties"]
    assert of_case["class"]["enum"] == list(CLASSES)
    fields = set(judge.Verdict.__dataclass_fields__) - {"case_id"} | {"id"}
    assert set(verdict["properties"]) == fields
    assert set(verdict["$defs"]["worst"]["properties"]) == {*judge.Worst.__dataclass_fields__}
    assert set(verdict["$defs"]["finding"]["properties"]) == {*judge.Finding.__dataclass_fields__}
