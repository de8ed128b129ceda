"""``megamoe explain``: the same bits as the oracle, from less work; where an output goes wrong."""

from __future__ import annotations

import argparse
import json
import re
from contextlib import redirect_stdout
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamoe import oracle
from megamoe.backends.eager import EagerBackend, linear
from megamoe.backends.simulate import (
    blackwell_mxf8f6f4,
    hopper_e4m3,
    hopper_e4m3_outside,
    problem,
)
from megamoe.cases import load_cases
from megamoe.cases.recipes import expert_weights, forward_problem
from megamoe.cases.stored import StoredProblem, to_bytes
from megamoe.commands import main as cli
from megamoe.commands.explain import _is_wrong
from megamoe.explain import FromCase, FromProblem, explain
from megamoe.explain.blocks import row_blocks
from megamoe.explain.element import value_of_code
from megamoe.explain.instruction import model_sums
from megamoe.explain.life import live
from megamoe.judge import Finding
from megamoe.judge.judgements import Judgement
from megamoe.oracle.linear import Columns, Rows, block_sums
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import BASE
from megamoe.suite.at_hand import run
from tests.helpers.local import Local
from tests.helpers.mutants import FORWARD, build

RECIPE = {"w13_scale": [120, 2], "w2_scale": [120, 2]}
CASE = "forward/bell-h256-i128-drifts"


@pytest.fixture(scope="module")
def small():
    """Realistic data: sums round, some codes are open in the wider classes."""
    return problem(3, tokens=2, top_k=3, intermediate=256, clamp=2.0, weights_recipe=RECIPE)


def operands(seed, depth=512, outputs=40):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, depth, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    packed = rng.integers(0, 256, (outputs, depth // 2), dtype=np.uint8)
    packed[:, : depth // 8] = 0  # groups without a term
    sf = rng.integers(118, 124, depth // 32, dtype=np.uint8)
    return codes, sf, packed, rng.integers(118, 124, (outputs, depth // 32), dtype=np.uint8)


# --- the same bits as the oracle --------------------------------------------------------------


def test_a_case_row_by_row_is_the_case_at_once():
    """Every weights recipe that some case has, at sizes that choose other defaults."""
    by_recipe = {}
    for case in load_cases():
        if case.kind in ("forward", "property"):
            by_recipe.setdefault(json.dumps(case.params.get("weights_recipe", {})), case)
    count = 0
    for case in by_recipe.values():
        if not FromCase.can_make(case):
            continue  # read from its problem, which is small
        if case.params.get("weight_format") == "nvfp4":
            continue  # explain refuses it
        count += 1
        for hidden in (128, 768, 2176):
            params = {**case.params, "hidden": hidden, "intermediate": 128}
            source = FromCase(replace(case, params=params))
            recipe = case.params.get("weights_recipe", {})
            w13, w13_sf, w2, w2_sf = expert_weights(case.seed, 2, hidden, 128, recipe)
            some = np.array([0, 5, hidden - 1])
            rows = (*source.w13(2), *source.w2(2, some))
            for actual, expected in zip(rows, (w13, w13_sf, w2[some], w2_sf[some]), strict=True):
                np.testing.assert_array_equal(actual, expected, err_msg=case.id)
    assert count > 20


def test_a_token_of_a_case_is_the_problems():
    case = next(c for c in load_cases() if c.id == CASE)
    one, whole = FromCase(case).token(2), FromProblem(forward_problem(case)).token(2)
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(one, name), value, err_msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_fast_blocks_are_the_oracles(seed):
    codes, sf, packed, weight_sf = operands(seed)
    if seed == 3:
        codes[40], weight_sf[1, 1] = 0x7F, 255  # NaN on either side
    fast = row_blocks(codes, sf, packed, weight_sf)
    slow = block_sums(Rows.of(codes[None], sf[None]), Columns.of(packed, weight_sf))
    for field in fields(slow):
        np.testing.assert_array_equal(
            getattr(fast, field.name), getattr(slow, field.name), err_msg=field.name
        )


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_a_life_is_the_oracles_forward(small, name):
    golden = oracle.forward(small, [name], contract=BASE)
    envelope = golden.envelopes[name]
    for token in range(2):
        life = live(FromProblem(small), token, range(256), name, contract=BASE)
        np.testing.assert_array_equal(life.y, golden.y[token])
        np.testing.assert_array_equal(life.y_low, envelope.y_lo[token])
        np.testing.assert_array_equal(life.y_high, envelope.y_hi[token])
        for slot in life.slots:
            np.testing.assert_array_equal(slot.codes, golden.codes[token, slot.slot])
            np.testing.assert_array_equal(slot.key_high, envelope.key_hi[token, slot.slot])


def test_of_w2_only_the_wanted_channel_is_asked_for(small):
    class Spy(FromProblem):
        requests: tuple = ()

        def w2(self, expert, channels):
            self.requests += (channels.tolist(),)
            return super().w2(expert, channels)

    source = Spy(small)
    explain(source, 0, 9, "sm100-mxf8f6f4", contract=BASE)
    assert source.requests == ([9], [9], [9])


# --- the instruction --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "kernel",
    [
        blackwell_mxf8f6f4,
        hopper_e4m3,
        lambda: hopper_e4m3_outside(32, "nearest", "sm90-e4m3-k32"),
    ],
    ids=["blackwell", "hopper", "hopper, scales outside"],
)
def test_the_modelled_sum_is_mma_sims(kernel, seed):
    codes, sf, packed, weight_sf = operands(seed)
    instruction = kernel()
    expected = instruction.linear(codes[None], sf[None], packed, weight_sf, None)[0]
    actual = model_sums(ACCUMULATORS[instruction.accumulator], codes, sf, packed, weight_sf)
    np.testing.assert_array_equal(actual, expected)


def test_where_there_is_no_instruction_the_model_is_eagers(small):
    codes, sf, packed, weight_sf = operands(1)
    expected = linear(*(torch.from_numpy(a) for a in (codes[None], sf[None], packed, weight_sf)))[0]
    actual = model_sums(ACCUMULATORS["fp32-ordered"], codes, sf, packed, weight_sf)
    np.testing.assert_array_equal(actual, expected.numpy())
    assert model_sums(ACCUMULATORS["exact"], codes, sf, packed, weight_sf) is None


# --- what is said -----------------------------------------------------------------------------


def test_each_number_follows_from_the_ones_before(small):
    report = explain(FromProblem(small), 0, 7, "sm90-e4m3", contract=BASE)
    for slot in report["slots"]:
        top, two = slot["largest"], slot["linear2"]
        assert np.float32(np.float32(top["silu"]) * np.float32(top["up_clamped"]["value"])) * (
            np.float32(slot["routing_weight"])
        ) == np.float32(top["a"])
        group = top["group"]
        assert group["first"] <= group["set_by"] < group["first"] + 32
        first = two["contributions"][0]
        scale = 2.0 ** (first["sf"] + first["weight_sf"] - 254)
        assert first["product"] == first["value"] * first["weight"] * scale
        assert first["i"] == top["i"] and first["code"] == top["code"]
        assert two["interval"][0] <= two["model"] <= two["interval"][1]
    assert report["combine"][-1]["sum"] == pytest.approx(report["y"]["value"], rel=2**-8)
    why = report["why"]
    assert why["ulps"] > 0  # Hopper's 13 bits leave room, and it is said whose
    widest = why["slots"][0]
    assert widest["from_codes"] > 0 and widest["largest_swings"][0]["cause"]


def test_a_token_without_slots_and_one_that_is_not_there(small):
    none = replace(small, topk_ids=torch.full_like(small.topk_ids, -1))
    report = explain(FromProblem(none), 0, 0, "exact", contract=BASE)
    assert report["y"]["bits"] == "0x0000" and report["masked_slots"] == [0, 1, 2]
    for token, channel in ((2, 0), (-1, 0), (0, 256)):
        with pytest.raises(ValueError, match="is not there"):
            explain(FromProblem(small), token, channel, "exact", contract=BASE)


# --- where an output goes wrong -------------------------------------------------------------------

EXPECTED = {
    "gate-up-swapped": "gate and up are swapped",
    "gate-not-clamped": "the gate is not clamped",
    "up-not-clamped-above": "up is not clamped from above",
    "routing-weight-dropped": "the routing weight is dropped",
    "requant-exponent-rounded-down": "the exponent is rounded down",
    "weight-scales-one-group-late": "weight scales are read one group late",
    "combine-in-bf16": "slots are added in bfloat16",
    "combine-loses-last-slot": "slot 2 (expert 2) is lost",
    "slot-rows-not-rounded-to-bf16": "slot rows are not rounded to bfloat16",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_planted_fault_is_named_by_y_alone(small, tmp_path, name):
    """What the stages show is in ``test_explain_names.py``."""
    mutant = next(m for m in FORWARD if m.name == name)
    actual = {"y": run(small, Local(build(mutant, tmp_path)))["y"][1]}
    departure = explain(FromProblem(small), 1, 0, "fp32-ordered", actual, contract=BASE)["actual"]
    (step,) = departure["explanations"]
    assert EXPECTED[name] in [way["what"] for way in step["exact"]]
    assert departure["parts_at"]["stage"] == "y"


def test_what_is_right_does_not_part(small):
    actual = {k: v[1] for k, v in run(small, Local(EagerBackend())).items()}
    departure = explain(FromProblem(small), 1, 0, "fp32-ordered", actual, contract=BASE)["actual"]
    assert (
        departure["parts_at"] is None and not departure["explanations"] and not departure["outside"]
    )


def test_a_fault_that_is_in_no_catalogue_is_not_explained(small):
    actual = {"y": run(small, Local(EagerBackend()))["y"][1] ^ 0x155}
    departure = explain(FromProblem(small), 1, 0, "fp32-ordered", actual, contract=BASE)["actual"]
    assert departure["parts_at"]["stage"] == "y"
    (step,) = departure["explanations"]
    assert not step["exact"] and not step["partial"]


# --- the command ------------------------------------------------------------------------------


def test_the_command_says_it_and_the_store_agrees(capsys):
    assert cli.main(["explain", CASE, "--token", "1", "--channel", "3", "--full"]) == 0
    out = capsys.readouterr().out
    for text in ("y at token 1 channel 3", "the store has the same bits", "gate sum", "amax",
                 "Linear 2's largest", "Combine", "The interval"):  # fmt: skip
        assert text in out
    assert cli.main(["explain", CASE, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accumulator"] == "fp32" and report["accumulator_from"].startswith(
        "assumed, since"
    )
    assert cli.main(["explain", CASE, "--accumulator", "sm90-e4m3"]) == 0
    assert "accumulator class sm90-e4m3 (by --accumulator)\n" in capsys.readouterr().out


def test_clamps_that_gate_and_up_have_exchanged_are_named(tmp_path, capsys, monkeypatch):
    def exchanged(gate, up, act, contract):
        return gate.clamp(-act.clamp, act.clamp), up.clamp_max(act.clamp)

    monkeypatch.setattr("megamoe.backends.eager_activation._clamped", exchanged)
    case = next(c for c in load_cases() if c.id == "forward/clamp-0.5-bell-misapplied")
    output = EagerBackend().forward(forward_problem(case))
    save_file({k: v.contiguous() for k, v in output.items()}, tmp_path / "got.safetensors")
    assert cli.main(["explain", case.id, "--actual", f"{tmp_path}/got.safetensors"]) == 0
    assert "cause: clamp: gate and up have each other's clamp\n" in capsys.readouterr().out


def test_a_claim_that_is_too_narrow_is_said_before_any_cause(tmp_path, capsys):
    case = next(c for c in load_cases() if c.id == "forward/claims-ascending")
    output = EagerBackend().forward(forward_problem(case))
    output["y"].zero_()  # as a kernel gives it that adds the blocks of K downwards
    save_file({k: v.contiguous() for k, v in output.items()}, tmp_path / "got.safetensors")
    command = ["explain", case.id, "--actual", f"{tmp_path}/got.safetensors", "--accumulator"]
    assert cli.main([*command, "fp32-ordered"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("the claim may be wrong: this output is right under fp32")
    assert any(
        line.startswith("this case was made to catch: A kernel that splits K") for line in lines
    )
    assert cli.main([*command, "fp32"]) == 0
    assert capsys.readouterr().out.startswith("PASS ")


def test_the_command_finds_the_worst_element_of_what_was_got(tmp_path, capsys):
    case = next(c for c in load_cases() if c.id == CASE)
    output = EagerBackend().forward(forward_problem(case))
    output["y"][2, 200:203] *= 2
    save_file({k: v.contiguous() for k, v in output.items()}, tmp_path / "got.safetensors")
    again = ["explain", CASE, "--actual", f"{tmp_path}/got.safetensors"]
    assert cli.main([*again, "--accumulator", "fp32-ordered"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"{CASE}: the first wrong stage is y (linear 2 or combine)"
    assert lines.pop(1) == "where: token 2 only: 1 of 4 tokens outside"
    assert (
        lines[1].startswith("cause: unknown; none of ") and "the 3 wrong values of 128" in lines[1]
    )
    assert lines[2].startswith("y at token 2 channel 20") and ", got " in lines[2]
    assert lines[3] == (
        "outside at token 2: y 3 of 128 at channels 128 to 255 and 0 of 128 at its other channels"
    )
    assert lines[4].startswith("this case was made to catch: ")
    assert lines[5].startswith("more: --full shows") and len(lines) == 6


def test_of_a_wrong_scale_byte_the_channel_that_sets_amax_is_followed(tmp_path, capsys):
    case = next(c for c in load_cases() if c.id == CASE)
    output = EagerBackend().forward(forward_problem(case))
    output["l2_acts_sf"][2, 3, 1] += 3
    save_file({k: v.contiguous() for k, v in output.items()}, tmp_path / "got.safetensors")
    assert cli.main(["explain", CASE, "--actual", f"{tmp_path}/got.safetensors", "--full"]) == 0
    out = capsys.readouterr().out
    assert "l2_acts_sf at token 2 slot 3 expert " in out and " channel 32: expected " in out
    match = re.search(r"intermediate channel (\d+) of slot 3 .*, which sets amax of the", out)
    assert match and match[1] != "32"
    assert f" of channels 32 to 63, set by {match[1]};" in out


@pytest.fixture
def wrong_codes(tmp_path):
    """Two wrong codes, and the y that follows from them: only codes are wrong, as of a clamp."""
    case = next(c for c in load_cases() if c.id == CASE)
    p = forward_problem(case)
    output = EagerBackend().forward(p)
    codes = output["l2_acts"].view(torch.uint8)
    codes[2, 3, 40] ^= 0x01
    codes[1, 2, 77] ^= 0x80  # far outside: the sign
    low, _ = oracle.combine_interval(
        p, codes.numpy(), output["l2_acts_sf"].numpy(), "fp32-ordered", BASE
    )
    output["y"] = torch.from_numpy(low.view(np.int16)).view(torch.bfloat16)
    save_file({k: v.contiguous() for k, v in output.items()}, tmp_path / "got.safetensors")
    return ["explain", CASE, "--actual", f"{tmp_path}/got.safetensors",
            "--accumulator", "fp32-ordered"]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "value", "says"),
    [
        (0x38, 1.07, "the right |v| is 1.07, so yours was too small by 0.7 % at least"),
        (0xB8, -0.95, "the right |v| is 0.95, so yours was too large by 2 % at least"),
    ],
)
def test_a_wrong_code_says_how_far_the_activation_was_off(code, value, says):
    """Beside the scale byte 127 code 0x38 is 1, with the neighbours 0.9375 and 1.125."""
    line = value_of_code(code, 127, value)
    assert line == f"code 0x{code:02x} means |v| from 0.96875 to 1.0625; {says}"


@pytest.mark.parametrize(("code", "value"), [(0x38, 1.0), (0x38, -2.0), (0x7F, 1.0), (0x7E, 1.0)])
def test_a_right_code_another_sign_and_the_largest_codes_say_nothing(code, value):
    assert value_of_code(code, 127, value) == ""


def test_where_several_causes_fit_it_says_what_the_case_is_there_for(tmp_path, capsys):
    """The case tells these sums from the right one, and not from each other."""
    case, file = "forward/combine-order-by-expert-not-by-slot", tmp_path / "k.py"
    file.write_text(BY_EXPERT)
    assert cli.main(["explain", case, "--backend", f"{file}:ByExpert"]) == 0
    out = capsys.readouterr().out
    assert "which this data cannot tell apart" in out
    assert "\n  combine: slots are added in the order of their experts\n" in out
    assert "\nthis case was made to catch: Rows are added in the order of experts, " in out


BY_EXPERT = """
from dataclasses import replace
from megamoe.backends.eager import EagerBackend
class ByExpert(EagerBackend):
    def forward(self, p):
        ids, weights = p.topk_ids, p.topk_weights
        order = ids.where(ids >= 0, 1 << 40).argsort(dim=1, stable=True)
        p = replace(p, topk_ids=ids.gather(1, order), topk_weights=weights.gather(1, order))
        return super().forward(p)["y"]
"""


def test_where_only_codes_are_wrong_the_worst_code_is_shown(wrong_codes, capsys):
    assert cli.main(wrong_codes) == 0
    lines = capsys.readouterr().out.splitlines()
    where = "(between linear 1 and requantisation)"
    assert lines[0] == f"{CASE}: the first wrong stage is l2_acts {where}"
    (worst,) = [line for line in lines if "expected" in line]
    assert worst.startswith("l2_acts at token 1 slot 2 expert ") and " channel 77: " in worst
    assert "outside at token 1: l2_acts 1 of 512" in lines
    assert any(line.startswith("this case was made to catch: ") for line in lines), (
        "no cause is certain"
    )
    assert cli.main([*wrong_codes, "--token", "2", "--full"]) == 0
    out = capsys.readouterr().out
    assert "l2_acts at token 2 slot 3 expert " in out and " channel 40: expected " in out
    assert "Linear 1 to the code: intermediate channel 40 of slot 3 (expert " in out
    assert "), the wrong value" in out
    assert cli.main([*wrong_codes, "--token", "0"]) == 0
    assert f"{CASE}: every stage of token 0 is inside (y at channels 0 to 127)" in (
        capsys.readouterr().out
    )
    assert cli.main([*wrong_codes, "--stage", "y"]) == 0
    assert capsys.readouterr().out == f"{CASE}: stage y is inside; outside: l2_acts\n"


@pytest.mark.parametrize("stage", ["x", "x_sf", "l2_acts_sf"])
def test_the_worst_element_of_each_stage_is_where_it_was_planted(small, stage):
    actual = {k: v[1].copy() for k, v in run(small, Local(EagerBackend())).items()}
    expert = int(small.topk_ids[1, 2])
    if stage == "x":
        actual["x"][70] ^= 0x80
        says = "x at token 1 channel 70: expected "
    elif stage == "x_sf":
        actual["x_sf"] = actual["x_sf"].copy()
        actual["x_sf"].view(np.uint8)[3] += 2
        says = "x_sf at token 1 channel 96: expected "
    else:
        actual["l2_acts_sf"][2, 5] += 3
        says = f"l2_acts_sf at token 1 slot 2 expert {expert} channel 160: expected "
    departure = explain(FromProblem(small), 1, 0, "fp32-ordered", actual, contract=BASE)["actual"]
    assert departure["parts_at"]["stage"] == stage
    assert departure["worst"]["line"].startswith(says) and ", got " in departure["worst"]["line"]


def test_a_reduced_file_names_the_cause_of_the_whole(tmp_path, small, capsys):
    """One element fits many causes or none; the file remembers the cause that `reduce` read."""
    output = EagerBackend().forward(small)
    output["y"][1, 3] *= 3
    about = {"accumulator": "fp32-ordered", "reduced_from": "forward/whole", "causes": ["  c: d"],
             "every_cause": ["  c: d", "  c: e"], "causes_read_from": "token 3"}  # fmt: skip
    path = tmp_path / "r.safetensors"
    path.write_bytes(to_bytes(StoredProblem(small, {"y": output["y"]}, about)))
    assert cli.main(["explain", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path} (forward/whole, reduced): the first wrong stage is y ")
    assert "\nread from token 3 of forward/whole, which was reduced to this file:\n  c: d\n" in out
    assert "\nthis file alone has too few values to tell the cause" in out
    assert "this case was made to catch" not in out, "a file is no case"
    assert cli.main(["explain", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["original"]["causes"] == ["  c: d", "  c: e"]


def test_a_statistic_alone_is_said_to_have_no_element():
    """Every element is inside, and the bias of a row is not."""
    judgement = Judgement([Finding("y", 4, text="statistic: row 2: bias 0.003")], ("statistic",))
    a = argparse.Namespace(stage=None, full=False)
    subject = argparse.Namespace(title="forward/a")
    with redirect_stdout(StringIO()) as out:
        assert not _is_wrong(a, subject, judgement, ["y"])
    assert out.getvalue().startswith("FAIL forward/a: statistic: row 2: bias 0.003; no single")


def test_the_command_takes_a_file_and_a_backend(tmp_path, small, capsys):
    path = Path(tmp_path / "p.safetensors")
    path.write_bytes(to_bytes(StoredProblem(small)))
    assert cli.main(["explain", str(path), "--backend", "eager"]) == 0
    text = "every stage is inside (x, x_sf, l2_acts, l2_acts_sf, y); nothing to explain"
    assert capsys.readouterr().out == f"PASS {path}: {text}\n"
    assert cli.main(["show", str(path)]) == 0
    view = capsys.readouterr().out
    assert view.startswith(f"{path}\n  sizes              tokens {small.num_tokens}, hidden ")
    assert f"\n  judge it           megamoe replay {path} --backend B\n" in view


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-case"], "unknown case"),
        (["eplb/identity-map-int32"], "`megamoe check --backend B --case eplb/identity-map-int32`"),
        ([CASE, "--token", "9"], "the case has 4"),
        ([CASE, "--token", "9", "--backend", "eager"], "the case has 4"),
        ([], "name CASE, as in `megamoe explain forward/bell-h256-i128-drifts --backend FILE.py:"),
        (["forward/bell-*"], "`megamoe check --backend B --case 'forward/bell-*'` names the red"),
        ([CASE, "--actual", "none.safetensors"], "no such file"),
        ([CASE, "--actual", "k.py:K"], f"`megamoe explain {CASE} --backend k.py:K`"),
        ([CASE, "--actual", __file__], f"`megamoe explain {CASE} --backend {__file__}`"),
        ([CASE, "--actual", "/dev/null", "--backend", "eager"], "give one"),
        ([CASE, "--accumulator", "fp64"], "did you mean fp32?"),
        ([CASE, "--stage", "z"], "known: x, x_sf, l2_acts, l2_acts_sf, y"),
        ([CASE, "--stage", "y"], "name one with --backend or --actual"),
    ],
)
def test_misuse_is_one_line(arguments, says, capsys):
    assert cli.main(["explain", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_an_output_is_no_problem(tmp_path, capsys):
    path = tmp_path / "y.safetensors"
    save_file({"y": torch.zeros(4, 256, dtype=torch.bfloat16)}, path)
    assert cli.main(["explain", str(path), "--backend", "eager"]) == 2
    assert f"`megamoe explain CASE --actual {path}` explains it" in capsys.readouterr().err


def test_a_stored_problem_is_no_output(small, tmp_path, capsys):
    path = tmp_path / "p.safetensors"
    path.write_bytes(to_bytes(StoredProblem(small)))
    assert cli.main(["explain", CASE, "--actual", str(path)]) == 2
    assert f"`megamoe explain {path} --backend B` explains" in capsys.readouterr().err
