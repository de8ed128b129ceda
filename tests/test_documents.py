"""Documents that people keep: whatever stands in one, a result or one line, and no traceback."""

import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megamoe import schema
from megamoe.cases import golden_root, load_cases
from megamoe.environment import slug
from megamoe.golden import GoldenError, Store, bless, diff, make, record, recorded
from megamoe.golden.documents import read_recording
from megamoe.spec.contract import BASE, CONTRACTS
from tests.helpers.golden import case_by_name, make_golden, quiet
from tests.helpers.mutated import many, mutated, result_or_one_line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_golden(tmp_path_factory.mktemp("documents") / "golden")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
    monkeypatch.delenv("CI", raising=False)


# --- the manifest -----------------------------------------------------------------------------


def test_whatever_stands_in_the_manifest(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "golden")
    cases = load_cases(copy)
    original = json.loads((root / "manifest.json").read_text())

    @many
    @given(mutated(original))
    def holds(document):
        (copy / "manifest.json").write_text(json.dumps(document))
        for case in cases:
            result_or_one_line(lambda case=case: Store(copy, make).load(case))

    holds()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["cases"].update({"../x": m["cases"]["eplb/map"]}), r"KIND/NAME"),
        (lambda m: m["cases"].update({"eplb/map": 3}), r"cases\['eplb/map'\] is 3; it must be an"),
        (lambda m: m["cases"]["eplb/map"].update(kind="staging"), "its kind is staging"),
        (lambda m: m["cases"]["eplb/map"].pop("sha256"), "not all of file, sha256 and tensors"),
        (lambda m: m["cases"]["forward/tiny"].update(rows=[-1]), r"rows\[0\] is -1; it must be an"),
        (lambda m: m.pop("generators"), "it has no generators"),
    ],
)
def test_the_line_says_where_and_what_must_be(root, tmp_path, change, message):
    document = json.loads((root / "manifest.json").read_text())
    change(document)
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(GoldenError, match=rf"^manifest.json: .*{message}.*; restore golden/ from"):
        Store(tmp_path, make)


def test_the_goldens_of_this_repository_are_what_the_manifest_says():
    if not golden_root().is_dir():
        pytest.skip(f"no goldens at {golden_root()}")
    stores = {name: Store(golden_root(), make, contract) for name, contract in CONTRACTS.items()}
    for case in load_cases():
        files = {}  # revisions share one: it is read once
        for store in (stores[name] for name in case.revisions):
            if "file" in store.entry(case):
                files[store.key(case)] = store
        for store in files.values():
            assert store.load(case).names()


# --- candidates -------------------------------------------------------------------------------


@pytest.mark.slow
def test_whatever_stands_in_a_candidate(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "golden")
    cases = load_cases(copy)
    record(copy, [case_by_name(copy, "tiny")], 1, quiet)
    path = copy / "candidates/entries/forward/tiny.json"
    outside = tmp_path / "victim"
    outside.write_bytes(b"precious")

    @many
    @given(mutated(json.loads(path.read_text())))
    def holds(document):
        path.write_text(json.dumps(document))
        result_or_one_line(lambda: diff(copy, cases))
        trial = shutil.copytree(copy, tmp_path / "trial")
        try:
            result_or_one_line(lambda: bless(trial, cases))
            # Whatever was blessed can be read.
            result_or_one_line(lambda: Store(trial, make).load(case_by_name(trial, "tiny")))
        finally:
            shutil.rmtree(trial)
        assert outside.read_bytes() == b"precious"

    holds()


# --- recorded bits ----------------------------------------------------------------------------

RECORD = {
    "schema": 1,
    "backend": "b",
    "accumulator": "fp32",
    "machine_class": "m",
    "contract": BASE.revision,
    "fingerprint": {"sources": "s", "options": "o", "binaries": {"linear": "b"}},
    "provenance": {"torch": "2"},
    "cases": {"forward/tiny": {"inputs": "0", "stages": {"y": "0", "x": "1"}, "y": "AAA="}},
    "declined": {"forward/other": "too large"},
}


def test_whatever_stands_in_recorded_bits(root, tmp_path):
    path = tmp_path / "b/m.json"
    path.parent.mkdir()

    def use():
        bits = recorded.Recording(path, read_recording(path, slug))
        build = RECORD["fingerprint"]
        for case_id in ("forward/tiny", "forward/none"):
            assert bits.state(case_id, "0", build, BASE.revision) in (
                "same", "none", "other contract", "other inputs", "other fingerprint"
            )  # fmt: skip

    @many
    @example({**RECORD, "contract": "\ud800"})
    @given(mutated(RECORD))
    def holds(document):
        path.write_text(json.dumps(document))
        result_or_one_line(use)
        result_or_one_line(lambda: recorded.bless(root, tmp_path))

    holds()


@pytest.mark.parametrize("y", ["AAA", "A A=", "AA==", "A" * 4000, 3, None, "\u00e9"])
def test_a_kept_y_is_base64_of_elements(tmp_path, y):
    (tmp_path / "b").mkdir()
    document = json.loads(json.dumps(RECORD))
    document["cases"]["forward/tiny"]["y"] = y
    (tmp_path / "b/m.json").write_text(json.dumps(document))
    with pytest.raises(GoldenError, match=r"recorded/b/m.json: cases\[.*\].y is .* must be base64"):
        read_recording(tmp_path / "b/m.json", slug)


def test_the_recorded_bits_of_this_repository_have_the_form():
    paths = sorted((golden_root() / "recorded").glob("*/*.json"))
    assert all(read_recording(path, slug)["cases"] for path in paths)


# --- forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "form", "message"),
    [
        (True, int, "it is True; it must be an integer"),
        (1, schema.OneOf((1,)), ""),
        (True, schema.OneOf((1,)), "it is True; it must be one of 1"),
        (None, schema.OrNull(str), ""),
        (3, schema.OrNull(str), "it is 3; it must be a string"),
        ([1, "x"], schema.Items(int), "it[1] is 'x'; it must be an integer"),
        ({"a": {"b": []}}, schema.Object({"a": schema.Object({"b": str})}),
         "a.b is a list of 0; it must be a string"),
        ({}, schema.Object(optional={"a": str}), ""),
        ({"more": 1}, schema.Object(), ""),
        (10**400, str, "it is a very large integer; it must be a string"),
        (float("nan"), schema.seconds, "it is nan; it must be a number from 0 to 1e9"),
        (-0.1, schema.seconds, "it is -0.1; it must be a number from 0 to 1e9"),
        (10**400, schema.seconds, "it is a very large integer; it must be a number from 0 to 1e9"),
        (12, schema.seconds, ""),
    ],
)  # fmt: skip
def test_what_a_form_says(value, form, message):
    assert schema.fault(value, form) == message


@given(st.text())
def test_a_shown_text_is_one_short_line_of_ascii(text):
    line = schema.preview(text * 30)
    assert len(line) < 100 and line.isascii() and line.isprintable()
