"""Coverage: classes by their edges, the known holes, the witnesses, traffic, the command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megamoe import oracle
from megamoe.cases import golden_root, load_cases, select
from megamoe.cases.stored import StoredProblem, to_bytes
from megamoe.commands.main import main
from megamoe.coverage import gates, groups, holes, kinds, places, rare, recorded
from megamoe.coverage.calls import Call
from megamoe.coverage.counting import classes_of, classes_of_problem, count, shallow
from megamoe.coverage.dimension import Dimension, Tally, brief
from megamoe.coverage.dimensions import dimensions
from megamoe.coverage.ranges import Bands, Ranges
from megamoe.coverage.values import roundings
from megamoe.oracle.groups import scaled_codes
from megamoe.oracle.staging import quantize
from megamoe.report.page import page
from megamoe.spec.contract import MEGAMOE_2026_06, NEWEST, REVISIONS
from megamoe.spec.features import Activation
from megamoe.spec.formats import bf16_round
from megamoe.spec.forms import bits
from tests.helpers.schemas import valid

CASES = {case.id: case for case in load_cases()}
DIMENSIONS = {d.name: d for d in dimensions(NEWEST)}
ROOT = golden_root()


def bf16(*values):
    return bf16_round(np.array(values, np.float64))


# --- the gate: holes are the known ones -------------------------------------------------------


def test_the_record_is_of_these_cases():
    """Whoever adds or changes a case runs `megamoe coverage --record`."""
    of_newest = select(CASES.values(), revision=NEWEST.revision)
    assert recorded.read(ROOT)["cases"] == recorded.digest(of_newest), recorded.AGAIN


@pytest.mark.slow
def test_the_holes_are_the_known_ones():
    """Counted anew from the witnesses: every class that is no known hole, and none that is one."""
    record, tally = recorded.read(ROOT), Tally()
    for name in record["witnesses"]:
        tally.add(name, classes_of(CASES[name]))
    for name in record["shallow"]:
        tally.add(name, shallow(CASES[name]))
    known_holes = holes.read(ROOT, dimensions(NEWEST))
    comparison = holes.compare(tally, dimensions(NEWEST), known_holes)
    assert (comparison.new, comparison.closed) == ([], [])


def test_every_class_of_the_record_is_one_of_today():
    counts = recorded.counts(ROOT)
    assert {n: list(c) for n, c in counts.items()} == {
        d.name: list(d.goal) for d in dimensions(NEWEST)
    }
    zero = {(d, one) for d, one, _ in rare(ROOT)}
    assert zero == set(holes.read(ROOT, dimensions(NEWEST)))
    assert zero < {(d, one) for d, one, _ in rare(ROOT, most=1)}


def test_a_case_enters_dimensions_that_are_there():
    """A name that is written in two ways would be a dimension without a goal."""
    names = ("staging/top-3-stride", "eplb/all-slots-masked", "layout/every-scale-byte-kept",
             "errors/over-capacity-by-far", "forward/token-block-edge-t9",
             "property/padding-rows-broken-by-rounding")  # fmt: skip
    for name in names:
        assert set(classes_of(CASES[name])) <= set(DIMENSIONS), name


@pytest.mark.parametrize("contract", REVISIONS.values(), ids=list(REVISIONS))
def test_goals_follow_the_contract(contract):
    by_name = {d.name: d for d in dimensions(contract)}
    assert len(by_name) == len(dimensions(contract))
    assert all(d.goal and all(d.goal.values()) for d in by_name.values())
    lowest = contract.requant_exponent_min.value
    assert min(by_name["act-bytes"].goal) == f"0x{lowest:02x}"
    assert ("below the floor" in by_name["act-branches"].goal) == (lowest > 0)
    assert ("nvfp4-w2-bytes" in by_name) == ("nvfp4" in contract.features.value)


def test_bytes_of_staging_are_those_of_every_amax():
    """By hand: the floor 1e-4 gives 2^-22, the largest bfloat16 2^120, infinity the bound."""
    assert groups.staging_bytes(NEWEST) == (*range(127 - 22, 127 + 121), 254)
    assert groups.requant_bytes(NEWEST) == tuple(range(105, 248))
    assert groups.requant_bytes(MEGAMOE_2026_06)[-1] == 255


# --- classes by their edges -------------------------------------------------------------------


def test_ranges_and_bands():
    ranges = Ranges((0, 1, 3, 8))
    assert ranges.classes == ["0", "1", "2", "3", "4 to 7", "8", "above 8"]
    assert [ranges.of(n) for n in (0, 2, 3, 4, 7, 8, 9)] == [
        "0", "2", "3", "4 to 7", "4 to 7", "8", "above 8",
    ]  # fmt: skip
    bands = Bands((1, 2, 3, 8))
    assert bands.classes == ["1", "2", "3 to 7", "8 and above"]
    assert [bands.of(n) for n in (0, 7, 8, 99)] == ["0", "3 to 7", "8 and above", "8 and above"]


def test_neighbours_are_one_run_in_the_order_of_the_goal():
    assert brief(["d", "a", "b"], "abcd") == ["a..b", "d"]


def rounded(*values):
    """How these numbers, under a scale of 1, become codes."""
    row = np.zeros(32, np.float32)
    row[: len(values)] = values
    sf = np.array([127], np.uint8)
    return groups.roundings(row, sf, scaled_codes(row, sf, NEWEST)) - {"+normal exact"}


@pytest.mark.parametrize(
    ("value", "how"),
    [
        (1.0625, "+normal tie down"),
        (1.1875, "+normal tie up"),
        (-1.0625, "-normal tie down"),
        (1.07, "+normal up"),
        (1.05, "+normal down"),
        (449.0, "+saturated"),
        (-np.inf, "-saturated"),
        (2.0**-10, "+tie to zero"),
        (-(2.0**-11), "-to zero"),
        (2.0**-9, "+subnormal exact"),
        (2.0**-9 * 1.5, "+subnormal tie up"),
        (2.0**-9 * 2.5, "+subnormal tie down"),
        (2.0**-9 * 0.6, "+subnormal up"),
        (-(2.0**-9) * 1.4, "-subnormal down"),
        (2.0**-9 * 7.5, "+normal tie up"),
        (np.nan, "NaN"),
        (448.0, None),
    ],
)
def test_rounding_of_a_code(value, how):
    assert rounded(value) == ({how} if how else set())
    assert how is None or how in groups.rounding_goal()


@pytest.mark.parametrize(
    ("bits", "branch"),
    [
        (0x43E0, {"exact power"}),  # 448
        (0x43E1, {"rounded up", "one step above a power"}),
        (0x43DF, {"rounded up", "one step below a power"}),
        (0x3F80, {"rounded up"}),
        (0x38D1, {"below the floor"}),  # the largest bfloat16 below 1e-4
        (0x38D2, {"rounded up"}),
        (0x0000, {"zero"}),
        (0x7F80, {"infinite"}),
        (0x7FC0, {"NaN alone"}),
    ],
)
def test_branch_of_a_staged_scale(bits, branch):
    assert groups.staging_branches(np.full((1, 32), bits, np.uint16), NEWEST) == branch


def test_branch_of_a_requantised_scale():
    one = np.full((1, 32), np.float32(448))
    above = np.nextafter(one, np.float32(np.inf))
    assert groups.requant_branches(one, NEWEST) == {"exact power"}
    assert groups.requant_branches(above, NEWEST) == {"rounded up", "one step above a power"}
    floored = np.full((1, 32), np.float32(2.0**-23))
    assert groups.requant_branches(floored, NEWEST) == {"below the floor"}
    assert "below the floor" not in groups.requant_branches(floored, MEGAMOE_2026_06)
    one[0, 3] = np.nan
    assert groups.requant_branches(one, NEWEST) == {"exact power", "NaN beside numbers"}


def test_a_large_scale_byte_is_no_rounding():
    """Byte 255 is NaN, whatever the codes beside it are."""
    row, sf = np.ones(32, np.float32), np.array([255], np.uint8)
    assert groups.roundings(row, sf, np.zeros(32, np.uint8)) == set()


def test_rounding_of_a_sum():
    sums = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-140, 6.8e38, 1.0])
    assert roundings(sums) == {"tie down", "tie up", "to zero", "to infinity", "exact"}
    assert roundings(np.array([1.001, -1.007, np.nan])) == {"down", "up", "NaN"}
    assert roundings(np.array([2.0**-127])) == {"exact", "subnormal"}


def test_nibbles_keep_their_place():
    assert groups.nibbles(np.array([0x31, 0x01], np.uint8)) == ["low 0x1", "high 0x0", "high 0x3"]


def test_regions_of_the_gate():
    regions = gates.regions(
        bf16(0.0, -0.0, 1.5, -88.5, -89.0, 2.0**-17, 300.0, -np.inf, np.nan, 1e-39)
    )
    assert regions == {
        "+0", "-0", "+2^0", "-2^6", "-2^6, exp infinite", "+below 2^-16", "+2^7 and above", "-inf",
        "NaN", "+subnormal",
    }  # fmt: skip
    assert regions <= set(gates.REGIONS)


def test_sides_of_the_clamp():
    act = Activation("swiglu", 10.0, 1.0, 0.0, True)
    sides = gates.clamp_sides(bf16(10.0, 10.0625, -11.0), bf16(-10.0, -10.0625, np.inf), act)
    assert sides == {
        "gate at the bound", "gate above", "gate below minus the bound", "up at minus the bound",
        "up below", "up infinite",
    }  # fmt: skip
    assert gates.clamp_sides(bf16(1), bf16(1), replace(act, clamp=None)) == {"no clamp"}
    assert gates.clamp_sides(bf16(-10), bf16(1), act) == {
        "up between"
    }  # neither beyond nor between
    odd = gates.clamp_sides(bf16(1), bf16(1), replace(act, clamp=10.01))
    assert odd == {"clamp that bfloat16 does not hold", "gate between", "up between"}
    assert "clamp 0" in gates.clamp_sides(bf16(1), bf16(1), replace(act, clamp=0.0))


def test_special_numbers():
    assert gates.special_bf16(bf16(1.0)) == []
    assert gates.special_bf16(bf16(-0.0, 1e-39, np.inf)) == ["+inf", "-0", "+subnormal"]
    assert gates.special_f32(np.array([np.nan, -1e-40], np.float32)) == ["NaN", "-subnormal"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([[0, 1], [2, 3]], {"uniform", "the first expert", "the last expert", "ids ascending"}),
        ([[3, -1]], {"one expert takes all", "experts without rows", "the last expert", "skewed",
                     "the last expert alone", "some slots masked", "the last slot masked"}),
        ([[-1, -1]], {"every slot masked"}),
        ([[2, 2]], {"one expert takes all", "experts without rows", "an expert twice in a token"}),
        ([[2, 1], [-1, -1]], {"experts without rows", "some slots masked", "ids not ascending",
                              "a token without slots"}),
    ],
)  # fmt: skip
def test_patterns_of_routing(ids, expected):
    assert places.routing(np.array(ids), 4) - {"skewed"} == expected - {"skewed"}
    assert expected <= set(places.ROUTES)


def test_a_place_in_a_tile_counts_where_the_row_is_judged():
    case = CASES["forward/token-block-edge-t9"]
    call = Call.of_case(case)
    one = replace(call, ids=np.zeros((9, 1), np.int64), rows=np.arange(9))
    tiles = places.places(one, {})["tiles"]
    assert {t for t in tiles if t.startswith("8:")} == {
        "8: first row", "8: last row", "8: last row of a part", "8: alone in a part",
        "8: second tile or later",
    }  # fmt: skip
    middle = places.places(replace(one, rows=np.array([3])), {})
    assert {t for t in middle["tiles"] if t.startswith("8:")} == set()
    assert middle["rows-per-expert"] >= {"9"}


def test_offsets_end_where_the_last_judged_row_ends():
    call = Call.of_case(CASES["forward/token-block-edge-t9"])
    far = replace(call, hidden=4096, inter=2048, ids=np.full((1, 1), 255), rows=np.arange(1))
    offsets = places.offsets(far)  # 256 * 4096 * 4096 / 2 = 2^31: exactly so far is not beyond
    assert (
        "w13_weight bytes beyond 2^24" in offsets and "w13_weight bytes beyond 2^31" not in offsets
    )
    farther = places.offsets(replace(far, ids=np.full((1, 1), 256)))
    assert "w13_weight bytes beyond 2^31" in farther


def test_a_shallow_count_is_what_the_whole_count_says():
    for name in ("forward/token-block-edge-t9", "property/padding-rows-broken-by-rounding"):
        classes = classes_of(CASES[name])
        assert shallow(CASES[name]) == {n: c for n, c in classes.items() if n in places.SHALLOW}


def test_codes_are_those_of_the_oracle():
    """A small case against the oracle's own forward."""
    call = Call.of_case(CASES["forward/token-block-edge-t9"])
    golden = oracle.forward(call.problem, (), contract=NEWEST)
    live = call.problem.topk_ids.numpy() >= 0
    classes = classes_of(CASES["forward/token-block-edge-t9"])
    assert classes["act-codes"] == {f"0x{c:02x}" for c in np.unique(golden.codes[live])}
    assert classes["act-bytes"] == {f"0x{c:02x}" for c in np.unique(golden.sf[live])}
    x, _ = quantize(bits(call.problem.hidden_states), NEWEST)
    assert classes["x-codes"] == {f"0x{c:02x}" for c in np.unique(x)}


def test_a_call_that_is_too_large_is_sampled(monkeypatch):
    """What a sample enters, the whole enters; and the sample leaves the slot rows out."""
    case = CASES["forward/token-block-edge-t9"]
    whole = classes_of(case)
    monkeypatch.setattr("megamoe.coverage.values.BUDGET", 40_000)
    sample = classes_of(case)
    assert "row-rounding" in whole and "row-rounding" not in sample
    assert all(classes <= whole[name] for name, classes in sample.items())
    assert sample["act-codes"] < whole["act-codes"]


def test_the_remap_sees_ids_that_wrap():
    classes = kinds.eplb(CASES["eplb/wide-ids-not-cast-to-int32-first"], NEWEST)
    assert "wraps into the map" in classes["eplb-ids"]
    assert kinds.eplb(CASES["eplb/one-expert-top-1"], NEWEST)["eplb-ids"] == {"local"}


# --- known holes ------------------------------------------------------------------------------

SMALL = (Dimension("one", "a letter", {"a": "A.", "b": "B.", "c": "C."}),)


def test_holes_are_compared_with_the_known_ones(tmp_path):
    (tmp_path / "holes.toml").write_text('[one]\n"a..b" = "Why."\n')
    known_holes = holes.read(tmp_path, SMALL)
    tally = Tally()
    tally.add("case", {"one": {"b"}})
    comparison = holes.compare(tally, SMALL, known_holes)
    assert (comparison.new, comparison.closed) == ([("one", "c")], [("one", "b")])
    assert holes.text(known_holes, SMALL).endswith('[one]\n"a..b" = "Why."\n')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[two]\n", "no dimension 'two'"),
        ('[one]\n"z" = "x"\n', "has no class 'z'"),
        ('[one]\n"c..a" = "x"\n', "the first comes after the last"),
        ('[one]\n"a" = " "\n', "'a' has no reason"),
        ('[one]\n"a" = "x"\n"a..b" = "y"\n', "'a' is listed twice"),
        ("[one", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_of_holes_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "holes.toml").write_text(content)
    with pytest.raises(holes.HolesError, match=message) as error:
        holes.read(tmp_path, SMALL)
    assert "\n" not in str(error.value)


def test_witnesses_are_few_cheap_and_enough():
    by_case = {"a": {"one": {"a", "b", "c"}}, "b": {"one": {"a"}}, "c": {"one": {"b", "c"}}}
    cheap = {"a": 9.0, "b": 1.0, "c": 1.0}
    assert recorded.witnesses(by_case, cheap, SMALL) == ["b", "c"]
    assert recorded.witnesses(by_case, {**cheap, "a": 0.1}, SMALL) == ["a"]
    assert recorded.witnesses(by_case, cheap, SMALL, before=["b"]) == ["c"]
    # The first choice becomes needless by the two that follow it.
    four = (Dimension("one", "a letter", dict.fromkeys("abcd", "F.")),)
    needless = {"p": {"one": {"b", "c"}}, "q": {"one": {"a", "b"}}, "r": {"one": {"c", "d"}}}
    assert recorded.witnesses(needless, {"p": 1.0, "q": 1.1, "r": 1.1}, four) == ["q", "r"]


def test_a_record_of_another_form_is_refused(tmp_path):
    (tmp_path / "coverage.json").write_text('{"contract": "x", "cases": 3}')
    with pytest.raises(ValueError, match="its 'cases' is missing or of a wrong type"):
        recorded.read(tmp_path)
    with pytest.raises(ValueError, match="megamoe coverage --record"):
        rare(tmp_path / "none")


# --- the command ------------------------------------------------------------------------------

ONE = ["coverage", "--case", "staging/top-3-stride", "-j", "1"]


def test_the_table_and_both_files(tmp_path, capsys):
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    assert main([*ONE, "--json", str(out), "--page", str(html)]) == 0
    assert "1 case enters" in capsys.readouterr().out
    document = json.loads(out.read_text())
    valid("coverage", document)
    top_k = next(d for d in document["dimensions"] if d["name"] == "staging-top-k")
    three = next(c for c in top_k["classes"] if c["class"] == "3")
    assert (top_k["reached"], three["cases"], three["examples"]) == (
        1, 1, ["staging/top-3-stride"],
    )  # fmt: skip
    text = html.read_text()
    assert "of what the cases enter" in text and "Staging of top-7 loses slots." in text


def test_one_dimension_shows_every_class(capsys):
    assert main([*ONE, "--dimension", "staging-padding"]) == 0
    out = capsys.readouterr().out
    assert all(one in out for one in kinds.PADDING) and "staging-top-k" not in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dimension", "none"], "unknown dimension 'none'"),
        (["--record"], "--record counts all cases"),
        (["--traffic", "/nowhere"], "is no directory"),
    ],
)
def test_misuse_is_one_line(more, message, capsys):
    assert main([*ONE, *more]) == 2
    assert message in capsys.readouterr().err


def test_traffic_that_no_case_enters(tmp_path, capsys):
    call = Call.of_case(CASES["forward/token-block-edge-t9"])
    (tmp_path / "a.safetensors").write_bytes(to_bytes(StoredProblem(call.problem)))
    out = tmp_path / "out.json"
    more = ["--traffic", str(tmp_path), "--json", str(out), "--page", str(tmp_path / "p.html")]
    assert main([*ONE, *more]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    by_dimension = classes_of_problem(call.problem)
    total = sum(len(classes) for classes in by_dimension.values())
    assert line == f"1 captured call enters {total} classes; {total} of these no case enters"
    document = json.loads(out.read_text())
    valid("coverage", document)
    rows = {d["name"]: d for d in document["traffic"]["dimensions"]}
    assert rows["tokens"]["missing"] == {"9": ["a.safetensors"]}
    assert "a.safetensors" in (tmp_path / "p.html").read_text()


def test_traffic_that_the_cases_enter_is_not_listed(tmp_path, capsys):
    call = Call.of_case(CASES["forward/token-block-edge-t9"])
    (tmp_path / "a.safetensors").write_bytes(to_bytes(StoredProblem(call.problem)))
    same = ["coverage", "--case", "forward/token-block-edge-t9", "-j", "1"]
    assert main([*same, "--traffic", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; 0 of these no case enters")


def test_two_processes_count_the_same():
    cases = [CASES[n] for n in ("staging/top-3-stride", "errors/over-capacity-by-far")]
    assert count(cases, jobs=1).classes == {c.id: classes_of(c) for c in cases}


def test_the_page_names_a_new_hole():
    document = {"kind": "coverage", "cases": 1, "contract": "x", "dimensions": [
        {"name": "d", "unit": "u", "classes": [
            {"class": "a", "cases": 0, "fault": "<b>", "known": None},
            {"class": "c", "cases": 0, "fault": "F", "known": "Why."},
        ]},
    ]}  # fmt: skip
    html = page("coverage", document).decode()
    assert "1 new hole<" in html and "&lt;b&gt;" in html and "Why." in html
