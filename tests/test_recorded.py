"""Recorded goldens: one backend's own bits, recorded only if it repeats them, compared only if it
is the same build on the same class of machine."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from megamoe.backends import load_backend
from megamoe.cases import load_cases
from megamoe.commands.main import main
from megamoe.environment import machine_class, provenance
from megamoe.golden import GoldenError, Store, bless, make, record, recorded
from megamoe.spec.contract import NEWEST
from megamoe.suite.runner import Runner
from megamoe.worker import serve
from megamoe.worker.session import WorkerError, checked_fingerprint
from tests.helpers import command
from tests.helpers.local import Local

pytestmark = pytest.mark.usefixtures("warm")
CASES = """
[defaults]
kind = "forward"
breaks = "something"
tier = "quick"
family = "envelope"
hidden = 128
intermediate = 128
experts = 2
top_k = 2

[[case]]
name = "t{tokens}"
[case.matrix]
tokens = [0, 3, 20]

[[case]]
name = "masked"
tokens = 4
routing = { kind = "same", mask_every = 3 }

[[case]]
kind = "property"
name = "turned"
law = "token-permutation"
tokens = 3
"""

# A kernel with a fingerprint, which reads what the environment wants to be wrong with it.
BACKEND = """
import os
import torch
from megamoe.backends import load_backend

CALLS = 0

class Kernel:
    name = "Test Kernel"
    accumulator = "fp32-ordered"

    def fingerprint(self):
        return {"sources": os.environ.get("SOURCES", "s"), "options": "o",
                "binaries": {"linear": os.environ.get("BINARY", "b")}}

    def forward(self, problem):
        global CALLS
        out = dict(load_backend("eager").forward(problem))
        out["l2_acts"][problem.topk_ids < 0] = torch.randint(0, 100, (1,), dtype=torch.uint8).view(
            out["l2_acts"].dtype)
        trouble, tokens = os.environ.get("TROUBLE"), problem.num_tokens
        if trouble == "crash" and tokens == 20:
            os._exit(3)
        if trouble == "declines" and tokens == 20:
            raise NotImplementedError("not 20")
        if trouble == "memory" and tokens == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 588.00 MiB. GPU 0 "
                                         "has a total capacity of 79.18 GiB. Process 2711 has some")
        if trouble == "wrong" and tokens == 3:
            out["y"] = out["y"] * 3
        if trouble == "process" and tokens == 3:
            step(out["y"], first_process() != os.getpid())
        if trouble == "calls" and tokens == 3:
            step(out["y"], CALLS > 0)
        if trouble == "moved" and tokens == 3:
            step(out["y"], 1)
        if trouble == "moved" and tokens == 20:
            step(out["y"], 1)
        CALLS += tokens == 3
        return out

def first_process():
    mark = os.environ["MARK"]
    with open(mark, "a") as file:
        file.write(f"{os.getpid()} ")
    return int(open(mark).read().split()[0])

def step(y, by):
    # The last bit of the largest element: within the envelope of fp32 here.
    at = int(y.abs().argmax())
    y.view(torch.int16).view(-1)[at] += by
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("golden"), CASES)


def make_root(folder, text):
    """A folder of goldens, and the kernel beside it."""
    (folder / "cases").mkdir()
    (folder / "cases/all.toml").write_text(text)
    cases = load_cases(folder)
    assert record(folder, cases, 1, lambda case, error: None) == []
    (folder / "kernel.py").write_text(BACKEND)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        bless(folder, cases)
    return folder


def megamoe(root, *arguments, **environment):
    return command.megamoe(*arguments, "--golden", str(root), **environment)


def recording(root, *more, **environment):
    backend = ("--backend", f"{root}/kernel.py:Kernel", "-j", "1")
    return megamoe(root, "golden", "record-bits", *backend, *more, **environment)


def checking(root, *more, **environment):
    backend = ("--backend", f"{root}/kernel.py:Kernel", "-n", "1")
    return megamoe(root, "check", *backend, *more, **environment)


@pytest.fixture(scope="module")
def recorded_file(root):
    """The recorded file, blessed."""
    ran = recording(root)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 cases; three runs in two processes agree in every bit" in ran.stdout
    ran = megamoe(root, "golden", "bless-bits")
    assert ran.returncode == 0, ran.stderr
    (path,) = (root / "recorded").glob("*/*.json")
    return path


# --- the file ---------------------------------------------------------------------------------


def test_the_file_says_whose_the_bits_are_and_where_from(root, recorded_file):
    data = json.loads(recorded_file.read_text())
    assert recorded_file.relative_to(root).parts[:2] == ("recorded", "test-kernel")
    assert recorded_file.stem == data["machine_class"] == machine_class(serve.facts("cpu"))
    assert "nothing that another kernel must return" in data["what"]
    assert data["backend"] == "Test Kernel" and data["contract"] == NEWEST.revision
    assert data["fingerprint"] == {"sources": "s", "options": "o", "binaries": {"linear": "b"}}
    names = {"megamoe", "python", "numpy", "torch", "triton", "system"}
    assert names <= set(data["provenance"])
    manifest = json.loads((root / "manifest.json").read_text())["cases"]
    assert sorted(data["cases"]) == [
        "forward/masked", "forward/t0", "forward/t20", "forward/t3"
    ]  # fmt: skip
    for case_id, case in data["cases"].items():
        assert case["inputs"] == manifest[case_id]["inputs"]
        assert {"l2_acts", "l2_acts_sf", "y"} <= set(case["stages"])
    assert "y" in data["cases"]["forward/t3"] and "y" not in data["cases"]["forward/t20"]
    assert not list((root / "recorded-candidates").glob("*/*.json"))  # blessed ones are gone


def test_slots_that_take_no_part_are_no_part_of_the_bits(recorded_file):
    """The kernel leaves random codes in them, and could still be recorded."""
    assert "forward/masked" in json.loads(recorded_file.read_text())["cases"]


def test_the_digest_holds_dtype_shape_and_one_nan():
    ids = np.zeros((2, 1), np.int64)
    y = np.array([[0x7FC0, 1], [2, 3]], np.uint16)
    digest = recorded.digests({"y": y}, ids)["y"]
    other = np.array([[0xFFC1, 1], [2, 3]], np.uint16)  # another payload and sign
    assert recorded.digests({"y": other}, ids)["y"] == digest
    assert recorded.digests({"y": y.reshape(1, 4)}, ids)["y"] != digest
    assert recorded.digests({"y": y.view(np.int16)}, ids)["y"] != digest


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("calls", "the runs do not agree: case forward/t3: y moved in one worker"),
        ("wrong", "nothing recorded: case forward/t3: y: "),
        (
            "memory",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 588.00 MiB; use fewer "
            "--workers (kernel.py, ",
        ),
        ("crash", "the backend ended its process (exit status 3)"),
    ],
)
def test_what_does_not_repeat_or_is_wrong_is_not_recorded(root, tmp_path, trouble, message):
    ran = recording(root, "--out", str(tmp_path), TROUBLE=trouble)
    assert ran.returncode == 2 and message in ran.stderr, ran.stdout + ran.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_a_bit_that_depends_on_the_process_is_found(root, tmp_path):
    trial = ("--case", "forward/t3", "--out", str(tmp_path))
    ran = recording(root, *trial, TROUBLE="process", MARK=str(tmp_path / "mark"))
    assert ran.returncode == 2 and "case forward/t3: y moved in another worker" in ran.stderr


def test_what_the_backend_declines_is_said(root, tmp_path):
    ran = recording(root, "--out", str(tmp_path), TROUBLE="declines")
    assert "3 cases, 1 declined by the backend" in ran.stdout
    (path,) = tmp_path.rglob("*.json")
    assert "not 20" in json.loads(path.read_text())["declined"]["forward/t20"]


def test_a_feature_of_no_backend_or_contract_is_declined_and_the_rest_is_recorded(tmp_path):
    text = (
        CASES[: CASES.index("[[case]]")]
        + """
[[case]]
name = "plain"
tokens = 1

[[case]]
name = "shared"
tokens = 1
shared_recipe = {}

[[case]]
name = "oai"
tokens = 1
activation_beta = 1.0
"""
    )
    root = make_root(tmp_path, text)
    ran = recording(root, "--contract", "2026-06")
    assert "1 case, 2 declined by the backend" in ran.stdout, ran.stderr
    ran = megamoe(root, "golden", "bless-bits")
    assert ran.returncode == 0, ran.stderr
    (path,) = (root / "recorded").rglob("*.json")
    reasons = json.loads(path.read_text())["declined"]
    assert reasons["forward/shared"] == "the backend has no feature shared-expert"
    assert reasons["forward/oai"] == "contract 2026-06 does not know what it asks"


def test_a_backend_without_a_fingerprint_cannot_be_recorded(root, capsys):
    command = ["golden", "record-bits", "--backend", "eager", "--golden", str(root)]
    assert main(command) == 2
    assert "backend eager has no fingerprint()" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fingerprint",
    [None, {}, {"sources": 1, "options": "", "binaries": {}}, {"sources": "", "options": ""}],
)
def test_a_fingerprint_of_another_form_is_refused(fingerprint):
    backend = type("B", (), {"name": "b", "fingerprint": lambda self: fingerprint})()
    reply = serve.fingerprint(backend)
    if fingerprint is None:  # as of a backend that has none
        assert checked_fingerprint(reply) is None
        return
    with pytest.raises(WorkerError, match=r"fingerprint\(\) must return sources"):
        checked_fingerprint(reply)


# --- blessing ---------------------------------------------------------------------------------


def candidate(root, folder, **changes):
    data = json.loads(next((root / "recorded").glob("*/*.json")).read_text())
    return recorded.write(folder, {**data, **changes})


def test_bless_refuses_where_ci_is_set(root, recorded_file, tmp_path, monkeypatch):
    path = candidate(root, tmp_path)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(GoldenError, match="bless-bits refuses to run where CI is set"):
        recorded.bless(root, tmp_path)
    assert path.is_file()


def test_bless_refuses_what_is_partial_or_of_something_else(
    root, recorded_file, tmp_path, monkeypatch
):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(GoldenError, match="no candidates in"):
        recorded.bless(root, tmp_path)
    before = recorded_file.read_bytes()
    cases = json.loads(before)["cases"]
    some = {k: v for k, v in cases.items() if k != "forward/t3"}
    foreign = {**cases, "forward/gone": cases["forward/t3"]}
    other = {**cases, "forward/t3": {**cases["forward/t3"], "inputs": "0"}}
    for changes, message in (
        ({"cases": some}, "lacks forward/t3; record it again"),
        ({"cases": foreign}, "holds a case that the manifest does not: forward/gone"),
        ({"cases": other}, "forward/t3 was given other inputs than its golden"),
        ({"contract": "1999-01"}, "is of contract '1999-01', known are 2026-06"),
        ({"schema": 7}, "has schema 7, this megamoe reads 1"),
    ):
        candidate(root, tmp_path, **changes)
        with pytest.raises(GoldenError, match=message):
            recorded.bless(root, tmp_path)
    assert recorded_file.read_bytes() == before


# --- which build is the same ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "same"),
    [
        ({"sources": "s", "options": "o", "binaries": {"a": "1", "b": "2"}}, True),
        ({"sources": "s", "options": "o", "binaries": {"a": "1"}}, True),  # b not needed yet
        ({"sources": "s", "options": "o", "binaries": {"a": "1", "c": "3"}}, True),
        ({"sources": "s", "options": "o", "binaries": {"a": "1", "b": "9"}}, False),
        ({"sources": "s", "options": "o", "binaries": {"c": "3"}}, False),  # nothing in common
        ({"sources": "s", "options": "o", "binaries": {}}, True),  # no launch yet
        ({"sources": "x", "options": "o", "binaries": {"a": "1"}}, False),
        ({"sources": "s", "options": "x", "binaries": {"a": "1"}}, False),
        (None, False),
    ],
)
def test_a_build_is_its_sources_options_and_binaries(now, same):
    before = {"sources": "s", "options": "o", "binaries": {"a": "1", "b": "2"}}
    assert recorded.same_build(before, now) is same


# --- check ------------------------------------------------------------------------------------


def test_check_compares_with_recorded_bits_and_says_so(root, recorded_file, tmp_path):
    report, junit = tmp_path / "r.json", tmp_path / "r.xml"
    ran = checking(root, "--json", str(report), "--junit", str(junit))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"recorded bits ({recorded_file.relative_to(root)}): matched 4" in ran.stdout
    data = json.loads(report.read_text())
    assert data["recorded"]["file"] == str(recorded_file.relative_to(root))
    forward = [c for c in data["cases"] if c["kind"] == "forward"]
    assert {c["recorded"] for c in forward} == {"matched"}
    assert all(c["how"][0] == "bitwise" and c["how"][-1] == "recorded" for c in forward)
    assert [c["recorded"] for c in data["cases"] if c["kind"] == "property"] == [""]
    item = ElementTree.parse(junit).getroot().find("*/testcase[@name='forward/t3']/properties")
    properties = {p.get("name"): p.get("value") for p in item}
    assert properties == {"judged": "bitwise, staged, recorded", "recorded": "matched"}


def test_a_moved_bit_is_a_fail_of_its_own(root, recorded_file, tmp_path):
    report = tmp_path / "r.json"
    ran = checking(root, "--json", str(report), TROUBLE="moved")
    assert ran.returncode == 1
    cases = {c["id"]: c for c in json.loads(report.read_text())["cases"]}
    small, large = cases["forward/t3"], cases["forward/t20"]
    machine = machine_class(serve.facts("cpu"))
    message = f"recorded bits: y moved, on {machine} and with the same fingerprint"
    assert small["status"] == "fail" and small["recorded"] == "moved"
    assert f"{message}: 1 of 384 elements" in small["reason"]
    assert small["worst"]["stage"] == "y" and small["worst"]["ulps"] == 1
    assert large["recorded"] == "moved" and large["reason"].endswith(message)  # y not kept whole
    assert cases["forward/masked"]["recorded"] == "matched"


@pytest.mark.parametrize("changes", [{"SOURCES": "new"}, {"BINARY": "new"}])
def test_another_build_is_judged_by_its_golden_alone(root, recorded_file, tmp_path, changes):
    report = tmp_path / "r.json"
    ran = checking(root, "--json", str(report), **changes)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "other fingerprint 4; all were judged by the goldens" in ran.stdout
    forward = [c for c in json.loads(report.read_text())["cases"] if c["kind"] == "forward"]
    assert all(c["recorded"] == "other fingerprint" for c in forward)
    assert not any("recorded" in c["how"] for c in forward)


def test_a_backend_of_which_nothing_was_recorded(root, recorded_file):
    ran = megamoe(root, "check", "--backend", "eager", "--case", "forward/t3", "-n", "1")
    assert ran.returncode == 0
    assert "GREEN" in ran.stdout and "recorded bits" not in ran.stdout


def test_other_inputs_and_another_contract_are_not_compared(root, recorded_file):
    data = json.loads(recorded_file.read_text())
    recorded_bits = recorded.Recording(recorded_file, data)
    build, inputs = data["fingerprint"], data["cases"]["forward/t3"]["inputs"]
    assert recorded_bits.state("forward/t3", inputs, build, NEWEST.revision) == "same"
    assert recorded_bits.state("forward/t3", "other", build, NEWEST.revision) == "other inputs"
    assert recorded_bits.state("forward/new", inputs, build, NEWEST.revision) == "none"
    old = recorded.Recording(recorded_file, {**data, "contract": "1999-01"})
    assert old.state("forward/t3", inputs, build, NEWEST.revision) == "other contract"


def repeated(root, recorded_file, stages, digests):
    """Case t3 judged by a backend of the same build that shows ``stages``, ``digests`` recorded."""
    data = json.loads(recorded_file.read_text())
    data["cases"]["forward/t3"]["stages"] |= digests
    eager = load_backend("eager")

    class Kernel:
        name, accumulator = "Test Kernel", "fp32-ordered"

        def fingerprint(self):
            return data["fingerprint"]

        def forward(self, problem):
            return {name: eager.forward(problem)[name] for name in stages}

    (case,) = (c for c in load_cases(root) if c.id == "forward/t3")
    recorded_bits = recorded.Recording(recorded_file, data)
    return Runner(Local(Kernel()), Store(root, make), recorded_bits).run(case)


def test_what_its_golden_allows_still_fails_if_it_moved(root, recorded_file):
    stages = ("x", "x_sf", "l2_acts", "l2_acts_sf", "y")
    assert repeated(root, recorded_file, stages, {}).status == "pass"
    verdict = repeated(root, recorded_file, stages, {"l2_acts": "0"})
    assert verdict.status == "fail" and verdict.recorded == "moved"
    assert verdict.reason.startswith("recorded bits: l2_acts moved, on ")
    assert [f.stage for f in verdict.findings] == ["l2_acts"]


def test_a_stage_that_is_no_longer_shown_has_moved(root, recorded_file):
    verdict = repeated(root, recorded_file, ("y",), {})
    assert verdict.status == "fail" and "l2_acts is no longer shown" in verdict.reason


def test_a_damaged_file_is_said_before_anything_runs(root, recorded_file, tmp_path, capsys):
    whole = recorded_file.read_bytes()
    try:
        recorded_file.write_bytes(whole[:100])
        backend = f"{root}/kernel.py:Kernel"
        assert main(["check", "--backend", backend, "--golden", str(root)]) == 2
        message = capsys.readouterr().err
        assert f"recorded/test-kernel/{recorded_file.name} cannot be read as JSON" in message
    finally:
        recorded_file.write_bytes(whole)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_machine_class_of_a_gpu_is_its_model_and_capability():
    major, minor = torch.cuda.get_device_capability()
    assert machine_class(serve.facts("cuda")).endswith(f"-sm{major}{minor}")
    origin = provenance(serve.facts("cuda"))
    assert origin["gpu"] == torch.cuda.get_device_name() and origin["driver"]
