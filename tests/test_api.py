"""The public API: its page runs, wrong outputs and wrong questions are told apart, types hold."""

from __future__ import annotations

import gc
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import megamoe
from megamoe.api import problems
from megamoe.api.testing import forward_test, judge_forward
from megamoe.backends import eager
from megamoe.backends.oracle import create as create_oracle
from megamoe.golden import GoldenError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/api.md").read_text()
SMALL = {"tokens": 3, "hidden": 128, "intermediate": 128, "experts": 4, "top_k": 2}
CLASS = eager.EagerBackend.accumulator


def forward(problem, contract="2026-11"):
    return eager.create("cpu", contract).forward(problem)


def verdict(what, output, **more):
    return megamoe.judge(what, output, **{"accumulator": CLASS, **more})


# --- the page ---------------------------------------------------------------------------------


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_of_the_page_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    names: dict[str, object] = {}
    run = [text for text in blocks() if not text.startswith("# test_")]
    assert len(run) == 5
    for text in run:
        exec(compile(text, "docs/api.md", "exec"), names)
    output = capsys.readouterr().out
    failure = re.search(r"```\n(FAIL .*?)```", PAGE, re.DOTALL)[1]
    assert failure in output


def test_the_tests_of_the_page_run_and_can_fail(tmp_path):
    files = [text for text in blocks() if text.startswith("# test_")]
    for text in files:
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    wrong = files[0].replace("kernel.forward,", "lambda p: kernel.forward(p)['y'] * 2,")
    (tmp_path / "test_wrong.py").write_text(wrong)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "PATH": "/usr/bin:/bin"}
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert "4 failed, 5 passed" in process.stdout, process.stdout
    assert "FAIL forward/own-t9-h256-i128-e8-k3-seed1: y: " in process.stdout
    assert "again:  megamoe.problem(tokens=9, " in process.stdout


# --- a problem of one's own -------------------------------------------------------------------


def test_a_right_output_and_a_wrong_one():
    problem = megamoe.problem(**SMALL)
    right = forward(problem)
    judgement = verdict(problem, right)
    assert judgement.ok and judgement and judgement.verdict.how == ("bitwise", "staged")
    wrong = {**right, "y": right["y"].clone()}
    wrong["y"][1, 7] = 3.0
    judgement = verdict(problem, wrong)
    assert not judgement.ok and not judgement
    worst = judgement.verdict.worst
    assert (worst.stage, worst.token, worst.channel, worst.actual) == ("y", 1, 7, "3")
    assert "worst   y at token 1 channel 7" in str(judgement)
    assert str(judgement).endswith(f"again:  {problems.origin_of(problem).call}")


def test_the_call_that_is_shown_draws_the_same_problem():
    more = {"clamp": 2.5, "fast_math": False, "routing": {"kind": "same"}, "capacity": 512}
    problem = megamoe.problem(**SMALL, seed=9, **more)
    again = eval(problems.origin_of(problem).call)
    assert again.arguments.keys() == problem.arguments.keys()
    for name, value in problem.arguments.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(again.arguments[name], value), name
    other = megamoe.problem(**SMALL, seed=10, **more)
    assert not torch.equal(other.hidden_states, problem.hidden_states)


def test_nothing_is_kept_of_a_problem_that_is_gone():
    problem = megamoe.problem(**SMALL)
    at = id(problem)
    assert at in problems._ORIGINS
    del problem
    gc.collect()
    assert at not in problems._ORIGINS


def test_a_kernel_that_writes_into_its_input_is_not_judged_by_what_it_left():
    problem = megamoe.problem(**SMALL)
    problem.hidden_states.zero_()
    judgement = verdict(problem, forward(problem))
    assert judgement.verdict.reason.startswith("input hidden_states is not what was given")


def test_the_fixture_fails_a_kernel_that_is_wrong_or_writes_into_its_input():
    def writes(problem):
        out = forward(problem)
        problem.topk_weights.zero_()
        return out

    def wrong(problem):
        return forward(problem)["y"] * 2

    for kernel, text in ((writes, "wrote into input topk_weights"), (wrong, "FAIL forward/own-")):
        with pytest.raises(pytest.fail.Exception, match=text):
            judge_forward(kernel, megamoe.problem(**SMALL), accumulator=CLASS)
    assert judge_forward(forward, megamoe.problem(**SMALL), accumulator=CLASS).ok


def test_a_problem_that_somebody_built_is_judged_too():
    source = megamoe.problem(**SMALL)
    problem = megamoe.Problem(**source.arguments)
    assert verdict(problem, forward(problem)["y"]).ok
    assert not verdict(problem, forward(problem)["y"] * 2).ok


def test_the_statistic_judges_only_data_that_it_was_calibrated_on():
    plain, wide = megamoe.problem(**SMALL), megamoe.problem(**SMALL, hidden_states={"spread": 30})
    how = [verdict(p, forward(p)["y"]).verdict.how for p in (plain, wide)]
    assert how == [("end-to-end", "statistic"), ("end-to-end",)]


def test_an_output_that_cannot_be_judged_is_an_error_and_not_ok():
    problem = megamoe.problem(**SMALL)
    for output, message in (
        (forward(problem)["y"][:2], "y has shape (2, 128), expected (3, 128)"),
        (forward(problem)["y"].float(), "y has dtype float32, expected bfloat16"),
        (None, "forward returned NoneType"),
    ):
        judgement = verdict(problem, output)
        assert judgement.verdict.status == "error" and message in str(judgement) and not judgement


def test_a_feature_chooses_a_contract_that_knows_it():
    problem = megamoe.problem(**SMALL, combine_dtype="fp8")
    assert verdict(problem, forward(problem, "sgl")).contract == "sgl"
    with pytest.raises(ValueError, match="2026-11 does not know a problem that asks fp8-combine"):
        verdict(problem, forward(problem, "sgl"), contract="2026-11")


def test_a_red_names_the_contract_under_which_the_output_is_right():
    # Below the floor of 2026-11, which 2026-06 does not have.
    problem = megamoe.problem(**SMALL, routing={"scaling": 2.0**-40})
    judgement = verdict(problem, forward(problem, "2026-06"))
    assert judgement.verdict.right_under == ("2026-06", "sgl")
    assert verdict(problem, forward(problem, "2026-06"), contract="2026-06").ok


WRONG = {
    "tokens is -1; it must not be negative": {"tokens": -1},
    "hidden is 100; it must be a multiple of 128": {"hidden": 100},
    "top_k 5 needs as many experts, and there are 4": {"top_k": 5},
    "seed is -1; it must be an integer": {"seed": -1},
    "unknown key 'size'": {"size": 3},
    "unknown key 'hiden'; did you mean hidden? Known: activation, ": {"hiden": 64},
    "rows is a key of stored cases only": {"rows": [0]},
    "unknown hidden recipe 'flat'": {"hidden_states": {"kind": "flat"}},
    "clamp is 'x'": {"clamp": "x"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_question_is_one_line(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        megamoe.problem(**{**SMALL, **WRONG[message]})
    assert "\n" not in str(error.value)


def test_a_misspelt_size_is_named_before_the_one_that_lacks():
    sizes = {name: value for name, value in SMALL.items() if name != "hidden"}
    with pytest.raises(ValueError, match="problem: unknown key 'hiden'; did you mean hidden"):
        megamoe.problem(**sizes, hiden=64)
    with pytest.raises(ValueError, match="key 'hidden' is missing; give tokens, hidden, interm"):
        megamoe.problem(**sizes)


def test_a_misspelt_name_of_the_package():
    with pytest.raises(AttributeError, match=r"no attribute 'load_cases'; did you mean load_case"):
        _ = megamoe.load_cases


def test_a_class_is_claimed_and_known():
    problem = megamoe.problem(**SMALL)
    y = forward(problem)["y"]
    for wrong in (None, "fp16"):
        with pytest.raises(ValueError, match=r"name the class that the kernel claims, one of .*32"):
            megamoe.judge(problem, y, accumulator=wrong)
    with pytest.raises(ValueError, match="unknown contract '2020'"):
        verdict(problem, y, contract="2020")
    with pytest.raises(TypeError, match="a problem or a loaded case, not Tensor"):
        megamoe.judge(y, y, accumulator=CLASS)


# --- cases ------------------------------------------------------------------------------------


def test_cases_are_those_of_the_list():
    ids = [c.id for c in megamoe.cases("forward/token-block-*", tier="quick")]
    assert "forward/token-block-edge-t9" in ids
    assert {c.kind for c in megamoe.cases(kind="eplb")} == {"eplb"}
    with pytest.raises(ValueError, match="nothing matches 'nope'"):
        megamoe.cases("nope")
    with pytest.raises(ValueError, match="nothing has the id or name 'forward/nope'"):
        megamoe.load_case("forward/nope")
    assert megamoe.load_case("token-block-edge-t9").id == "forward/token-block-edge-t9"


def test_a_case_has_its_golden_under_each_contract():
    case = megamoe.load_case("forward/tiny-activations-floored-2e-24")
    assert case.contracts == ("2026-06", "2026-09", "2026-11", "sgl")
    old, new = (case.golden_under(r).get("l2_acts_sf") for r in ("2026-06", "2026-11"))
    assert old.shape == new.shape and (old != new).any()
    assert (case.golden.get("l2_acts_sf") == new).all()


def test_a_case_judges_by_its_stored_golden_and_its_own_inputs():
    case = megamoe.load_case("forward/token-block-edge-t9")
    right = forward(case.problem)
    assert verdict(case, right).verdict.how == ("bitwise",)
    assert not verdict(case, {**right, "y": right["y"] * 1.01}).ok
    case.problem.topk_weights.mul_(2)
    judgement = verdict(case, right)
    assert "input topk_weights is not what was given" in str(judgement)


def staged(case):
    inputs = case.inputs
    tokens, hidden = inputs["hidden_states"].shape
    slots = inputs["topk_ids"].shape[1]
    out = {
        "x": torch.empty((tokens, hidden), dtype=torch.float8_e4m3fn),
        "x_sf": torch.empty((tokens, hidden // 128), dtype=torch.int32),
        "topk_idx": torch.empty((tokens, slots), dtype=torch.int64),
        "topk_weights": torch.empty((tokens, slots)),
    }
    backend = create_oracle("cpu", "2026-11")
    names = ("hidden_states", "topk_weights", "topk_ids")
    backend.prepare(*(inputs[n] for n in names), *out.values())
    return out


def test_a_case_of_staging():
    case = megamoe.load_case("staging/outlier-channels-crush-their-group")
    right = staged(case)
    assert megamoe.judge(case, right).ok and megamoe.judge(case, (*right.values(),)).ok
    wrong = {**right, "x_sf": right["x_sf"] + 1}
    assert megamoe.judge(case, wrong).findings[0].stage == "x_sf"
    more = {**right, "x": torch.cat([right["x"]] * 2)}
    assert "x has shape" in megamoe.judge(case, more).verdict.reason
    lacking = {n: t for n, t in right.items() if n != "x"}
    assert "is judged by x_sf, x" in megamoe.judge(case, lacking).verdict.reason.replace(
        "x, x_sf", "x_sf, x"
    )
    with pytest.raises(ValueError, match="is of kind staging and has no problem"):
        _ = case.problem


def test_a_case_of_layout_and_one_of_errors():
    case = megamoe.load_case("layout/gate-up-interleave-or-scale-transpose-h128-i128")
    out = create_oracle("cpu", "2026-11").transform_weights(*case.inputs.values())
    assert megamoe.judge(case, out).ok
    assert not megamoe.judge(case, (out[0].flip(1), *out[1:])).ok
    wrong_call = megamoe.load_case("errors/staging-takes-hidden-64")
    with pytest.raises(ValueError, match="judges wrong calls, which one output cannot show"):
        megamoe.judge(wrong_call, out)
    with pytest.raises(GoldenError, match="has no tensors"):
        _ = wrong_call.golden


# --- shape and types --------------------------------------------------------------------------


def test_the_rooms_still_are_rooms():
    from megamoe.judge import picture

    assert megamoe.judge.picture is picture
    assert [*inspect.signature(megamoe.judge).parameters][:2] == ["what", "output"]
    assert next(iter(inspect.signature(megamoe.cases).parameters)) == "pattern"


@pytest.mark.parametrize("nothing", [{"shapes": []}, {"seeds": []}])
def test_a_test_of_nothing_is_refused(nothing):
    with pytest.raises(ValueError, match="would test nothing"):
        forward_test(forward, accumulator=CLASS, **{"shapes": [SMALL], **nothing})


STRICT = {
    "disallow_any_generics", "disallow_incomplete_defs", "disallow_subclassing_any",
    "disallow_untyped_calls", "disallow_untyped_decorators", "disallow_untyped_defs",
    "check_untyped_defs", "no_implicit_reexport", "strict_equality", "extra_checks",
    "warn_return_any", "warn_unused_ignores",
}  # fmt: skip
"""What `mypy --strict` asks of one module; warn_redundant_casts and _unused_configs are global."""


def test_the_examples_are_type_checked_strictly():
    """By mypy, in lint: it refuses a comment `type: ignore` that hides no error."""
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert (ROOT / "megamoe/py.typed").is_file() and "examples" in mypy["files"]
    of = {module: table for table in mypy["overrides"] for module in table["module"]}
    for path in (ROOT / "examples").glob("*.py"):
        flags = {name for name, on in {**mypy, **of[path.stem]}.items() if on is True}
        assert flags >= STRICT, path
    assert (ROOT / "examples/own_shapes.py").read_text().count("# type: ignore[arg-type]") == 2


def test_a_problem_and_a_judgement_have_a_short_repr():
    p = megamoe.problem(**SMALL)
    assert repr(p).startswith(f"Problem(hidden_states {tuple(p.hidden_states.shape)} bfloat16, ")
    assert "topk_ids (" in repr(p) and "activation_clamp=" in repr(p) and "tensor" not in repr(p)
    assert "shared_output" not in repr(p), "a field with its default is left out"
    assert len(repr(p)) < 500
    y = torch.zeros(p.num_tokens, p.hidden_size, dtype=torch.bfloat16)
    text = repr(megamoe.judge(p, y, accumulator=CLASS))
    assert text.startswith("<Judgement fail: y: ") and "\n" not in text and len(text) < 300
    assert text.endswith(f"; accumulator {CLASS}, contract 2026-11>")
    right = megamoe.judge(p, forward(p), accumulator=CLASS)
    assert repr(right) == f"<Judgement pass; accumulator {CLASS}, contract 2026-11>"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weights": {"kind": "carier"}}, "unknown weights recipe 'carier'; known: table, carrier"),
        ({"weight_format": "fp8-block", "weights": {"kind": "carrier"}}, "no recipe 'carrier'"),
    ],
)
def test_a_recipe_of_another_kind_is_no_default(more, message):
    with pytest.raises(ValueError, match=message):
        megamoe.problem(tokens=1, hidden=128, intermediate=128, experts=1, top_k=1, **more)


def test_a_class_of_another_format_is_an_error_of_the_question():
    p = megamoe.problem(
        tokens=1, hidden=128, intermediate=128, experts=1, top_k=1, weight_format="fp8-block"
    )
    y = torch.zeros(1, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one of exact, fp32-ordered, sm90-e4m3-k128 for fp8-b"):
        megamoe.judge(p, y, accumulator="fp32")
    plain = megamoe.problem(tokens=1, hidden=128, intermediate=128, experts=1, top_k=1)
    with pytest.raises(ValueError, match="a problem that has MXFP4 weights and no feature; these"):
        megamoe.judge(plain, y, accumulator="fp32", contract="w4a16")
