"""What a report draws of a failure agrees with what the judge found, and stays small."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megamoe.judge import Place, bitwise, detail, interval
from megamoe.spec.forms import BF16, E4M3, INT64
from megamoe.suite import check
from megamoe.suite.settings import Settings
from tests.helpers import results

AXES = ("token", "channel")


def bf16(*values: float) -> np.ndarray:
    wide = np.array([values], dtype=np.float32).view(np.uint32)
    return (wide >> 16).astype(np.uint16)


def test_distances_are_signed_and_counted_by_their_bits() -> None:
    right = bf16(1, 1, 1, 1, 1)
    actual = right + np.array([[0, 1, 3, -1, -9]], dtype=np.int16).astype(np.uint16)
    counts = detail.measure("y", BF16, actual, right, right, AXES)
    assert (counts["inside"], counts["outside"]) == (1, 4)
    assert counts["above"] == {"1": 1, "2": 1}, "1 ULP; 2 and 3 together"
    assert counts["below"] == {"1": 1, "4": 1}, "1 ULP; 8 to 15 together"
    assert counts["widths"] == {"0": 5}
    assert counts["map"]["cells"] == [".1214"]


def test_the_distance_is_from_the_nearest_end_of_the_envelope() -> None:
    low, high = bf16(1, 1, 1), bf16(1, 1, 1) + np.uint16(4)
    counts = detail.measure("y", BF16, low + np.array([[2, 4, 5]], np.uint16), low, high, AXES)
    assert (counts["inside"], counts["above"], counts["widths"]) == (2, {"1": 1}, {"3": 3})


def test_nan_and_the_sign_of_zero_are_no_distances() -> None:
    right = bf16(1, 0, np.nan, np.nan)
    actual = bf16(np.nan, -0.0, np.nan, 1)
    counts = detail.measure("y", BF16, actual, right, right, AXES)
    assert (counts["nan"], counts["zero"], counts["inside"]) == (2, 1, 1)
    assert counts["map"]["cells"] == ["z0.z"]


def test_what_is_not_live_is_not_counted() -> None:
    right, actual = np.zeros((2, 1, 4), np.uint8), np.ones((2, 1, 4), np.uint8)
    live = np.array([[[True]], [[False]]])
    axes = ("token", "slot", "channel")
    counts = detail.measure("l2_acts", E4M3, actual, right, right, axes, 1, live)
    assert (counts["outside"], counts["inside"]) == (4, 0)
    assert counts["map"]["cells"] == ["1111", "...."]


def test_a_large_tensor_has_a_small_map_of_worst_cells() -> None:
    right = np.full((100, 7168), 0x3F80, np.uint16)
    actual = right.copy()
    actual[99, 7167] += 5
    counts = detail.measure("y", BF16, actual, right, right, AXES, tokens=range(1000, 1100))
    cell_map = counts["map"]
    assert len(cell_map["cells"]) <= detail.ROWS and len(cell_map["cells"][0]) <= detail.COLUMNS
    assert "".join(cell_map["cells"]).strip(".") == "3" and cell_map["cells"][-1].endswith("3")
    assert (cell_map["rows"], cell_map["channels"], cell_map["row_step"]) == (100, 7168, 3)
    assert cell_map["labels"][:2] == [1000, 1003]


def test_an_id_that_is_far_off_still_has_a_level() -> None:
    right, actual = np.zeros((1, 2), np.int64), np.array([[1 << 40, 0]])
    counts = detail.measure("ids", INT64, actual, right, right, ("token", "slot"))
    assert counts["map"]["cells"] == ["y"] and counts["above"] == {"41": 1}


@pytest.mark.parametrize("seed", range(20))
def test_it_counts_what_the_judge_counts(seed: int) -> None:
    """Any bits, zeros and NaN among them: the comparer and the detail know the same rules."""
    few = np.array([0, 0x8000, 1, 0x8001, 0x3F80, 0x3F82, 0xBF80, 0x7F80, 0x7FC0, 0xFFC1])
    random = np.random.default_rng(seed)
    actual, one, other = random.choice(few.astype(np.uint16), (3, 6, 8))
    nan = BF16.is_nan(one) | BF16.is_nan(other)
    swap = BF16.key(one) > BF16.key(other)
    low, high = np.where(swap, other, one), np.where(swap, one, other)
    low, high = np.where(nan, 0x7FC0, low), np.where(nan, 0x7FC0, high)
    place = Place(AXES)
    for pair in ((low, high), (one, one)):
        finding = interval("y", BF16, actual, *pair, place)
        counts = detail.measure("y", BF16, actual, *pair, AXES)
        assert counts["outside"] == finding.outside
        sides = sum([*counts["below"].values(), *counts["above"].values()])
        assert sides + counts["nan"] + counts["zero"] == finding.outside
        assert counts["inside"] + counts["outside"] == actual.size
    assert counts["outside"] == bitwise("y", BF16, actual, one, place).outside


def test_a_detail_that_counts_otherwise_is_not_kept() -> None:
    right, actual = bf16(1, 1), bf16(1, 2)
    finding = bitwise("y", BF16, actual, right, Place(AXES))
    counts = detail.measure("y", BF16, actual, right, right, AXES)
    assert detail.agreeing([counts], [finding]) == [counts]
    assert detail.agreeing([{**counts, "outside": 7}], [finding]) == []


def test_every_stage_that_fails_in_a_real_run_has_its_detail() -> None:
    bad = {c["id"]: c for c in results.run()["cases"] if c["status"] == "fail"}
    assert set(bad) == {results.POINT, results.STAGED, results.STAGING}
    for case in bad.values():
        failures = {f["stage"]: f["outside"] for f in case["findings"] if f["outside"]}
        assert {d["stage"]: d["outside"] for d in case["details"]} == failures
        assert len(json.dumps(case["details"])) < 16_000
    assert {d["stage"] for d in bad[results.STAGED]["details"]} == {"l2_acts", "y"}
    assert bad[results.STAGING]["details"][0]["map"]["row_step"] == 2


HELPERS = Path(results.__file__).parent
BACKEND = f"""
import sys
sys.path.insert(0, {str(HELPERS.parents[1])!r})
from tests.helpers.results import Faulty
"""


def test_it_comes_through_from_the_process_that_judged(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(BACKEND)
    settings = Settings(f"{tmp_path / 'faulty.py'}:Faulty", case=results.POINT)
    report = check.check(settings, 1, 1, Console(file=io.StringIO())).report
    (case,) = report["cases"]
    assert [d["stage"] for d in case["details"]] == ["y"]
    assert case["sizes"]["tokens"] == 9 and case["breaks"].endswith(".")
    assert len(report["goldens"]["manifest_sha256"]) == 64
