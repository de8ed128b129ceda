"""The golden store: record -> diff -> bless, verify, and what a damaged store says."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from megamoe.cases import golden_root, load_cases
from megamoe.files import write_atomically
from megamoe.golden import (
    GoldenError,
    OracleGolden,
    Store,
    bless,
    bless_durations,
    changes,
    diff,
    digest_of,
    make,
    record,
    regenerate,
    store,
    verify,
)
from megamoe.golden.store import canonical, row_digests

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
kind = "layout"
name = "bytes"
hidden = 128
intermediate = 128
experts = 2

[[case]]
kind = "errors"
name = "over"
action = "over-capacity"
raises = "ValueError"
message = "x"
"""


def write_cases(root: Path, text: str = CASES) -> None:
    (root / "cases").mkdir(parents=True, exist_ok=True)
    (root / "cases/all.toml").write_text(text)


def quiet(case, error):
    pass


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    write_cases(tmp_path)
    return tmp_path


@pytest.fixture
def blessed(root):
    cases = load_cases(root)
    assert record(root, cases, 1, quiet) == []
    bless(root, cases)
    return root


def case_of(root, name):
    return next(c for c in load_cases(root) if c.name == name)


def test_record_diff_bless_verify(root):
    cases = load_cases(root)
    assert record(root, cases, 1, quiet) == []
    assert not (root / "manifest.json").exists() and not (root / "tensors").exists()
    assert (root / "candidates" / ".gitignore").read_text() == "*\n"
    assert [(c.case_id, c.what) for c in diff(root, cases)] == [
        (case_id, "new") for case_id in sorted(c.id for c in cases)
    ]
    assert sorted(bless(root, cases)) == sorted(c.id for c in cases)
    assert not (root / "candidates").exists()
    assert verify(root, cases, 1, quiet) == []
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["schema"] == 1 and manifest["contract"] == "2026-06"
    (generator,) = manifest["generators"].values()
    assert {"megamoe", "numpy", "torch", "sources"} <= set(generator)
    assert (
        "oracle/reference.py" in generator["sources"] and "cases/recipes.py" in generator["sources"]
    )
    entry = manifest["cases"]["forward/tiny"]
    assert entry["inputs"] == digest_of(regenerate(case_of(root, "tiny")))
    assert entry["tensors"]["y"]["shape"] == [2, 128]
    assert "file" not in manifest["cases"]["errors/over"]


def test_a_second_record_changes_nothing(blessed):
    before = (blessed / "manifest.json").read_bytes()
    cases = load_cases(blessed)
    record(blessed, cases, 1, quiet)
    assert diff(blessed, cases) == []
    bless(blessed, cases)
    assert (blessed / "manifest.json").read_bytes() == before


def test_two_processes_record_the_same_bits(root, tmp_path):
    cases = load_cases(root)
    record(root, cases, 2, quiet)
    in_two = {p.name: p.read_bytes() for p in (root / "candidates").rglob("*.safetensors")}
    record(root, cases, 1, quiet)
    in_one = {p.name: p.read_bytes() for p in (root / "candidates").rglob("*.safetensors")}
    assert in_one == in_two and len(in_one) == 4


def test_what_is_stored_is_what_the_oracle_says(blessed):
    shelf = Store(blessed, make)
    for name in ("small", "map", "tiny", "bytes"):
        case = case_of(blessed, name)
        golden, reference = shelf.load(case, digest_of(regenerate(case))), make(case)
        assert set(golden.names()) == set(reference.tensors)
        for tensor, value in reference.tensors.items():
            assert np.array_equal(golden.get(tensor), value)


def test_diff_counts_elements_and_ulps(blessed, monkeypatch):
    other = make(case_of(blessed, "tiny"))
    other.tensors["y"] = other.tensors["y"].copy()
    other.tensors["y"][1, 3] += 5
    del other.tensors["exact.y_lo"]
    other.tensors["extra"] = np.zeros(3, np.uint8)
    monkeypatch.setattr("megamoe.golden.candidates.make", lambda case, inputs, contract: other)
    record(blessed, [case_of(blessed, "tiny")], 1, quiet)
    cases = [c for c in load_cases(blessed) if c.name != "map"]
    assert {(c.case_id, c.tensor, c.what, c.elements, c.ulps) for c in diff(blessed, cases)} == {
        ("forward/tiny", "exact.y_lo", "removed", 0, None),
        ("forward/tiny", "extra", "new", 0, None),
        ("forward/tiny", "y", "changed", 1, 5),
        ("eplb/map", "", "removed", 0, None),
    }


def test_bless_drops_goldens_of_cases_that_are_gone(blessed):
    text = (blessed / "cases/all.toml").read_text().replace('name = "small"', 'name = "other"')
    (blessed / "cases/all.toml").write_text(text)
    cases = load_cases(blessed)
    record(blessed, [case_of(blessed, "other")], 1, quiet)
    bless(blessed, cases)
    assert not (blessed / "tensors/staging/small.safetensors").exists()
    assert (blessed / "tensors/staging/other.safetensors").exists()
    assert "staging/small" not in Store(blessed, make).cases


# --- bless refuses ----------------------------------------------------------------------------


def refuses(root, match):
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    with pytest.raises(GoldenError, match=match):
        bless(root, load_cases(root))
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_bless_refuses_in_ci(root, monkeypatch):
    record(root, load_cases(root), 1, quiet)
    monkeypatch.setenv("CI", "true")
    refuses(root, "bless refuses to run where CI is set")
    with pytest.raises(GoldenError, match="refuses to run where CI is set"):
        bless_durations(root, [])
    monkeypatch.setenv("CI", "")
    bless(root, load_cases(root))


def test_bless_refuses_a_candidate_whose_case_has_changed(root):
    record(root, load_cases(root), 1, quiet)
    write_cases(root, CASES.replace("tokens = 3", "tokens = 4"))
    refuses(root, r"candidate eplb/map: all.toml has changed since it was recorded")


def test_bless_refuses_a_candidate_of_no_case(root):
    record(root, load_cases(root), 1, quiet)
    write_cases(root, CASES.replace('name = "map"', 'name = "mop"'))
    refuses(root, "candidate eplb/map: no case file has this case; delete it")


def test_bless_refuses_a_damaged_candidate(root):
    record(root, load_cases(root), 1, quiet)
    path = root / "candidates/tensors/eplb/map.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    refuses(root, "candidate eplb/map: its file is missing or damaged")


def test_bless_refuses_what_another_oracle_recorded(root, monkeypatch):
    record(root, load_cases(root), 1, quiet)
    monkeypatch.setattr("megamoe.golden.candidates.generator_id", lambda: "another")
    refuses(root, "the oracle, the inputs or a library have changed since it was recorded")


def test_no_candidates(root):
    refuses(root, "no candidates; make them with `megamoe golden record`")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- errors of a store ------------------------------------------------------------------------


def test_a_damaged_or_missing_golden(blessed):
    case = case_of(blessed, "tiny")
    path = blessed / "tensors/forward/tiny.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(GoldenError, match=r"case forward/tiny: .* is damaged \(sha256 does not"):
        Store(blessed, make).load(case)
    path.unlink()
    with pytest.raises(GoldenError, match=r"case forward/tiny: .*safetensors is missing; restore"):
        Store(blessed, make).load(case)
    errors = verify(blessed, load_cases(blessed), 1, quiet)
    assert len(errors) == 1 and "forward/tiny" in errors[0]  # the run goes on with the others


def test_a_file_that_is_no_safetensors(blessed):
    import hashlib

    path = blessed / "tensors/forward/tiny.safetensors"
    path.write_bytes(b"nonsense")
    manifest = json.loads((blessed / "manifest.json").read_text())
    manifest["cases"]["forward/tiny"]["sha256"] = hashlib.sha256(b"nonsense").hexdigest()
    (blessed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GoldenError, match=r"forward/tiny: .* is no safetensors file"):
        Store(blessed, make).load(case_of(blessed, "tiny"))


def test_a_case_the_manifest_does_not_know_or_knows_otherwise(blessed):
    write_cases(blessed, CASES.replace("tokens = 3", "tokens = 4").replace("small", "smaller"))
    shelf = Store(blessed, make)
    with pytest.raises(GoldenError, match="case staging/smaller: not in the manifest; record"):
        shelf.load(case_of(blessed, "smaller"))
    with pytest.raises(GoldenError, match=r"case eplb/map: all.toml says something else than"):
        shelf.load(case_of(blessed, "map"))


def test_inputs_with_other_bits(blessed):
    with pytest.raises(GoldenError, match="case eplb/map: its inputs were regenerated with other"):
        Store(blessed, make).load(case_of(blessed, "map"), "0" * 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no manifest.json; restore golden/"),
        ("{", r"manifest.json cannot be read as JSON"),
        ("[]", "manifest.json has schema None, this megamoe reads 1"),
        ('{"schema": 2}', "manifest.json has schema 2, this megamoe reads 1"),
        ('{"schema": 1}', "manifest.json has no cases or no contract"),
    ],
)
def test_a_manifest_that_cannot_be_used(blessed, text, message):
    path = blessed / "manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(GoldenError, match=message):
        Store(blessed, make)


def test_verify_sees_a_wrong_golden_that_vouches_for_itself(blessed, monkeypatch):
    """Tensor, file digest and manifest agree with one another; only the oracle disagrees."""
    wrong = make(case_of(blessed, "tiny"))
    wrong.tensors["y"] = wrong.tensors["y"] ^ 1
    with monkeypatch.context() as patch:
        patch.setattr("megamoe.golden.candidates.make", lambda case, inputs, contract: wrong)
        record(blessed, [case_of(blessed, "tiny")], 1, quiet)
    bless(blessed, load_cases(blessed))
    (error,) = verify(blessed, load_cases(blessed), 1, quiet)
    assert error.startswith("case forward/tiny: y differs from what the oracle computes")


def test_a_false_claim_of_zero_freedom_is_not_recorded(root):
    write_cases(root, CASES.replace('"envelope"', '"zero-freedom"'))
    (error,) = record(root, [case_of(root, "tiny")], 1, quiet)
    assert error.startswith("case forward/tiny is declared zero-freedom, but ")


# --- digests ----------------------------------------------------------------------------------


def test_a_large_tensor_is_stored_as_digests_and_comes_from_the_oracle(blessed, monkeypatch):
    monkeypatch.setattr(store, "FULL_LIMIT", 100)
    cases = [case_of(blessed, "tiny")]
    record(blessed, cases, 1, quiet)
    bless(blessed, load_cases(blessed))
    tensors = load_file(blessed / "tensors/forward/tiny.safetensors")
    assert tensors["digest:y"].shape == (2,) and tensors["digest:l2_acts"].shape == (2, 2)
    assert "y" not in tensors
    requests = []
    golden = Store(
        blessed,
        lambda case, classes, contract: requests.append(classes) or make(case, classes=classes),
    ).load(cases[0])
    y = make(cases[0]).tensors["y"]
    assert golden.matches("y", y) and not golden.matches("y", y ^ 1) and not requests
    assert np.array_equal(golden.get("y"), y) and golden.get("l2_acts").shape == (2, 2, 128)
    assert len(requests) == 1
    other = OracleGolden({**make(cases[0]).tensors, "y": y ^ 1})
    with pytest.raises(GoldenError, match="forward/tiny: the oracle's y is not the stored"):
        Store(blessed, lambda case, classes, contract: other).load(cases[0]).get("y")
    assert verify(blessed, cases, 1, quiet) == []


def test_digests_take_every_nan_for_the_same():
    quiet_nan, other = np.array([[0x7FC0]], np.uint16), np.array([[0xFF81]], np.uint16)
    assert row_digests("y", quiet_nan) == row_digests("y", other)
    assert row_digests("y", quiet_nan) != row_digests("y", quiet_nan - 0x40)
    assert canonical("l2_acts_sf", np.array([0xFF], np.uint8)) == [0xFF]
    assert canonical("l2_acts", np.array([0xFF], np.uint8)) == [0x7F]


def test_durations_come_from_reports(blessed):
    report = {
        "cases": [
            {"id": "eplb/map", "status": "pass", "seconds": 1.234},
            {"id": "forward/tiny", "status": "error", "seconds": 120},
            {"id": "unknown/case", "status": "pass", "seconds": 1},
        ]
    }
    assert bless_durations(blessed, [report]) == 2
    assert json.loads((blessed / "durations.json").read_text()) == {"eplb/map": 1.23}


def test_the_store_is_within_its_budget():
    root = golden_root()
    if not root.is_dir():
        pytest.skip(f"no goldens at {root}")
    files = [p for p in root.rglob("*") if p.is_file() and "candidates" not in p.parts]
    size = sum(p.stat().st_size for p in files)
    assert size <= 40 * 2**20, f"golden/ has {size / 2**20:.1f} MiB; at most 40 are allowed"


def test_candidates_are_all_that_record_writes(root):
    before = {p for p in root.rglob("*") if p.is_file()}
    record(root, load_cases(root), 1, quiet)
    new_files = {p for p in root.rglob("*") if p.is_file()} - before
    assert new_files and all(p.is_relative_to(root / "candidates") for p in new_files)
    assert changes.candidates(root).keys() == {c.id for c in load_cases(root)}
