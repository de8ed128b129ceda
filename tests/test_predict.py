"""Predicted bits: the models against recorded bits, the envelope, and the predicted goldens."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmasim.arithmetic.fdpa import MMA_GST_FDPA

from megamoe.backends.model import ModelBackend
from megamoe.cases import golden_root, load_cases
from megamoe.commands.main import main
from megamoe.golden import GoldenError, predicted, recorded, regenerate, rows_of
from megamoe.oracle.gates import form_of, silu_bounds, silu_table
from megamoe.predict import HOPPER_TRITON, MODELS, SM100, nvfp4, predict, record, tables
from megamoe.predict.explain import describe, explain
from megamoe.predict.model import variants
from megamoe.spec.contract import BASE, NEWEST, REVISIONS
from megamoe.spec.features import Activation
from megamoe.spec.formats import bf16_decode
from megamoe.spec.problem import Problem

ROOT = golden_root()
CASES = {case.id: case for case in load_cases()}
TELLING = "forward/claims-25-bits"
EXACT = "forward/claims-exact-once"
"""There the exact sum is not what the unit gives."""


def problem_of(case_id):
    case = CASES[case_id]
    return rows_of(Problem(**regenerate(case)), case.rows)


def small(most):
    """Forward cases of few products, cheapest first."""

    def work(case):
        p = case.params
        return p["hidden"] * p["intermediate"] * p["tokens"] * p["top_k"]

    cases = sorted((c for c in CASES.values() if c.kind == "forward"), key=work)
    return [c for c in cases if work(c) <= most]


# --- the models -------------------------------------------------------------------------------


UNLIKE = ("forward/requantise-amax-infinite", "forward/routing-weight-not-finite")


def test_the_hopper_model_has_the_recorded_bits_of_this_project_s_kernel():
    """The smallest cases; tools/predicted.py takes all."""
    entries = json.loads((ROOT / "recorded/triton/nvidia-h200-sm90.json").read_text())["cases"]
    count = 0
    for case in small(2e5):
        if case.id not in entries:
            continue
        problem = Problem(**regenerate(case))
        try:
            stages = predict(problem, HOPPER_TRITON, BASE).stages
        except ValueError as fault:
            assert "bfloat16" in str(fault)
            continue
        digests = recorded.digests(stages, problem.topk_ids.numpy())
        apart = [n for n, d in digests.items() if d != entries[case.id]["stages"][n]]
        # Beside a scale byte of 255, which is NaN, the kernel's codes are others.
        assert apart == (["l2_acts"] if case.id in UNLIKE else []), case.id
        count += 1
    assert count > 60


def test_a_change_of_the_model_has_other_bits_and_explain_names_it():
    problem = problem_of(TELLING)
    assert len(explain(problem, predict(problem, SM100, BASE).stages, SM100, BASE)) == 1
    name = "24 bits kept in the alignment, not 25"
    other = dict(variants(SM100))[name]
    stages = predict(problem, other, BASE).stages
    trials = explain(problem, stages, SM100, BASE)
    assert trials[0].count > 0
    assert name in [t.name for t in trials if not t.count]
    assert "would explain it" in describe(trials)


def test_what_no_change_explains_is_said_so():
    problem = problem_of(TELLING)
    stages = predict(problem, SM100, BASE).stages
    stages["y"] = stages["y"] ^ 0x4000
    assert "no single change explains it" in describe(explain(problem, stages, SM100, BASE))


def test_nvfp4_steps_are_mmasim_s_word_for_word():
    model = MMA_GST_FDPA(16, 35, "RZ-FP32", 64, -133)
    rng = np.random.default_rng(4)
    value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for zeros in (0.1, 0.9):
        codes = rng.integers(0, 16, (2, 24, 256)) * (rng.random((2, 24, 256)) > zeros)
        sf = rng.choice([1, 3, 8, 0x38, 0x7E], (2, 24, 16)).astype(np.uint8)
        a, b = value[codes & 7] * np.where(codes & 8, -1, 1)
        actual = nvfp4.chain(a, sf[0], b, sf[1])
        scale = torch.from_numpy(sf).view(torch.float8_e4m3fn)
        one, two = (torch.from_numpy(v).float() for v in (a, b))
        zero = torch.zeros(24, 24)
        expected = model.dpa(
            one[:, None].expand(24, 24, -1), two[None].expand(24, 24, -1), zero,
            scale[0][:, None].expand(24, 24, -1), scale[1][None].expand(24, 24, -1),
        )  # fmt: skip
        assert np.array_equal(actual.astype(np.float32), expected.numpy())


def test_hopper_s_model_has_no_word_on_nvfp4():
    with pytest.raises(ValueError, match="has no NVFP4"):
        predict(problem_of(next(i for i in CASES if i.startswith("forward/nvfp4-"))),
                HOPPER_TRITON, NEWEST)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_change_of_a_model_is_another_model(name):
    models = dict(variants(MODELS[name]))
    assert len(models) >= 8 and all(m != MODELS[name] for m in models.values())


def test_the_model_backend_returns_what_is_predicted():
    problem = problem_of("forward/nan-token-with-clamp-becomes-bounds")
    out = ModelBackend(torch.device("cpu")).forward(problem)
    expected = predict(problem, SM100, NEWEST).stages
    y = out["y"].view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(y, expected["y"])
    assert all(np.array_equal(out[n].numpy(), expected[n]) for n in expected if n != "y")


# --- silu tables ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fast", "precise", "triton_fast", "triton_precise"])
def test_a_recorded_table_lies_within_the_documented_errors(name):
    table = tables.table("nvidia-h200-sm90", name)
    low, high = silu_bounds("fast" if "fast" in name else "g/d")
    finite = np.isfinite(bf16_decode(np.arange(65536, dtype=np.uint16)))
    assert ((table >= low) & (table <= high))[finite].all()
    assert 100 < (table != silu_table("g/d"))[finite].sum() < 3000


def test_a_table_comes_back_from_its_packed_form():
    table = silu_table("g*(1/d)").copy()
    table[[0, 7, 65535]] = 1.5, -0.0, np.inf
    packed = tables.pack("reciprocal", table)
    assert np.array_equal(tables.unpack("reciprocal", packed), table, equal_nan=True)


@pytest.mark.parametrize(
    "change", [{"words": "AAAA"}, {"count": 7}, {"count": -1 % 99999}, {"words": "=="}]
)
def test_a_damaged_table_is_refused(change):
    packed = tables.pack("fast", tables.table("nvidia-h200-sm90", "fast")) | change
    with pytest.raises(tables.TableError, match="silu table fast is damaged"):
        tables.unpack("fast", packed)


def test_a_form_that_nobody_recorded_is_the_reference_and_says_so():
    silicon = "nvidia-h200-sm90", "fast", "precise"
    oai = form_of(Activation("swiglu", 7.0, 1.702, 1.0, True), NEWEST)
    assert tables.of_gate(*silicon, oai)[1] == "correctly rounded silu of 1.702 * gate"
    sgl = form_of(Activation("swiglu", None, 1.0, 0.0, False), REVISIONS["sgl"])
    assert tables.of_gate(*silicon, sgl)[1] == "correctly rounded silu for g*(1/d)"
    plain = form_of(Activation("swiglu", None, 1.0, 0.0, True), NEWEST)
    table, assumed = tables.of_gate(*silicon, plain)
    assert assumed == "" and np.array_equal(table, tables.table(silicon[0], "fast"), equal_nan=True)


# --- predicted goldens ------------------------------------------------------------------------

PREDICTIONS = predicted.read(ROOT / "predicted" / "sm100.json")


def test_every_forward_case_has_a_prediction_under_every_contract_with_a_kernel():
    forward = {c.id: c for c in record.selection([*CASES.values()])}
    others = [c for c in CASES.values() if c.kind == "forward" and c.id not in forward]
    assert others and not any({*REVISIONS} & {*c.revisions} for c in others)  # dialects alone
    assert set(PREDICTIONS.data["cases"]) == set(forward) and PREDICTIONS.data["none"] == {}
    for case_id, case in forward.items():
        contracts = [r for u in PREDICTIONS.data["cases"][case_id]["under"] for r in u["contracts"]]
        assert sorted(contracts) == sorted(set(case.revisions) & set(record.KERNELS)), case_id
    assert tuple(REVISIONS) == record.KERNELS


def test_predictions_are_what_the_model_computes_and_lie_inside_the_envelope():
    """Some of the small cases; `megamoe golden verify-predictions --envelope` takes all."""
    cases = [c for c in small(1e6) if c.params.get("distinct") is None][::8]
    faults = record.verify(ROOT, cases, SM100, 1, lambda case, error: None, True)
    assert len(cases) > 20 and faults == []


def test_a_prediction_outside_the_envelope_is_no_golden(monkeypatch):
    narrow = replace(SM100, unit=replace(SM100.unit, align_bits=13, result_bits=13))
    monkeypatch.setitem(record.MODELS, "sm100", narrow)
    with pytest.raises(GoldenError, match="lies outside its golden"):
        record.entry(ROOT, "sm100", True, CASES[TELLING])


def test_bits_are_compared_as_far_as_an_output_shows_them():
    case = CASES[TELLING]
    problem = problem_of(case.id)
    ids, inputs = problem.topk_ids.numpy(), PREDICTIONS.data["cases"][case.id]["inputs"]
    stages = predict(problem, SM100, NEWEST).stages
    key = case.id, NEWEST.revision, inputs
    assert PREDICTIONS.compare(*key, stages, ids) == ("equal", None)
    assert PREDICTIONS.compare(*key, {"y": stages["y"]}, ids) == ("equal", None)
    stages["l2_acts"] = np.where(stages["l2_acts"] == 0, 0x80, stages["l2_acts"]).astype(np.uint8)
    assert PREDICTIONS.compare(*key, stages, ids) == ("equal", None)
    stages["y"] = stages["y"].copy()
    stages["y"].flat[3] ^= 1
    state, unlike = PREDICTIONS.compare(*key, stages, ids)
    assert state == "unlike" and unlike.stages == ("y",) and unlike.total == stages["y"].size
    assert PREDICTIONS.compare(case.id, NEWEST.revision, "others", stages, ids)[0] == "other inputs"
    assert PREDICTIONS.compare("forward/none", NEWEST.revision, inputs, stages, ids)[0] == "none"


def test_bless_wants_every_case_and_refuses_ci(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_bytes((ROOT / "manifest.json").read_bytes())
    (tmp_path / "cases").symlink_to(ROOT / "cases")
    (tmp_path / predicted.CANDIDATES).mkdir()
    path = tmp_path / predicted.CANDIDATES / "sm100.json"
    monkeypatch.setenv("CI", "1")
    with pytest.raises(GoldenError, match="refuses to run where CI is set"):
        predicted.bless(tmp_path)
    monkeypatch.delenv("CI")
    with pytest.raises(GoldenError, match="no candidates"):
        predicted.bless(tmp_path)
    lacking = {k: v for k, v in PREDICTIONS.data["cases"].items() if k != TELLING}
    predicted.write(path, PREDICTIONS.data | {"cases": lacking})
    with pytest.raises(GoldenError, match=f"lacks {TELLING}"):
        predicted.bless(tmp_path)
    assert not (tmp_path / predicted.FOLDER).exists()
    predicted.write(path, PREDICTIONS.data)
    assert predicted.changes(tmp_path, "sm100")[0].endswith(": new")
    assert predicted.bless(tmp_path) == [tmp_path / "predicted" / "sm100.json"]
    assert (tmp_path / "predicted/sm100.json").read_bytes() == PREDICTIONS.path.read_bytes()


# --- check ------------------------------------------------------------------------------------

BACKEND = """
from dataclasses import replace
from megamoe.backends.model import ModelBackend
from megamoe.backends.oracle import OracleBackend
from megamoe.predict import SM100, predict
from megamoe.spec.contract import NEWEST
import numpy as np, torch


def equal(device="cpu"):
    return ModelBackend(torch.device(device), NEWEST)


def inside(device="cpu"):
    out = OracleBackend(torch.device(device), NEWEST)
    out.accumulator = SM100.accumulator
    return out


class Outside(ModelBackend):
    def forward(self, problem):
        other = replace(SM100, unit=replace(SM100.unit, align_bits=24))
        y = predict(problem, other, NEWEST).stages["y"]
        return {"y": torch.from_numpy(y.view(np.int16)).view(torch.bfloat16)}


def outside(device="cpu"):
    return Outside(torch.device(device), NEWEST)
"""


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("name", ["equal", "inside", "outside"])
def test_check_says_what_an_output_is_to_the_prediction(tmp_path, capsys, name):
    (tmp_path / "ours.py").write_text(BACKEND)
    arguments = ["check", "--backend", f"{tmp_path / 'ours.py'}:{name}", "--case", EXACT, "-n", "1"]
    arguments += ["--explain-predictions"] if name == "outside" else []
    code = main([*arguments, "--json", str(tmp_path / "out.json")])
    case = json.loads((tmp_path / "out.json").read_text())["cases"][0]
    output = capsys.readouterr().out
    assert case["predicted"] == name and code == (1 if name == "outside" else 0)
    text = {
        "equal": "predicted bits (a model's, of no machine): 1 equal",
        "inside": "1 inside the envelope but not the prediction; --explain-predictions",
        "outside": "24 bits kept in the alignment, not 25",
    }[name]
    output = " ".join(output.split())
    assert text in output and (name != "outside" or "would explain it" in output)
    assert bool(case["unlike"]) == (name != "equal")


def test_a_recording_of_a_class_replaces_the_one_that_was_assumed(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "folder", lambda: tmp_path)
    assert tables.of_class("sm100", "nvidia-h200-sm90") == "nvidia-h200-sm90"
    for name in ("nvidia-b200-sm100", "nvidia-gb200-sm100", "nvidia-h200-sm90", "x-sm1000"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert tables.of_class("sm100", "nvidia-h200-sm90") == "nvidia-gb200-sm100"
