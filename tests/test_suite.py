"""The suite against backends that are right, wrong, absent, silent or dead."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from megamoe.backends import load_backend
from megamoe.cases import load_cases
from megamoe.golden import Store, make, store
from megamoe.judge import Verdict
from megamoe.spec.contract import NEWEST, contract
from megamoe.suite import check, progress, results, summary
from megamoe.suite.runner import Runner
from megamoe.suite.settings import Settings, SettingsError
from megamoe.worker.client import Worker
from megamoe.worker.session import Identity, Launch, last_frame
from tests.helpers import command
from tests.helpers.golden import make_golden
from tests.helpers.local import Local

pytestmark = pytest.mark.usefixtures("warm")
CASES = """
[defaults]
breaks = "something"
tier = "quick"

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
tokens = 3
rows = [0, 2]

[[case]]
kind = "property"
name = "turned"
law = "token-permutation"
hidden = 128
intermediate = 128
experts = 2
top_k = 2
family = "envelope"
tokens = 3

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
args = { tokens = 385, max_num_tokens = 384 }
raises = "ValueError"
message = "DeepSeek V4 MegaMoE got 385 tokens, but the symmetric buffer was sized for 384."
"""
ZERO_FREEDOM = """family = "zero-freedom"
tokens = 3
clamp = 10
hidden_recipe = { kind = "grid" }
weights_recipe = { kind = "carrier" }
rows"""
KINDS = ("staging", "eplb", "forward", "property", "layout", "errors")

TROUBLE = """
[[case]]
kind = "forward"
name = "t{tokens}"
breaks = "something"
hidden = 128
intermediate = 128
experts = 2
top_k = 2
family = "envelope"
[case.matrix]
tokens = [1, 2, 3, 4, 5]
"""
TROUBLED = """
import os
from megamoe.backends import load_backend

class Backend:
    name = "troubled"
    accumulator = "fp32"

    def forward(self, problem):
        if problem.num_tokens == 1:
            while True:
                pass
        if problem.num_tokens == 2:
            return sum(range(10**13))
        if problem.num_tokens == 3:
            os._exit(3)
        if problem.num_tokens == 4:
            raise RuntimeError("boom")
        return load_backend("eager").forward(problem)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_golden(tmp_path_factory.mktemp("golden"), CASES)


class Wrapped:
    """Eager with some callables replaced or taken away."""

    name = "wrapped"
    accumulator = "fp32"

    def __init__(self, **callables):
        eager = load_backend("eager")
        for name in ("forward", "prepare", "eplb_map", "transform_weights"):
            function = callables.get(name, getattr(eager, name))
            if function is not None:
                setattr(self, name, function)
        self.eager = eager


def judge(root, kind, backend):
    (case,) = (c for c in load_cases(root) if c.kind == kind)
    return Runner(Local(backend), Store(root, make)).run(case)


# --- verdicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_eager_passes(root, kind):
    verdict = judge(root, kind, load_backend("eager"))
    assert (verdict.status, verdict.reason) == ("pass", "")
    assert verdict.how and verdict.seconds >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_provided_is_not_passed(root, kind):
    names = {"staging": "prepare", "eplb": "eplb_map", "layout": "transform_weights"}
    name = names.get(kind, "forward")
    verdict = judge(root, kind, Wrapped(**{name: None}))
    assert verdict.status == "not-provided" and name in verdict.reason


def test_a_feature_that_the_backend_does_not_list_is_not_provided(tmp_path):
    case = """
kind = "forward"
name = "shared"
breaks = "The shared expert's row is lost."
family = "envelope"
hidden = 128
intermediate = 128
experts = 2
top_k = 1
tokens = 1
shared_recipe = {}
"""
    root = make_golden(tmp_path, f"[[case]]{case}")
    verdict = judge(root, "forward", Wrapped())
    assert verdict.status == "not-provided" and "feature shared-expert" in verdict.reason
    backend = Wrapped()
    backend.features = ("shared-expert",)
    assert judge(root, "forward", backend).status == "pass"


def test_staging_sees_a_wrong_scale_and_rows_beyond_the_batch(root):
    eager = load_backend("eager")

    def scale(*a):
        eager.prepare(*a)
        a[4][1, 0] += 1 << 8

    verdict = judge(root, "staging", Wrapped(prepare=scale))
    assert verdict.status == "fail" and verdict.worst.stage == "x_sf"
    assert (verdict.worst.token, verdict.worst.channel, verdict.worst.ulps) == (1, 32, 1)

    def beyond(*a):
        eager.prepare(*a)
        a[5][2:] = -1

    verdict = judge(root, "staging", Wrapped(prepare=beyond))
    assert "topk_idx: 6112 bytes of rows beyond the 2 tokens were written" in verdict.reason


def test_sglangs_staging_masks_the_slots_beyond_the_batch(root):
    def staged(slots, value):
        def prepare(*a):
            eager.prepare(*a)
            a[slots][5] = value

        return prepare

    eager = load_backend("eager", contract="sgl")
    (case,) = (c for c in load_cases(root) if c.kind == "staging")
    for prepare, reason in (
        (eager.prepare, ""),
        (staged(5, 0), "topk_idx: 1 of 382 rows beyond the 2 tokens are not -1"),
        (staged(6, -0.0), "topk_weights: 1 of 382 rows beyond the 2 tokens are not 0"),
        (staged(4, 0), "x_sf: 4 bytes of rows beyond the 2 tokens were written"),
    ):
        backend = Wrapped(prepare=prepare)
        backend.contracts = ("sgl",)
        session = Local(backend, contract="sgl")
        verdict = Runner(session, Store(root, make, contract("sgl"))).run(case)
        assert verdict.reason == reason

    verdict = judge(root, "staging", Wrapped(prepare=lambda *a: None))
    assert verdict.status == "fail" and "x_sf" in verdict.reason


def test_eplb_sees_ids_and_load(root):
    eager = load_backend("eager")
    wrong_ids = Wrapped(eplb_map=lambda *a: eager.eplb_map(*a) + 1)
    assert judge(root, "eplb", wrong_ids).worst.stage == "ids"
    no_load = Wrapped(eplb_map=lambda i, load, *a: eager.eplb_map(i, load.clone(), *a))
    assert judge(root, "eplb", no_load).worst.stage == "load"
    wide = Wrapped(eplb_map=lambda *a: eager.eplb_map(*a).long())
    verdict = judge(root, "eplb", wide)
    assert verdict.status == "error"
    assert verdict.reason == (
        "case eplb/map: ids has dtype int64, expected int32; convert it in the backend"
    )


def test_layout_names_expert_and_row(root):
    eager = load_backend("eager")

    def swapped(*a):
        w13, w13_sf, w2, w2_sf = eager.transform_weights(*a)
        w2 = w2.clone()
        w2[1, 5, 6] ^= 1
        return w13, w13_sf, w2, w2_sf

    verdict = judge(root, "layout", Wrapped(transform_weights=swapped))
    assert (verdict.worst.stage, verdict.worst.index) == ("w2", (1, 5, 6))
    verdict = judge(root, "layout", Wrapped(transform_weights=lambda *a: a[0]))
    assert "must return a tuple of w13, w13_sf, w2, w2_sf" in verdict.reason


def test_layout_sees_the_strides_that_the_backend_gave(root):
    """The right values with a hole after each row: a kernel would read the holes."""
    eager = load_backend("eager")

    def holey(*a):
        w13, w13_sf, w2, w2_sf = eager.transform_weights(*a)
        e, rows, words = w13_sf.shape
        wide = torch.zeros(e, words, rows * 2, dtype=w13_sf.dtype)
        spaced = wide[:, :, ::2].transpose(1, 2)
        return w13, spaced.copy_(w13_sf), w2, w2_sf

    verdict = judge(root, "layout", Wrapped(transform_weights=holey))
    assert verdict.status == "fail" and "w13_sf has strides (512, 2, 512)" in verdict.reason


def test_forward_judges_the_rows_of_the_case_only(root):
    eager = load_backend("eager")

    def wrong_at(row):
        def forward(problem):
            y = eager.forward(problem)["y"].clone()
            y[row] = 7
            return y

        return Wrapped(forward=forward)

    assert judge(root, "forward", wrong_at(1)).status == "pass"  # rows = [0, 2]
    verdict = judge(root, "forward", wrong_at(2))
    assert verdict.status == "fail" and verdict.worst.token == 2
    assert "end-to-end" in verdict.how


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("forward", "hidden_states"), ("forward", "w2_weight"), ("property", "topk_weights"),
        ("staging", "topk_ids"), ("eplb", "logical_to_physical_map"), ("layout", "w13_weight"),
    ],
)  # fmt: skip
def test_a_written_input_is_a_fail_of_its_own(root, kind, name):
    """Whatever was returned: the judge says so before it looks at anything else."""
    eager, wrote = load_backend("eager"), []
    places = {
        "topk_ids": 2, "logical_to_physical_map": 2, "w13_weight": 0, "topk_weights": 1,
    }  # fmt: skip

    def writing(function):
        def call(*inputs):
            out = function(*inputs)
            inputs = inputs[0] if kind in ("forward", "property") else inputs
            tensor = (
                getattr(inputs, name) if not isinstance(inputs, tuple) else inputs[places[name]]
            )
            tensor.view(-1).view(torch.uint8)[-1] += 1
            wrote.append(tensor)
            return out

        return call

    callables = {"staging": "prepare", "eplb": "eplb_map", "layout": "transform_weights"}
    target = callables.get(kind, "forward")
    verdict = judge(root, kind, Wrapped(**{target: writing(getattr(eager, target))}))
    assert verdict.status == "fail"
    message, _, change = verdict.reason.partition("; ")
    assert message == f"the backend wrote into input {name}"
    last = [size - 1 for size in wrote[0].shape]  # the last byte of the last row
    assert re.fullmatch(rf"1 element, the first at {re.escape(str(last))}, from \S+ to \S+", change)


def test_a_broken_law_is_named(root):
    eager = load_backend("eager")

    def forward(problem):  # the first row of any batch is one ULP off
        out = dict(eager.forward(problem))
        y = out["y"].clone()
        y.view(torch.int16)[0] += 1
        return {**out, "y": y}

    verdict = judge(root, "property", Wrapped(forward=forward))
    assert verdict.status == "fail" and verdict.how[0] == "law"
    assert verdict.reason.startswith("token-permutation: reversing the tokens changes")


@pytest.mark.parametrize(
    ("forward", "status", "reason"),
    [
        (
            lambda p: None,
            "error",
            "case forward/tiny: forward returned NoneType; return y as",
        ),
        (lambda p: torch.zeros(3, 128), "error", "y has dtype float32, expected bfloat16"),
        (lambda p: torch.zeros(2, 128).bfloat16(), "error", "y has shape (2, 128), expected (3,"),
        (lambda p: {}, "error", "case forward/tiny: forward returned [] without 'y'; add it"),
        (
            lambda p: torch.full((3, 128), torch.nan).bfloat16(),
            "fail",
            "case forward/tiny: y is NaN everywhere; look for a scale of zero",
        ),
    ],
)
def test_a_bad_result_gets_its_own_words(root, forward, status, reason):
    verdict = judge(root, "forward", Wrapped(forward=forward))
    assert verdict.status == status and reason in verdict.reason and "\n" not in verdict.reason


def test_a_backend_that_raises_or_declines(root):
    def raising(problem):
        raise RuntimeError("boom\nand more")

    verdict = judge(root, "forward", Wrapped(forward=raising))
    assert verdict.status == "error"
    assert verdict.reason.startswith(
        "case forward/tiny: the backend raised RuntimeError: boom (test_suite.py, line "
    )

    def declining(problem):
        raise NotImplementedError("DeepGEMM MegaMoE requires SM100 GPUs.")

    verdict = judge(root, "forward", Wrapped(forward=declining))
    assert verdict.status == "skip" and "requires SM100 GPUs." in verdict.reason


def test_a_golden_without_the_backends_class(root):
    """As an older store has it, for a class that is newer."""
    session = Local(Wrapped(forward=lambda p: torch.zeros(3, 128).bfloat16()))
    session.identity = replace(session.identity, accumulator="unheard-of")
    (case,) = (c for c in load_cases(root) if c.kind == "forward")
    verdict = Runner(session, Store(root, make)).run(case)
    assert verdict.status == "error"
    assert "accumulator class 'unheard-of' is none of mxfp4 weights; claim one of" in verdict.reason


def test_a_case_that_is_not_in_the_manifest(root, tmp_path):
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases/all.toml").write_text(CASES.replace('"map"', '"mop"'))
    (case,) = (c for c in load_cases(tmp_path) if c.kind == "eplb")
    verdict = Runner(Local(load_backend("eager")), Store(root, make)).run(case)
    assert verdict.status == "error" and "case eplb/mop: not in the manifest" in verdict.reason


@pytest.fixture
def digests(tmp_path, monkeypatch):
    """A store that keeps digests of a zero-freedom case, and nothing in full."""
    monkeypatch.setattr(store, "FULL_LIMIT", 0)
    text = CASES.replace('family = "envelope"\ntokens = 3\nrows', ZERO_FREEDOM)
    return make_golden(tmp_path, text)


def test_a_brief_red_names_rows_and_asks_the_oracle_nothing(digests):
    eager = load_backend("eager")

    def forward(problem):
        y = eager.forward(problem)["y"].clone()
        y[2, 5] = 7
        return y

    def unasked(case, classes):
        raise AssertionError("the oracle was asked")

    (case,) = (c for c in load_cases(digests) if c.kind == "forward")
    runner = Runner(Local(Wrapped(forward=forward)), Store(digests, unasked))
    runner.brief = True
    verdict = runner.run(case)
    reason = "y: 1 of 2 rows have other bits, the first is 2; run it alone to see the elements"
    assert (verdict.status, verdict.reason) == ("fail", reason)
    assert not runner.details and verdict.worst is None
    runner = Runner(Local(Wrapped(forward=forward)), Store(digests, make))
    full = runner.run(case)
    assert full.status == "fail" and (full.worst.token, full.worst.channel) == (2, 5)
    right = Runner(Local(eager), Store(digests, unasked))
    right.brief = True
    assert right.run(case).status == "pass"


# --- a whole run ------------------------------------------------------------------------------


def megamoe(root, *arguments):
    return command.megamoe("check", "--golden", str(root), *arguments)


def test_check_judges_every_case_and_writes_reports(root, tmp_path):
    report, junit = tmp_path / "r.json", tmp_path / "r.xml"
    ran = megamoe(root, "--backend", "eager", "--json", str(report), "--junit", str(junit))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "GREEN: all 6 judged cases passed in" in ran.stdout
    data = json.loads(report.read_text())
    assert data["backend"] == "eager" and data["counts"]["pass"] == 6
    assert data["tier"] == "quick" and data["contract"] == NEWEST.revision and data["shard"] is None
    assert {"processor", "cores"} <= set(data["machine"]) and "torch" in data["versions"]
    assert [c["id"] for c in data["cases"]] == sorted(c.id for c in load_cases(root))
    assert {"id", "kind", "status", "reason", "worst", "how", "seconds"} <= set(data["cases"][0])
    suites = ElementTree.parse(junit).getroot()
    assert sum(int(s.get("tests")) for s in suites) == 6


WRONG = """
from megamoe.backends import load_backend

class Backend:
    name = "wrong"
    accumulator = "fp32"

    def forward(self, problem):
        y = load_backend("eager").forward(problem)["y"]
        return y * 2 if problem.num_tokens > 1 else y
"""


def test_maxfail_stops_and_failed_takes_up_the_reds_alone(tmp_path):
    root = make_golden(tmp_path, TROUBLE)
    (root / "bad.py").write_text(WRONG)
    backend, report = f"{root / 'bad.py'}:Backend", root / "r.json"
    common = ("--backend", backend, "--tier", "full", "-n", "1")
    ran = megamoe(root, *common, "--maxfail", "2", "--json", str(report))
    counts = json.loads(report.read_text())["counts"]
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert (counts["fail"], counts["pass"] + counts["not-run"]) == (2, 3)
    assert "stopped: --maxfail 2 is reached" in ran.stderr
    assert "RED: 2 of " in ran.stdout and "the run was stopped" in ran.stdout
    again = megamoe(root, "--backend", backend, "--failed", str(report), "--pictures", "1")
    assert again.returncode == 1 and "RED: 2 of 2 judged cases" in again.stdout
    assert again.stdout.count("alone:  megamoe check") == 1
    none = megamoe(root, "--backend", backend, "--failed", str(report), "--kind", "eplb")
    assert none.returncode == 2 and "none of the selected cases failed there" in none.stderr


@pytest.mark.slow
def test_one_bad_case_does_not_end_the_run(tmp_path):
    root = make_golden(tmp_path, TROUBLE)
    (root / "bad.py").write_text(TROUBLED)
    report = root / "r.json"
    backend = f"{root / 'bad.py'}:Backend"
    arguments = ("--tier", "full", "--timeout", "3", "-n", "1", "--json", str(report))
    ran = megamoe(root, "--backend", backend, *arguments)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    cases = {c["id"]: c for c in json.loads(report.read_text())["cases"]}
    hung = f'no result within 3 s, its process was ended, last seen in File "{root}/bad.py", line '
    reasons = (
        hung,
        hung,
        "the backend ended its process (exit status 3)",
        "the backend raised RuntimeError: boom (bad.py, line ",
    )
    for tokens, words in enumerate(reasons, start=1):
        case = cases[f"forward/t{tokens}"]
        assert case["status"] == "error"
        assert case["reason"].startswith(f"case {case['id']}: {words}")
    assert cases["forward/t5"]["status"] == "pass" and len(cases) == 5
    assert "RED: 4 of 5 judged cases did not pass" in ran.stdout
    assert f"alone:  megamoe check --backend {backend} --case forward/t1" in ran.stdout


# t1 spoils its process as a sticky CUDA error does: whatever comes after it there fails. t2 does so
# too, but its own answer is right; t3 takes the process with it.
SPOILING = """
import os
from megamoe.backends import load_backend

SPOILED = False

class Backend:
    name = "spoiling"
    accumulator = "fp32"

    def usable(self):
        if SPOILED:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return True

    def forward(self, problem):
        global SPOILED
        if SPOILED:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if problem.num_tokens == 3:
            os._exit(3)
        SPOILED = problem.num_tokens < 3
        if problem.num_tokens == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return load_backend("eager").forward(problem)
"""
SPOILED = (
    "after it the process is of no use (RuntimeError: CUDA error: an illegal memory access was "
    "encountered)"
)


@pytest.mark.slow
def test_a_spoiled_process_is_replaced_and_the_rest_stays_green(tmp_path):
    """One worker takes every case, so without a new process all after the first would be red."""
    root = make_golden(tmp_path, TROUBLE)
    (root / "bad.py").write_text(SPOILING)
    report = root / "r.json"
    arguments = ("--tier", "full", "-n", "1", "--json", str(report))
    ran = megamoe(root, "--backend", f"{root / 'bad.py'}:Backend", *arguments)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    cases = {c["id"]: c for c in json.loads(report.read_text())["cases"]}
    status = [cases[f"forward/t{tokens}"]["status"] for tokens in range(1, 6)]
    assert status == ["error", "error", "error", "pass", "pass"], ran.stdout
    error, right, died = (cases[f"forward/t{tokens}"]["reason"] for tokens in (1, 2, 3))
    assert error.startswith("case forward/t1: the backend raised RuntimeError: CUDA error")
    assert error.endswith(SPOILED)
    assert right == f"case forward/t2: {SPOILED}"
    assert died.startswith("case forward/t3: the backend ended its process")
    assert "RED: 3 of 5 judged cases did not pass" in ran.stdout


STICKY = """
import torch
from megamoe.backends import load_backend

class Backend:
    name = "sticky"
    accumulator = "fp32"

    def forward(self, problem):
        if problem.num_tokens == 1:  # a device-side assertion: every later call fails
            torch.zeros(1, device="cuda")[torch.full((1,), 10**6, device="cuda")]
        return load_backend("eager", "cuda").forward(problem)
"""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_sticky_cuda_error_takes_one_case_only(tmp_path):
    root = make_golden(tmp_path, TROUBLE)
    (root / "bad.py").write_text(STICKY)
    report = root / "r.json"
    arguments = ("--tier", "full", "-n", "1", "--device", "cuda", "--json", str(report))
    ran = megamoe(root, "--backend", f"{root / 'bad.py'}:Backend", *arguments)
    cases = {c["id"]: c for c in json.loads(report.read_text())["cases"]}
    assert "after it the process is of no use" in cases.pop("forward/t1")["reason"]
    assert {c["status"] for c in cases.values()} == {"pass"}, ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_the_same_under_ones_own_pytest(tmp_path, workers):
    """With pytest-xdist, whose processes share a worker, and without."""
    root = make_golden(tmp_path, TROUBLE)
    (root / "bad.py").write_text(SPOILING)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MEGAMOE_GOLDEN": str(root),
        "MEGAMOE_BACKEND": f"{root / 'bad.py'}:Backend", "MEGAMOE_TIER": "full",
        "PYTHONPATH": str(Path(check.__file__).parents[2]),
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "megamoe.suite", "-v", *workers],
        capture_output=True, text=True, timeout=240, env=environment, cwd=root, check=False,
    )  # fmt: skip
    assert ran.returncode == 1, ran.stdout + ran.stderr
    for tokens in (1, 2, 3, 4, 5):
        word = "PASSED" if tokens > 3 else "FAILED"
        lines = [x for x in ran.stdout.splitlines() if f"[forward/t{tokens}]" in x and word in x]
        assert lines, ran.stdout
    assert "2 passed" in ran.stdout


@pytest.mark.slow
def test_a_hang_under_ones_own_pytest_is_ended(tmp_path):
    root = make_golden(tmp_path, TROUBLE)
    (root / "bad.py").write_text(TROUBLED)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MEGAMOE_GOLDEN": str(root),
        "MEGAMOE_BACKEND": f"{root / 'bad.py'}:Backend", "MEGAMOE_TIER": "full",
        "MEGAMOE_TIMEOUT": "3", "PYTHONPATH": str(Path(check.__file__).parents[2]),
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "megamoe.suite", "-v"],
        capture_output=True, text=True, timeout=240, env=environment, cwd=root, check=False,
    )  # fmt: skip
    message = (
        f'no result within 3 s, its process was ended, last seen in File "{root}/bad.py", line '
    )
    assert ran.stdout.count(message) >= 2, ran.stdout + ran.stderr
    assert "4 failed, 1 passed" in ran.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-p", "megamoe.suite.plugin", "--megamoe-backend", "gone.py:B"), "no Python file at"),
        (("-p", "megamoe.suite.plugin", "-n1", "--megamoe-backend", "gone.py:B"), "no Python file"),
        (("-p", "megamoe.suite.plugin", "-n1", "--megamoe-workers", "0"), "--megamoe-workers 0: "),
    ],
)
def test_under_pytest_what_cannot_run_at_all_is_one_line(root, options, message):
    environment = {**os.environ, "MEGAMOE_GOLDEN": str(root), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(check.__file__).parents[2])}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "megamoe.suite", *options],
        capture_output=True, text=True, timeout=240, env=environment, cwd=root, check=False,
    )  # fmt: skip
    text = ran.stdout + ran.stderr
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR, text
    assert message in text and "INTERNALERROR" not in text and "Traceback" not in text


def test_under_pytest_a_case_that_the_contract_does_not_know_is_skipped(tmp_path):
    root = make_golden(tmp_path, PADDED)
    environment = {**os.environ, "MEGAMOE_GOLDEN": str(root), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(check.__file__).parents[2])}  # fmt: skip
    (root / "june.py").write_text(JUNE)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "megamoe.suite", "-rs",
         "-p", "megamoe.suite.plugin", "--megamoe-backend", "june.py:Backend"],
        capture_output=True, text=True, timeout=240, env=environment, cwd=root, check=False,
    )  # fmt: skip
    assert "contract 2026-06 does not know what this case asks for" in ran.stdout
    assert "1 passed, 1 skipped" in ran.stdout and ran.returncode == 0


PADDED = """
[defaults]
kind = "eplb"
breaks = "something"
tier = "quick"
tokens = 4
top_k = 2
logical = 4
physical = 4
[[case]]
name = "plain"
[[case]]
name = "padded"
unpadded = 2
"""
JUNE = """
from megamoe.backends.eager import EagerBackend
from megamoe.spec.contract import BASE

def Backend():
    return EagerBackend(BASE)
"""


def test_a_worker_is_judged_as_an_object_of_this_process_is(root):
    """What the other tests show of objects holds for backends in workers."""
    with Worker(Launch("eager")) as worker:
        runner = Runner(worker, Store(root, make))
        for kind in KINDS:
            (case,) = (c for c in load_cases(root) if c.kind == kind)
            here = judge(root, kind, load_backend("eager"))
            there = replace(runner.run(case), seconds=0.0, process=0, calls=None)
            assert there == replace(here, seconds=0.0)


def test_a_backend_that_cannot_be_loaded_is_one_line_and_no_verdict(root):
    ran = megamoe(root, "--backend", "absent.py:X")
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("megamoe: error: backend absent.py:X: no Python file at ")


def test_pyargs_runs_the_same_items(root):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MEGAMOE_GOLDEN": str(root), "MEGAMOE_KIND": "eplb",
        "PYTHONPATH": str(Path(check.__file__).parents[2]),
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", "megamoe.suite", "-v"],
        capture_output=True, text=True, timeout=120, env=environment, cwd=root, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "test_case[eplb/map] PASSED" in ran.stdout and "1 passed" in ran.stdout


# --- report and progress ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "code", "line"),
    [
        ({"pass": 2}, 0, "GREEN: all 2 judged cases passed"),
        (
            {"pass": 2, "skip": 1},
            0,
            "GREEN: all 2 judged cases passed; 1 of 3 not judged (skipped)",
        ),
        ({"pass": 2, "fail": 1}, 1, "RED: 1 of 3 judged cases did not pass"),
        (
            {"fail": 1, "skip": 1, "not-provided": 2},
            1,
            "RED: the one judged case did not pass; 3 of 4 not judged (2 not provided, 1 skipped)",
        ),
        ({"error": 1}, 1, "RED: the one judged case did not pass"),
        ({"pass": 1}, 0, "GREEN: the one judged case passed"),
        (
            {"skip": 1, "not-provided": 2},
            2,
            "NOTHING JUDGED: 0 of 3 cases (2 not provided, 1 skipped)",
        ),
        ({}, 2, "NOTHING JUDGED: 0 of 0 cases"),
        (
            {"pass": 2, "not-run": 3},
            2,
            "STOPPED: all 2 judged cases passed; the run was stopped, 3 not run",
        ),
        (
            {"fail": 1, "not-run": 3},
            1,
            "RED: the one judged case did not pass; the run was stopped, 3 not run",
        ),
    ],
)
def test_exit_code_and_verdict_line(counts, code, line):
    assert results.exit_code(counts) == code
    assert summary.verdict_line({"counts": counts}) == line


def test_junit_says_why():
    verdicts = [
        Verdict("eplb/a", "eplb", "pass"),
        Verdict("eplb/b", "eplb", "fail", "ids: 1 of 2 outside"),
        Verdict("eplb/c", "eplb", "error", "bad \x00 byte & <tag>"),
        Verdict("staging/d", "staging", "not-provided", "the backend has no prepare"),
    ]
    report = results.build(Settings(), Identity("mine", "fp32", ("eplb_map",)), verdicts)
    root = ElementTree.fromstring(results.junit(report))
    eplb, staging = (
        root.find("*[@name='megamoe.eplb']"),
        root.find("*[@name='megamoe.staging']"),
    )
    assert (eplb.get("failures"), eplb.get("errors"), eplb.get("skipped")) == ("1", "1", "0")
    assert eplb.find("*[@name='eplb/b']/failure").get("message") == "ids: 1 of 2 outside"
    assert eplb.find("*[@name='eplb/c']/error").get("message") == "bad ? byte & <tag>"
    skipped = staging.find("testcase/skipped").get("message")
    assert skipped == "not-provided: the backend has no prepare"


def test_progress_lines_and_live():
    plain = Console(width=200, record=True, force_terminal=False, file=io.StringIO())
    with progress.Progress(2, plain, Settings(), {}, verbose=True) as p:
        p.on_verdict(Verdict("eplb/a", "eplb", "skip", "the backend declined: no"))
        p.on_verdict(Verdict("eplb/b", "eplb", "fail", "ids: 1 of 2 outside"))
    text = plain.export_text()
    assert "[1/2] skipped eplb/a 0.0 s  the backend declined: no" in text
    assert "[2/2] fail eplb/b 0.0 s  ids: 1 of 2 outside" in text
    live = Console(width=200, force_terminal=True, record=True, file=io.StringIO())
    with progress.Progress(2, live, Settings(), {"eplb/a": 50.0, "eplb/b": 20.0}) as p:
        p.backlog = 70.0
        p.workers = 2
        p.on_start("eplb/b")
        p.on_verdict(Verdict("eplb/a", "eplb", "pass", seconds=25.0))  # half of its recorded time
        live.print(p._render())
    text = live.export_text()
    assert "1/2" in text and "pass 1" in text and "about 10 s left" in text and "eplb/b" in text


def test_settings_from_options_environment_and_defaults(monkeypatch):
    monkeypatch.setenv("MEGAMOE_TIMEOUT", "7")
    monkeypatch.setenv("MEGAMOE_KIND", "eplb")
    options = {"kind": "staging"}
    settings = Settings.read(options.get)
    assert (settings.kind, settings.timeout, settings.backend) == ("staging", 7.0, "eager")
    assert Settings().chosen_tier == "quick" and Settings(case="x").chosen_tier == "full"
    assert Settings(case="x", tier="quick").chosen_tier == "quick"
    monkeypatch.setenv("MEGAMOE_TIER", "")
    monkeypatch.setenv("MEGAMOE_SHRAD", "1/2")
    with pytest.raises(SettingsError, match="the environment has MEGAMOE_SHRAD, which nothing"):
        Settings.read(options.get)
    assert Settings(device="cuda", golden="g").again() == " --device cuda --golden g"


def test_the_last_frame_of_the_main_thread():
    stack = (
        'Timeout (0:00:04)!\nThread 0x1 (most recent call first):\n  File "gateway.py", line 5\n\n'
        'Thread 0x2 (most recent call first):\n  File "k.py", line 7 in forward\n  File "m.py"\n'
    )
    assert last_frame(stack) == 'File "k.py", line 7 in forward'
    assert last_frame(stack, "m.py") == 'File "k.py", line 7 in forward', "a file and no more"
    deep = stack.replace('File "m.py"', 'File "m.py", line 9 in inner')
    assert last_frame(deep, "m.py") == 'File "m.py", line 9 in inner'
    assert last_frame("Timeout!") == "code that leaves no trace"
