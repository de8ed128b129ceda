"""``megamoe confirm``: a file of answers is read, and says what is confirmed and what is refuted.

No GPU is asked here: the answers are those that a chip with the arithmetic of the models, or with
another, would give.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megamoe import confirm
from megamoe.cases import golden_root, load_cases
from megamoe.commands.main import main
from megamoe.confirm import ConfirmError, cases, gpu
from megamoe.confirm.words import (
    INSTRUCTIONS,
    Request,
    sample_of,
    units_near,
    words_entry,
    words_of,
)
from megamoe.golden import predicted
from megamoe.predict import SM100, tables
from megamoe.spec.contract import NEWEST
from megamoe.suite.settings import Settings

ROOT = golden_root()
PREDICTION = predicted.read(ROOT / "predicted" / "sm100.json")
CASE = "forward/claims-25-bits"
TABLES = {n: tables.table("nvidia-h200-sm90", n) for n in ("fast", "precise")}


def answers(unit=None, silu=TABLES, by_case=(), **other):
    """What a chip would say: the models' own arithmetic where nothing else is given."""
    requests = {n: Request(i, 3, 4, 2) for n, i in INSTRUCTIONS.items()}
    return {
        "gpu": "Fake B200", "machine_class": "fake-b200-sm100", "model": "sm100",
        "provenance": {"driver": "1", "date": "2026-11-28"}, "lacks": {"tcgen05 words": "none"},
        "instructions": {
            n: words_entry(a, words_of(a, unit or a.instruction.unit)) for n, a in requests.items()
        },
        "silu": {n: tables.pack(n, t) for n, t in silu.items()},
        "cases": dict(by_case), "contract": NEWEST.revision, "backend": "fake",
    } | other  # fmt: skip


def case(**change):
    prediction = next(
        u for u in PREDICTION.data["cases"][CASE]["under"] if NEWEST.revision in u["contracts"]
    )
    inputs = PREDICTION.data["cases"][CASE]["inputs"]
    answer = {"inputs": inputs, "status": "pass", "stages": dict(prediction["stages"])}
    return answer | ({"y": prediction["y"]} if "y" in prediction else {}) | change


def states(reply):
    return {f.what: f for f in confirm.statements(reply, ROOT)}


def test_answers_with_the_models_arithmetic_confirm_them(tmp_path, capsys):
    path = tmp_path / "answers.json"
    confirm.write_answers(path, answers(by_case={CASE: case()}))
    assert main(["confirm", "--from", str(path)]) == 0
    output = capsys.readouterr().out
    assert output.count("confirmed") == 5 and "refuted" not in output
    assert "wgmma-bf16: 2048 words are those of hopper-16bit" in output
    assert "not asked  tcgen05 words: none" in output
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_another_unit_is_refuted_and_named(name):
    unit = INSTRUCTIONS[name].unit
    for change, other in list(units_near(unit))[:6]:
        finding = states(answers(other))[name]
        assert finding.state == "refuted" and f"{change} leaves 0" in finding.text


def test_a_unit_that_no_change_explains_is_refuted_too():
    unit = replace(INSTRUCTIONS["wgmma-bf16"].unit, align_bits=19, result_bits=20)
    finding = states(answers(unit))["wgmma-bf16"]
    assert finding.state == "refuted" and "leaves 0" not in finding.text


def test_a_table_that_differs_is_refuted_and_one_beyond_the_errors_more_so():
    fast = TABLES["fast"].copy()
    fast[0x4000] = np.nextafter(fast[0x4000], np.float32(9))
    finding = states(answers(silu={"fast": fast}))["silu fast"]
    assert finding.state == "refuted" and "1 gates differ from nvidia-h200-sm90's" in finding.text
    fast[0x4000] = 1.5
    finding = states(answers(silu={"fast": fast}))["silu fast"]
    assert finding.state == "refuted" and "outside the documented errors" in finding.text
    table = {"reciprocal": tables.table("nvidia-h200-sm90", "precise")}
    assert states(answers(silu=table))["silu reciprocal"].state in ("new", "refuted")


def test_a_case_with_other_bits_is_refuted_and_named():
    other = case()["stages"] | {"y": "0" * 32}
    result = states(answers(by_case={CASE: case(stages=other)}))["cases of model sm100"]
    assert result.state == "refuted" and result.text.startswith("1 unlike") and CASE in result.text
    result = states(answers(by_case={CASE: case(stages=other, status="fail")}))
    assert "outside its envelope" in result["cases of model sm100"].text
    result = states(answers(by_case={CASE: case(inputs="others")}))["cases of model sm100"]
    assert (result.state, result.text) == ("not asked", "1 of other inputs")
    result = states(answers(by_case={CASE: case(stages={})}))["cases of model sm100"]
    assert (result.state, result.text) == ("not asked", "1 without a y")


def test_write_keeps_the_table_and_a_model_can_take_it(tmp_path, monkeypatch, capsys):
    fast = TABLES["fast"].copy()
    fast[0x4000] = np.nextafter(fast[0x4000], np.float32(9))
    path = tmp_path / "answers.json"
    confirm.write_answers(path, answers(silu={"fast": fast}))
    monkeypatch.setattr(tables, "folder", lambda: tmp_path / "silu")
    monkeypatch.setattr(tables, "load", tables.load.__wrapped__)
    monkeypatch.setattr(tables, "table", tables.table.__wrapped__)
    (tmp_path / "silu").mkdir()
    shutil.copy(ROOT.parent / "megamoe/predict/silu/nvidia-h200-sm90.json", tmp_path / "silu")
    assert main(["confirm", "--from", str(path), "--write"]) == 1
    assert "predict again with `megamoe golden predict`" in capsys.readouterr().out
    assert tables.recordings() == ["fake-b200-sm100", "nvidia-h200-sm90"]
    assert np.array_equal(tables.table("fake-b200-sm100", "fast"), fast, equal_nan=True)


def test_write_keeps_recorded_bits_as_a_candidate(tmp_path, monkeypatch, capsys):
    root, path = tmp_path / "golden", tmp_path / "answers.json"
    bits = json.loads((ROOT / "recorded/triton/nvidia-h200-sm90.json").read_text())
    monkeypatch.setattr("megamoe.commands.confirm._save_tables", lambda answers: "")
    monkeypatch.setattr("megamoe.confirm.statements", lambda answers, root: [])
    confirm.write_answers(path, answers(recorded=bits))
    command = ["confirm", "--from", str(path), "--write", "--golden", str(root)]
    assert main(command) == 0
    candidate = root / "recorded-candidates/triton/nvidia-h200-sm90.json"
    assert json.loads(candidate.read_text()) == bits
    assert "golden bless-bits" in capsys.readouterr().out
    for wrong in ({"machine_class": "x"}, bits | {"cases": {"forward/x": {"inputs": 7}}}):
        candidate.unlink(missing_ok=True)
        confirm.write_answers(path, answers(recorded=wrong))
        assert main(command) == 2 and len(capsys.readouterr().err.splitlines()) == 1
        assert not candidate.exists()


def test_recorded_bits_are_those_of_record_bits(monkeypatch):
    def record(settings, out, jobs, on_case, on_identity):
        (out / "x.json").write_text('{"backend": "fake"}')
        return out / "x.json", 1, 0

    monkeypatch.setattr("megamoe.suite.bits.record", record)
    assert cases.record(Settings("model"), 1, lambda c, why: None) == {"backend": "fake"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"instructions": {"wgmma-bf16": {"seed": 1}}}, "instructions"),
        (
            {
                "instructions": {
                    "wgmma-bf16": {"seed": 1, "tiles": 0, "steps": 1, "sha256": "", "sample": ""}
                }
            },
            "from 1 on",
        ),
        ({"cases": {"forward/x": {"inputs": 1}}}, "cases"),
        ({"gpu": 7}, "gpu"),
        ({"schema": 9}, "schema 9"),
        ({"silu": {"slow": {"count": 0, "words": ""}}}, "unknown silu table"),
        ({"silu": {"fast": {"count": 2, "words": "eJw="}}}, "damaged"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, capsys, change, why):
    path = tmp_path / "answers.json"
    confirm.write_answers(path, answers())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["confirm", "--from", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and why in error


def test_where_no_gpu_is_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["confirm", "--out", str(tmp_path / "x")]) == 2
    assert "run confirm where the GPU is" in capsys.readouterr().err
    assert main(["confirm"]) == 2
    with pytest.raises(ConfirmError, match="no nvcc"):
        gpu.Device(gpu.Chip("x", "9.0", "1"))


def test_a_sample_is_the_first_words():
    request = Request(INSTRUCTIONS["wgmma-e4m3"], 5, 6, 1)
    words = np.concatenate(list(words_of(request, request.instruction.unit)))
    assert np.array_equal(sample_of(words_entry(request, iter([words]))), words[:4])


def test_operands_are_of_four_sorts():
    """Any bits, near each other, sparse, and with subnormals."""
    for instruction in INSTRUCTIONS.values():
        a, _, c = next(Request(instruction, 1, 8, 4).pieces())
        values = instruction.decode(a)
        assert np.isnan(values[0]).any() and not np.isnan(values[1:4]).any()
        assert (values[2] == 0).mean() > 0.5 > (values[1] == 0).mean()
        assert c.any() and not c.all()


def test_the_cases_of_the_file_are_cases():
    assert CASE in {c.id for c in load_cases()}
    assert SM100.name == PREDICTION.model


@pytest.mark.usefixtures("warm")
def test_a_backend_s_cases_are_asked_and_confirmed():
    """By the model itself, on a CPU: a GPU's kernel takes the same way."""
    settings = Settings("model", "cpu", "forward", "full", CASE)
    reasons = []
    identity, by_case = cases.ask(
        settings, SM100.accumulator, 1, lambda c, why: reasons.append(why)
    )
    assert list(by_case) == [CASE] and reasons == [""]
    reply = answers(by_case=by_case, contract=identity.contract)
    assert states(reply)["cases of model sm100"].text == "1 equal"
    with pytest.raises(ConfirmError, match="name another with --model"):
        cases.ask(settings, "fp32-ordered", 1, lambda c, why: None)


@pytest.mark.parametrize("name", sorted(INSTRUCTIONS))
def test_the_words_of_an_h200_are_the_models(name):
    """The sample in the file; ``megamoe confirm --from`` compares all 20 million by a digest."""
    reply = confirm.read_answers(ROOT.parent / "docs/numerics/h200-words.json")
    assert reply["gpu"] == "NVIDIA H200"
    answer = reply["instructions"][name]
    request = Request(INSTRUCTIONS[name], answer["seed"], answer["tiles"], answer["steps"])
    words = sample_of(answer)
    assert request.outputs >= 20_000_000 and words.size == 2048
    (modelled_words,) = words_of(request, request.instruction.unit, len(words))
    assert np.array_equal(words_entry(request, iter([modelled_words]))["sample"], answer["sample"])
