"""The judge: what counts as equal, what counts as inside, and what a red says."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from megamoe import oracle
from megamoe.judge import elements, judgements
from megamoe.judge.detail import measure
from megamoe.judge.elements import Place, bitwise, interval, key_interval
from megamoe.judge.outputs import BadOutput, forward_bits
from megamoe.judge.picture import picture
from megamoe.judge.verdict import Verdict, of_findings
from megamoe.report.failures import worst_line
from megamoe.spec.contract import BASE
from megamoe.spec.formats import e4m3_key
from megamoe.spec.forms import BF16, E4M3, F32, INT32, INT64, UE8M0, bits
from megamoe.spec.problem import Problem

ONE, ZERO, MINUS_ZERO, NAN, OTHER_NAN, INF = 0x3F80, 0, 0x8000, 0x7FC0, 0xFFC1, 0x7F80
MINUS_INF = 0xFF80
FLAT = Place(("token", "channel"))


def u16(*values):
    return np.array([values], dtype=np.uint16)


# --- bitwise ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected", "good"),
    [
        (ONE, ONE, True),
        (ONE, ONE + 1, False),
        (MINUS_ZERO, ZERO, False),
        (NAN, NAN, True),
        (OTHER_NAN, NAN, True),  # which payload is not part of the contract
        (NAN, INF, False),
        (INF, NAN, False),
        (INF, INF | 0x8000, False),
    ],
)
def test_bitwise(actual, expected, good):
    assert bitwise("y", BF16, u16(actual), u16(expected), FLAT).bad is not good


def test_e4m3_and_f32_know_their_nans():
    codes = np.array([[0x7F, 0xFF]], np.uint8)
    assert not bitwise("x", E4M3, codes, codes[:, ::-1], FLAT).bad
    assert bitwise("x", UE8M0, codes, codes[:, ::-1], FLAT).outside == 2
    nans = np.array([[np.nan, -np.nan]], np.float32).view(np.uint32)
    assert not bitwise("w", F32, nans, nans[:, ::-1].copy(), FLAT).bad
    assert BF16.text(ONE) == "1" and BF16.hex(ONE) == "0x3f80"
    assert INT32.text(np.int32(-1)) == "-1" and INT32.hex(np.int32(-1)) == "0xffffffff"


# --- intervals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "low", "high", "ulps"),
    [
        (ONE, ONE, ONE, ()),
        (ONE, ONE - 1, ONE + 1, ()),
        (ONE + 1, ONE, ONE + 1, ()),  # inclusive
        (ONE + 3, ONE, ONE + 1, 2),
        (ONE - 2, ONE, ONE + 1, 2),
        (ONE | 0x8000, ONE, ONE, 2 * ONE),  # the distance counts every value between
        (MINUS_ZERO, ZERO, ZERO, 0),  # the one value zero keeps its sign
        (ZERO, MINUS_ZERO, MINUS_ZERO, 0),
        (ZERO, MINUS_ZERO, ZERO, ()),
        (MINUS_ZERO, MINUS_ZERO, ZERO, ()),
        (MINUS_ZERO, ZERO, ONE, ()),  # inside by value
        (1, MINUS_ZERO, ZERO, 1),
        (NAN, ZERO, INF, None),
        (OTHER_NAN, NAN, NAN, ()),
        (ONE, NAN, NAN, None),
        (INF, ONE, INF, ()),
        (NAN, MINUS_INF, INF, ()),  # an order that overflows both ways ends in inf - inf
        (NAN, MINUS_INF, ONE, None),
    ],
)
def test_interval(actual, low, high, ulps):
    finding = interval("y", BF16, u16(actual), u16(low), u16(high), FLAT)
    if ulps == ():
        assert not finding.bad
    else:
        assert finding.outside == 1 and finding.worst.ulps == ulps


@pytest.mark.parametrize(("low", "high"), [(NAN, ONE), (ONE, NAN), (ONE, ZERO)])
def test_a_golden_that_is_no_interval_is_refused(low, high):
    with pytest.raises(ValueError, match=r"y at \[0, 0\]: the golden's interval has no order"):
        interval("y", BF16, u16(ONE), u16(low), u16(high), FLAT)


def test_key_interval_of_codes():
    codes = np.arange(256, dtype=np.uint8)[None]
    keys = e4m3_key(codes)
    keys[0, 0xFF] = 0x7F  # one NaN, whatever its sign
    assert not key_interval("a", E4M3, codes, keys, keys, FLAT).bad
    low, high = keys.copy(), keys.copy()
    low[0, 0x35] += 1
    high[0, 0x35] += 1
    high[0, 0xB5] -= 1
    low[0, 0xB5] -= 1
    assert key_interval("a", E4M3, codes, low, high, FLAT).outside == 2


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_nan_has_no_sign(code):
    codes, zero = np.array([[code]], np.uint8), np.zeros((1, 1), int)
    assert not key_interval("a", E4M3, codes, zero, zero + 0x7F, FLAT).bad
    assert key_interval("a", E4M3, codes, zero, zero + 0x7E, FLAT).bad
    assert key_interval("a", E4M3, codes, zero - 0x7E, zero, FLAT).bad


# --- what a finding says ----------------------------------------------------------------------


def test_worst_element_tallies_and_map_find_a_single_bad_row_of_one_tile():
    ids = np.array([[4, 2], [4, 7], [1, -1]])
    expected = np.full((3, 512), ONE, np.uint16)
    actual = expected.copy()
    actual[1, 256:384] = ONE + 1
    actual[1, 300] = ONE + 9
    place = Place(("token", "channel"), 1, [10, 20, 30], ids)
    finding = bitwise("y", BF16, actual, expected, place)
    assert (finding.outside, finding.total) == (128, 1536)
    assert (
        finding.rows == {20: 128}
        and finding.tiles == {2: 128}
        and finding.experts == {4: 128, 7: 128}
    )
    assert finding.grid == ((1, 2, 128),) and finding.shape == (3, 4)
    assert finding.tokens == (10, 20, 30)
    assert finding.worst.line() == (
        "y at token 20 channel 300: expected 1 (0x3f80), got 1.07031 (0x3f89), 9 ULP outside"
    )


def test_slots_resolve_to_experts_and_scales_to_channels():
    ids = np.array([[4, 2]])
    sf = np.full((1, 2, 8), 120, np.uint8)
    wrong = sf.copy()
    wrong[0, 1, 5] = 121
    finding = bitwise("sf", UE8M0, wrong, sf, Place(("token", "slot", "channel"), 32, None, ids))
    worst = finding.worst
    assert (worst.token, worst.slot, worst.expert, worst.channel) == (0, 1, 2, 160)
    assert finding.tiles == {1: 1} and finding.experts == {2: 1} and finding.shape == (1, 2)


def test_only_live_elements_count():
    live = np.array([[True, False]])
    finding = bitwise("y", BF16, u16(ONE, ONE), u16(ONE, ZERO), FLAT, live)
    assert not finding.bad and finding.total == 1


def test_nan_is_the_worst():
    finding = bitwise("y", BF16, u16(ONE + 500, NAN), u16(ONE, ONE), FLAT)
    assert finding.worst.channel == 1 and finding.worst.ulps is None
    assert "got nan (0x7fc0), NaN on one side" in finding.worst.line()


def test_the_grid_is_capped(monkeypatch):
    monkeypatch.setattr(elements, "GRID_LIMIT", 3)
    finding = bitwise("y", BF16, np.ones((9, 1), np.uint16), np.zeros((9, 1), np.uint16), FLAT)
    assert finding.outside == 9 and len(finding.grid) == 3


def test_a_verdict_survives_json():
    finding = bitwise("y", BF16, u16(ONE, NAN), u16(ZERO, ONE), FLAT)
    verdict = of_findings("forward/a", "forward", [finding], ("bitwise",))
    again = Verdict.from_dict(json.loads(json.dumps(verdict.to_dict())))
    assert again == verdict and again.status == "fail"
    assert again.reason == "y: 2 of 2 outside"
    with pytest.raises(ValueError, match="unknown status 'passed'"):
        Verdict("a", "forward", "passed")


def test_the_picture_shows_place_size_and_command():
    actual = np.zeros((50, 1024), np.uint16)
    actual[13, 128:192] = 1
    finding = bitwise("y", BF16, actual, np.zeros_like(actual), FLAT)
    text = picture(of_findings("forward/a", "forward", [finding], ("bitwise",)), "my file.py:K")
    assert "FAIL forward/a: y: 64 of 51200 outside" in text
    assert "map     50 rows x 8 tiles of 128 channels; @ is 64 elements\n" in text
    assert text.partition("is 64 elements\n")[2].splitlines()[:3] == [
        "        0 ........  13 rows alike: 0 to 12",
        "       13 .@......",
        "       14 ........  36 rows alike: 14 to 49",
    ]
    assert "alone:  megamoe check --backend 'my file.py:K' --case forward/a" in text


def test_counts_by_expert_that_add_up_to_more_than_the_elements_say_why():
    """An element of y is a sum over the experts of its token; a code is of one expert."""
    ids = np.array([[4, 2]])
    y = bitwise("y", BF16, u16(ONE), u16(ZERO), Place(("token", "channel"), 1, None, ids))
    code = bitwise("l2_acts", E4M3, np.array([[[1], [0]]], np.uint8), np.zeros((1, 2, 1), np.uint8),
                   Place(("token", "slot", "channel"), 1, None, ids))  # fmt: skip
    text = picture(of_findings("forward/a", "forward", [code, y], ("bitwise",)), "k.py:K")
    assert "  experts 4: 1\n" in text
    assert "  experts 2: 1, 4: 1; an element of y counts for each expert of its token\n" in text


@pytest.mark.parametrize(
    ("tokens", "lines"),
    [
        ([0, 8, 63, 64], ["        0 ..", "        8 ..", "       63 ..", "       64 .@"]),
        ([3, 2, 1, 0], ["        0 .@", "        1 ..", "        2 ..", "        3 .."]),
        ([5, 5, 5, 6], ["        5 ..", "        5 ..", "        5 ..", "        6 .@"]),
    ],
)  # fmt: skip
def test_the_map_names_tokens_as_the_other_lines_do(tokens, lines):
    """A case may judge a few of its tokens, and a law gives them in another order."""
    actual = np.zeros((4, 256), np.uint16)
    actual[3, 128:] = 1
    place = Place(("token", "channel"), 1, tokens)
    finding = bitwise("y", BF16, actual, np.zeros_like(actual), place)
    verdict = of_findings("forward/a", "forward", [finding], ("bitwise",))
    text = picture(Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))), "k.py:K")
    assert text.partition("is 128 elements\n")[2].splitlines()[:4] == lines
    assert f"at token {tokens[3]} channel" in text and f"rows    {tokens[3]}: 128" in text


def test_rows_alike_are_named_by_their_tokens():
    actual = np.zeros((30, 128), np.uint16)
    actual[29] = 1
    place = Place(("token", "channel"), 1, range(100, 160, 2))
    finding = bitwise("y", BF16, actual, np.zeros_like(actual), place)
    text = picture(of_findings("forward/a", "forward", [finding], ("bitwise",)), "k.py:K")
    assert "\n      100 .  29 rows alike: 100 to 156\n      158 @\n" in text


@pytest.mark.parametrize(
    ("actual", "says"),
    [(7, "too large by 2"), (-1, "too small by 6"), (-(2**63), f"too small by {2**63 + 5}"),
     (2**63 - 1, f"too large by {2**63 - 6}")],
)  # fmt: skip
def test_whole_numbers_have_a_difference_of_the_right_sign(actual, says):
    """The difference of two ids may not fit in an int64."""
    right = np.array([[5]])
    finding = bitwise("ids", INT64, np.array([[actual]]), right, Place(("token", "slot")))
    assert f", {says}" in finding.worst.line() and finding.outside == 1
    detail = measure("ids", INT64, np.array([[actual]]), right, right, ("token", "slot"))
    assert bool(detail["above"]) == (actual > 5) and bool(detail["below"]) == (actual < 5)


def test_rows_of_many_looks_are_joined():
    actual = np.zeros((50, 128), np.uint16)
    actual[::2] = 1
    finding = bitwise("y", BF16, actual, np.zeros_like(actual), FLAT)
    text = picture(of_findings("forward/a", "forward", [finding], ("bitwise",)), "k.py:K")
    assert "map     50 rows x 1 tile of 128 channels, one character for 3 x 1; @ is 256" in text
    assert "\n        0 @\n        3 *\n" in text


@pytest.mark.parametrize(
    ("actual", "says"),
    [
        (0, "expected 2^-2 (0x7d), got 2^-127 (0x00), too small by a factor of 2^125"),
        (126, "expected 2^-2 (0x7d), got 2^-1 (0x7e), too large by a factor of 2"),
        (255, "expected 2^-2 (0x7d), got NaN (0xff), NaN on one side"),
    ],
)
def test_a_scale_byte_is_wrong_by_a_factor_and_says_in_which_direction(actual, says):
    byte = np.array([[125]], np.uint8)
    finding = bitwise("l2_acts_sf", UE8M0, np.full_like(byte, actual), byte, FLAT)
    assert finding.worst.line() == f"l2_acts_sf at token 0 channel 0: {says}"
    assert worst_line(json.loads(json.dumps(asdict(finding.worst)))) == f"token 0 channel 0: {says}"


# --- what a backend returns -------------------------------------------------------------------


def problem(tokens=2, hidden=128, inter=128, experts=3, slots=2, seed=0):
    rng = np.random.default_rng(seed)

    def byte(*shape, low=0, high=256):
        return torch.from_numpy(rng.integers(low, high, shape, dtype=np.uint8))

    ids = np.stack([rng.permutation(experts)[:slots] for _ in range(tokens)])
    return Problem(
        torch.from_numpy(rng.standard_normal((tokens, hidden)).astype(np.float32)).bfloat16(),
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(rng.uniform(0.3, 1, (tokens, slots)).astype(np.float32)),
        byte(experts, 2 * inter, hidden // 2),
        byte(experts, 2 * inter, hidden // 32, low=118, high=121),
        byte(experts, hidden, inter // 2),
        byte(experts, hidden, inter // 32, low=118, high=121),
        10.0,
        True,
        384,
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "forward returned NoneType; return y as a torch.Tensor, or a mapping with 'y'"),
        ({"x": torch.zeros(2, 128)}, r"forward returned \['x'\] without 'y'; add it"),
        (torch.zeros(2, 128), "y has dtype float32, expected bfloat16; convert it"),
        (
            torch.zeros(3, 128).bfloat16(),
            r"y has shape \(3, 128\), expected \(2, 128\); drop padding",
        ),
        (
            torch.zeros(128, 2).bfloat16(),
            r"\(128, 2\), expected \(2, 128\), and this is the transposed shape; return y.T$",
        ),
        (torch.zeros(256).bfloat16(), r"y has shape \(256,\), expected \(2, 128\)$"),
        ({"y": 1}, r"y is int; expected a bfloat16 tensor \(2, 128\)"),
        ({"y": type("meta tensor", (), {})()}, r"y lies on torch's meta device and has no numbers"),
        ({"y": torch.zeros(2, 128).bfloat16(), "z": 1}, "unknown tensor 'z'; known: x, x_sf"),
        (
            {"y": torch.zeros(2, 128).bfloat16(), "l2_acts": torch.zeros(2, 128)},
            "l2_acts has dtype float32, expected float8_e4m3fn or uint8",
        ),
        (
            {"y": torch.zeros(2, 128).bfloat16(), "x_sf": torch.zeros(2, 4, dtype=torch.uint8)},
            r"x_sf is uint8 \(2, 4\), expected int32 \(2, 1\): four scale bytes are one word",
        ),
    ],
)
def test_a_bad_output_says_what_is_wrong(output, message):
    with pytest.raises(BadOutput, match=message):
        forward_bits(output, problem())


def test_bits_of_every_dtype():
    assert bits(torch.tensor([-0.0, 1.0]).bfloat16()).tolist() == [0x8000, ONE]
    assert bits(torch.tensor([1.0])).tolist() == [0x3F800000]
    assert bits(torch.tensor([0x38], dtype=torch.uint8).view(torch.float8_e4m3fn))[0] == 0x38
    assert bits(torch.tensor([[1, 2], [3, 4]]).t())[0].tolist() == [1, 3]


# --- forward ----------------------------------------------------------------------------------


class OracleGolden:
    """A golden straight from the oracle."""

    def __init__(self, golden, zero_freedom=None):
        self.contract = BASE
        self.is_calibrated = True
        self.zero_freedom = golden.zero_freedom if zero_freedom is None else zero_freedom
        self.tensors = golden.to_tensors()

    def names(self):
        return list(self.tensors)

    def get(self, name):
        return self.tensors[name]

    def matches(self, name, actual, nan):
        return False

    def other_rows(self, name, actual):
        return None


@pytest.fixture(scope="module")
def problem_and_golden():
    p = problem()
    golden = oracle.forward(p, contract=BASE)
    assert not golden.zero_freedom
    return p, golden


def outputs_of(golden):
    return {"y": golden.y.copy(), "l2_acts": golden.codes.copy(), "l2_acts_sf": golden.sf.copy()}


def test_the_reference_point_is_inside_for_every_class(problem_and_golden):
    p, golden = problem_and_golden
    for name in golden.envelopes:
        staged = judgements.judge_forward(outputs_of(golden), OracleGolden(golden), name, p)
        only_y = judgements.judge_forward({"y": golden.y}, OracleGolden(golden), name, p)
        assert staged.how == ("staged",) and not any(f.bad for f in staged.findings)
        assert only_y.how[0] == "end-to-end" and not any(f.bad for f in only_y.findings)


def test_staged_judgement_names_the_stage(problem_and_golden):
    p, golden = problem_and_golden
    code, exponent, y = outputs_of(golden), outputs_of(golden), outputs_of(golden)
    code["l2_acts"][1, 0, 5] ^= 0x48
    exponent["l2_acts_sf"][0, 1, 2] += 3
    y["y"][1, 7] ^= 0x100
    for actual, stage in ((code, "l2_acts"), (exponent, "l2_acts_sf"), (y, "y")):
        findings = judgements.judge_forward(actual, OracleGolden(golden), "fp32", p).findings
        assert stage in [f.stage for f in findings if f.bad]
    assert [f.worst.channel for f in findings if f.bad] == [7]


def test_y_follows_from_the_codes_that_were_shown(problem_and_golden):
    """The reference y does not fit codes of another correct kernel: only they decide."""
    p, golden = problem_and_golden
    actual = outputs_of(golden)
    actual["l2_acts"][0] = 0
    by_stage = {
        f.stage: f
        for f in judgements.judge_forward(actual, OracleGolden(golden), "fp32", p).findings
    }
    assert by_stage["l2_acts"].bad and by_stage["y"].rows.keys() == {0}


def test_masked_slots_are_not_read(problem_and_golden):
    p, _ = problem_and_golden
    ids = p.topk_ids.clone()
    ids[0, 1] = -1
    masked = Problem(**{**vars(p), "topk_ids": ids})
    golden = oracle.forward(masked, contract=BASE)
    for zero_freedom in (False, True):
        actual = outputs_of(golden)
        actual["l2_acts"][0, 1] = 0x7F
        actual["l2_acts_sf"][0, 1] = 99
        reference = OracleGolden(golden, zero_freedom)
        findings = judgements.judge_forward(actual, reference, "fp32", masked).findings
        assert not any(f.bad for f in findings)


def test_zero_freedom_is_bitwise_in_everything_shown(problem_and_golden):
    p, golden = problem_and_golden
    for name in ("y", "l2_acts", "l2_acts_sf"):
        actual = outputs_of(golden)
        actual[name].flat[-1] ^= 1
        result = judgements.judge_forward(actual, OracleGolden(golden, True), "fp32", p)
        assert [f.stage for f in result.findings if f.bad] == [name]
        assert result.how == ("bitwise",)


def test_staged_inputs_are_held_to_the_oracle(problem_and_golden):
    p, golden = problem_and_golden
    stage = oracle.staging(
        bits(p.hidden_states), p.topk_weights.numpy(), p.topk_ids.numpy(), contract=BASE
    )
    good = {"y": golden.y, "x": stage["x"], "x_sf": stage["x_sf"]}
    result = judgements.judge_forward(good, OracleGolden(golden), "fp32", p)
    assert not any(f.bad for f in result.findings) and "bitwise" in result.how
    bad = {**good, "x_sf": good["x_sf"] + (1 << 16)}
    findings = [
        f for f in judgements.judge_forward(bad, OracleGolden(golden), "fp32", p).findings if f.bad
    ]
    assert [f.stage for f in findings] == ["x_sf"] and findings[0].worst.channel == 64


def test_an_envelope_that_is_not_there(problem_and_golden):
    p, golden = problem_and_golden
    only_exact = oracle.forward(p, ["exact"], contract=BASE)
    with pytest.raises(judgements.GoldenLacks, match="no envelope for accumulator class 'fp32'"):
        judgements.judge_forward({"y": golden.y}, OracleGolden(only_exact), "fp32", p)


def test_the_statistic_stands_beside_the_interval(problem_and_golden, monkeypatch):
    p, golden = problem_and_golden
    call = []

    def check(*arguments, tokens):
        call.extend([*arguments, tokens])
        return ["row 1: bias 3, allowed 2", "row 0: bias 3, allowed 2"]

    monkeypatch.setattr(judgements, "_statistic", lambda: check)
    rows = range(8, 8 + p.num_tokens)
    result = judgements.judge_forward({"y": golden.y}, OracleGolden(golden), "fp32", p, rows)
    assert result.how == ("end-to-end", "statistic")
    assert call[0] is call[1] is golden.y and call[3:] == [128, "fp32", rows]
    verdict = of_findings("a", "forward", result.findings, result.how)
    assert verdict.status == "fail"
    assert verdict.reason == "statistic: row 1: bias 3, allowed 2, and 1 more"


def test_nan_everywhere():
    nans = np.full((2, 3), NAN, np.uint16)
    ones = np.full((2, 3), ONE, np.uint16)
    assert judgements.nan_everywhere(nans, lambda: ones)
    assert not judgements.nan_everywhere(nans, lambda: nans)
    assert not judgements.nan_everywhere(ones, ones)
    assert not judgements.nan_everywhere(nans[:0], ones[:0])
