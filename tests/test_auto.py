"""``--contract auto``: what the backend names, else what its kernel's headers say, else the newest.

The packages are fakes: six header files of a table of our own, which is what detection reads.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megamoe.backends import BackendError, factory_of, load_backend
from megamoe.commands.main import main
from megamoe.spec import builds
from megamoe.spec.builds import HEADERS, KERNEL_MODULES, Build
from megamoe.spec.contract import NEWEST
from megamoe.worker import offer
from megamoe.worker.choice import NoChoice, choose, needs_restart
from megamoe.worker.client import Worker
from megamoe.worker.pool import Pool
from megamoe.worker.session import MODULES, Launch, WorkerError

pytestmark = pytest.mark.usefixtures("warm")
CASE = "forward/requantise-tiny-1e-24"
"""June and September have other bits here."""
REVISION_OF = {"old 1": "2026-06", "mid 1": "2026-09", "odd 1": "sgl", "far 1": "2099-01"}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Builds whose headers hold their own name."""
    by_name = {}
    for name, revision in REVISION_OF.items():
        digest = hashlib.sha256(name.encode()).hexdigest()[: builds.DIGITS]
        differs = {"precise_silu": "g*(1/d)"} if name == "mid 1" else {}
        by_name[name] = Build(name, revision, differs, (), {h.path: digest for h in HEADERS})
    monkeypatch.setattr(builds, "BUILDS", by_name)


def package(home: Path, name: str, text: str | None = None, below: str = "include") -> Path:
    """A package that can be imported, with the headers of a build; without ``text`` with none."""
    folder = home.joinpath(*name.split("."))
    for at in [folder, *folder.parents]:
        if at == home:
            break
        at.mkdir(parents=True, exist_ok=True)
        (at / "__init__.py").touch()
    for header in HEADERS if text is not None else ():
        path = folder / below / "deep_gemm" / header.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


# --- the choice ---------------------------------------------------------------------------------


def test_what_the_backend_names_wins_over_what_it_has_loaded(tmp_path):
    packages = {"deep_gemm": package(tmp_path, "deep_gemm", "mid 1")}
    choice = choose({"contracts": ["2026-06"], "packages": packages})
    assert (choice.revision, choice.why) == ("2026-06", "the backend says so")


@pytest.mark.parametrize(
    ("name", "text", "revision", "why"),
    [
        ("deep_gemm", "old 1", "2026-06", "detected: deep_gemm is old 1"),
        ("sgl_deep_gemm", "odd 1", "sgl", "detected: sgl_deep_gemm is odd 1"),
        ("vllm.third_party.deep_gemm", "mid 1", "2026-09",
         "detected: vllm.third_party.deep_gemm is mid 1, which differs from 2026-09 in "
         "precise_silu g*(1/d)"),
        ("deep_gemm", "mine", NEWEST.revision,
         "the newest: the backend names none, and of what it has loaded nothing is known: "
         "deep_gemm is none of the builds known here: not one of the six headers is theirs"),
        ("deep_gemm", "far 1", NEWEST.revision,
         "the newest: the backend names none, and of what it has loaded nothing is known: "
         "deep_gemm is far 1 of 2099-01, not written down yet"),
    ],
)  # fmt: skip
def test_the_headers_of_what_it_has_loaded(tmp_path, name, text, revision, why):
    choice = choose({"contracts": None, "packages": {name: package(tmp_path, name, text)}})
    assert (choice.revision, choice.why) == (revision, why)


def test_a_package_without_headers_and_one_that_is_not_seen_from_here(tmp_path):
    for folder in (package(tmp_path, "deep_gemm"), tmp_path / "gone"):
        choice = choose({"contracts": None, "packages": {"deep_gemm": folder}})
        assert choice.revision == NEWEST.revision
        assert f"deep_gemm has no headers in {folder} that can be read from here" in choice.why


@pytest.mark.parametrize("packages", [None, {}, {"vllm": "/nowhere"}, ["deep_gemm"]])
def test_the_newest_where_nothing_is_loaded(packages):
    choice = choose({"contracts": None, "packages": packages})
    why = "the newest: the backend names none and has loaded no known kernel"
    assert (choice.revision, choice.why) == (NEWEST.revision, why)


def test_an_engine_that_has_not_loaded_its_kernel_yet(tmp_path):
    engine = package(tmp_path, "vllm")
    beside = package(tmp_path, "deep_gemm", "old 1")
    packages = {"vllm": engine}
    assert choose({"packages": packages}).why == "detected: vllm is old 1"
    package(tmp_path, "vllm.third_party.deep_gemm", "mid 1")
    assert choose({"packages": packages}).revision == "2026-09"  # it prefers its own
    assert choose({"packages": {**packages, "deep_gemm": beside}}).revision == "2026-06"
    other = package(tmp_path, "sglang")
    assert choose({"packages": {"sglang": other}}).revision == "2026-06"
    package(tmp_path, "sgl_deep_gemm", "odd 1")
    assert choose({"packages": {"sglang": other}}).revision == "sgl"


def test_packages_that_differ_decide_nothing_and_those_that_agree_do(tmp_path):
    packages = {n: package(tmp_path, n, "old 1") for n in ("deep_gemm", "sgl_deep_gemm")}
    why = "detected: deep_gemm is old 1, sgl_deep_gemm is old 1"
    assert choose({"packages": packages}).why == why
    package(tmp_path, "sgl_deep_gemm", "odd 1")
    choice = choose({"packages": packages})
    assert choice.revision == NEWEST.revision
    assert choice.why.endswith(
        "its packages differ (deep_gemm is old 1; sgl_deep_gemm is odd 1), so name one with "
        "--contract"
    )


def test_of_several_that_the_backend_names(tmp_path):
    revisions = ["2026-09", "sgl", "2026-06"]
    newest = "the newest of those that the backend names: 2026-06, 2026-09, sgl"
    choice = choose({"contracts": revisions})
    assert (choice.revision, choice.why) == ("2026-09", newest)
    packages = {"deep_gemm": package(tmp_path, "deep_gemm", "old 1")}
    choice = choose({"contracts": revisions, "packages": packages})
    assert (choice.revision, choice.why) == ("2026-06", "detected: deep_gemm is old 1")
    choice = choose({"contracts": ["2026-09", "2026-11"], "packages": packages})
    assert choice.revision == "2026-11"
    assert choice.why.endswith(", of which its kernel follows none: deep_gemm is old 1")


def test_what_is_asked_for_counts_and_must_be_computed(tmp_path):
    packages = {"deep_gemm": package(tmp_path, "deep_gemm", "old 1")}
    choice = choose({"contracts": None, "packages": packages}, "sgl")
    assert (choice.revision, choice.why) == ("sgl", "")
    with pytest.raises(NoChoice, match="computes contract 2026-06, not sgl; ask for one of these"):
        choose({"contracts": ["2026-06"]}, "sgl")
    with pytest.raises(NoChoice, match=r"`contracts` is \['1999'\]; name revisions of 2026-06"):
        choose({"contracts": ["1999"]})
    with pytest.raises(ValueError, match="unknown contract '1999'"):
        choose({"contracts": None}, "1999")


def test_who_must_be_told():
    choice = choose({"contracts": ["2026-06", "2026-09"]})
    several = {"contracts": ["2026-06", "2026-09"]}
    assert needs_restart({**several, "default": "2026-06"}, "auto", choice)
    assert needs_restart({**several, "default": "None"}, "auto", choice)
    assert not needs_restart({**several, "default": "2026-09"}, "auto", choice)
    assert not needs_restart({**several, "default": None}, "auto", choice)  # it takes none
    assert not needs_restart({**several, "default": "2026-06"}, "2026-09", choice)  # it was told
    assert not needs_restart({"contracts": ["2026-09"], "default": "2026-06"}, "auto", choice)
    assert not needs_restart(several, "auto", choice)  # an older worker's answer


# --- what a worker says -------------------------------------------------------------------------


def test_only_what_is_loaded_is_named_and_a_stand_in_lies_nowhere(monkeypatch, tmp_path):
    for name in KERNEL_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert offer.package_folders(KERNEL_MODULES) == {}
    real, bare, odd, empty = (ModuleType("x") for _ in range(4))
    real.__path__, odd.__path__, empty.__path__ = [str(tmp_path)], 7, []
    for name, module in zip(KERNEL_MODULES, (real, bare, odd, empty), strict=False):
        monkeypatch.setitem(sys.modules, name, module)
    assert offer.package_folders(KERNEL_MODULES) == {KERNEL_MODULES[0]: str(tmp_path)}


def test_the_default_of_a_factory():
    assert offer.default_of("eager", MODULES) == NEWEST.revision
    assert offer.default_of("deep_gemm", MODULES) is None
    assert offer.default_of("eager", {}) is None
    assert offer.default_of("no-such", MODULES) is None
    assert factory_of("eager")("cpu", "sgl").contracts == ("sgl",)
    with pytest.raises(BackendError, match=r"^unknown backend 'no-such'"):
        factory_of("no-such")
    with pytest.raises(BackendError, match=r"^unknown backend 'no-such'"):
        load_backend("no-such")


KERNEL = '''
import sys
from pathlib import Path

import torch
from megamoe.backends.eager import create

with Path(__file__).with_name("loads").open("a") as out:
    out.write("load ")

class Silent:
    """Computes September and says nothing of it."""
    name, accumulator = "silent", "fp32-ordered"
    def forward(self, problem):
        return create("cpu", "2026-09").forward(problem)

class Says(Silent):
    contract = "2026-06"

class Several:
    accumulator, contracts = "fp32-ordered", ("2026-06", "2026-09")
    def __init__(self, contract="2026-06"):
        self.name, self.inner = f"for {contract}", create("cpu", contract)
    def forward(self, problem):
        return self.inner.forward(problem)

class Ready(Several):
    def __init__(self, contract="2026-09"):
        super().__init__(contract)

class Open(Several):
    """Names none, and takes what it is given."""
    contracts = None

class Old(Several):
    """Names none, and knows June only."""
    contracts = None
    def __init__(self, contract="2026-06"):
        if contract != "2026-06":
            raise ValueError(f"{contract} is unknown")
        super().__init__(contract)

class Turns(Several):
    """Says something else once it is told."""
    def __init__(self, contract="2026-06"):
        super().__init__(contract)
        if contract != "2026-06":
            self.contracts = ("sgl",)

class Needs(Several):
    def __init__(self, contract):
        super().__init__(contract)

thing = Several()

def function(device, contract="2026-06"):
    assert device == torch.device("cpu")
    return Several(contract)
'''


@pytest.fixture
def kernel(tmp_path):
    """Gives the spec of an object in a file that first imports ``packages``."""

    def write(name, *packages):
        lines = "".join(f"import {package}\n" for package in packages)
        (tmp_path / "kernel.py").write_text(lines + KERNEL)
        return f"{tmp_path}/kernel.py:{name}"

    return write


def identity(spec, contract="auto"):
    with Worker(Launch(spec, contract=contract)) as worker:
        return worker.identity


def loads(tmp_path):
    return (tmp_path / "loads").read_text().split()


def test_a_wrapped_package_is_detected_and_not_imported_here(kernel, tmp_path):
    package(tmp_path, "deep_gemm", "mid 1")
    package(tmp_path, "vllm")
    reply = identity(kernel("Silent", "vllm", "deep_gemm"))
    assert reply.contract == "2026-09" and reply.why.startswith("detected: deep_gemm is mid 1")
    assert reply.contract_line == f"contract 2026-09 ({reply.why})"
    assert not {"vllm", "deep_gemm"} & set(sys.modules)
    assert identity(kernel("Silent", "deep_gemm"), "sgl").contract_line == "contract sgl"
    assert identity(kernel("Says", "deep_gemm")).contract_line == (
        "contract 2026-06 (the backend says so)"
    )


def test_a_package_that_is_installed_and_not_loaded_says_nothing(kernel, tmp_path):
    package(tmp_path, "deep_gemm", "old 1")
    reply = identity(kernel("Silent"))
    assert (reply.contract, reply.why[:10]) == (NEWEST.revision, "the newest")


@pytest.mark.parametrize(
    ("name", "packages", "contract", "count"),
    [
        ("Several", (), "2026-09", 2),
        ("function", (), "2026-09", 2),
        ("Several", ("deep_gemm",), "2026-06", 1),
        ("Ready", (), "2026-09", 1),
        ("Ready", ("deep_gemm",), "2026-06", 2),
        ("Open", (), NEWEST.revision, 2),
    ],
)
def test_a_factory_is_told_what_was_chosen(kernel, tmp_path, name, packages, contract, count):
    package(tmp_path, "deep_gemm", "old 1")
    reply = identity(kernel(name, *packages))
    assert (reply.contract, reply.name) == (contract, f"for {contract}")
    assert reply.why
    assert len(loads(tmp_path)) == count


def test_an_object_is_taken_as_it_is(kernel):
    reply = identity(kernel("thing"))
    assert (reply.contract, reply.name) == ("2026-09", "for 2026-06")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Old", r"loading it raised ValueError: 2026-11 is unknown \(kernel.py, .*\); it was asked "
                r"for contract 2026-11 \(the newest: .*\); let it name its `contracts`$"),
        ("Turns", r"kernel.py:Turns: it computes contract sgl, not 2026-09; ask for one of these"),
        ("Needs", r"it needs a `contract`; give that a default, or say --contract REV$"),
    ],
)  # fmt: skip
def test_who_cannot_be_told_is_one_line(kernel, name, says):
    with pytest.raises(WorkerError, match=says) as error:
        identity(kernel(name))
    assert "\n" not in str(error.value)


def test_later_processes_are_made_for_the_same(kernel, tmp_path):
    """Those of a pool, and one that replaces another: whatever they have loaded."""
    spec = kernel("Several")
    with Worker(Launch(spec)) as worker:
        first = worker.identity
        worker.end()
        again = worker.identity
    assert (again.contract, again.why, again.name) == (first.contract, first.why, "for 2026-09")
    assert len(loads(tmp_path)) == 3  # the last one is launched for it at once
    with Worker(Launch(spec), like=first) as other:
        package(tmp_path, "deep_gemm", "old 1")
        kernel("Several", "deep_gemm")
        assert (other.identity.contract, other.identity.why) == (first.contract, first.why)
    with Pool(Launch(kernel("Several")), 2) as pool:
        assert [w.identity.name for w in pool._workers] == ["for 2026-09"] * 2


# --- what a run says ----------------------------------------------------------------------------


def test_check_says_which_and_why_and_is_right_by_it(kernel, tmp_path, capsys):
    """The fake follows September, and so does what it computes."""
    package(tmp_path, "deep_gemm", "mid 1")
    report = tmp_path / "report.json"
    spec = kernel("Silent", "deep_gemm")
    options = ["--case", CASE, "-n", "1", "--json", str(report)]
    assert main(["check", "--backend", spec, *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("contract 2026-09 (detected: deep_gemm is mid 1, which differs from")
    document = json.loads(report.read_text())
    assert document["contract"] == "2026-09"
    assert document["contract_why"].startswith("detected: deep_gemm is mid 1")
    assert main(["check", "--backend", spec, *options, "--contract", "2026-06"]) == 1
    assert capsys.readouterr().out.startswith("contract 2026-06, 1 case\n")
    assert json.loads(report.read_text())["contract_why"] == ""


def test_ab_says_it_of_each_side(kernel, tmp_path, capsys):
    package(tmp_path, "deep_gemm", "mid 1")
    left, right = kernel("Silent", "deep_gemm"), f"{tmp_path}/kernel.py:Says"
    report = tmp_path / "ab.json"
    command = ["ab", "this", "this", "--left-backend", left, "--case", CASE, "--json", str(report)]
    assert main([*command, "--right-backend", right]) == 0
    err = capsys.readouterr().err
    assert "left: contract 2026-09 (detected: deep_gemm is mid 1" in err
    assert "right: contract 2026-06 (the backend says so)" in err
    document = json.loads(report.read_text())
    assert [document[n]["contract"] for n in ("left", "right")] == ["2026-09", "2026-06"]
    assert main([*command, "--right-backend", right, "--contract", "2026-06"]) == 0
    assert capsys.readouterr().err.strip() == "contract 2026-06"


def test_explain_says_it_before_it_starts(kernel, capsys):
    assert main(["explain", CASE, "--backend", kernel("Several"), "--json", "-"]) == 0
    output = capsys.readouterr()
    assert output.err.startswith("contract 2026-09 (the newest of those that the backend names")
    json.loads(output.out)


@pytest.mark.slow
def test_under_pytest_the_summary_says_it(kernel, tmp_path):
    spec = kernel("Several")
    for more in ((), ("-n1",)):
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "megamoe.suite.plugin", *more, "--pyargs",
             "megamoe.suite", "--megamoe-backend", spec, "--megamoe-case", CASE],
            capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "contract 2026-09 (the newest of those that the backend names: " in ran.stdout


def test_a_tensor_that_is_blank_is_filled():
    from megamoe.worker import tensors

    by_name = tensors.fill_blanks({"a": ("bfloat16", [2, 3]), "b": ("uint8", [0])}, 0x5A, "cpu")
    assert by_name["a"].shape == (2, 3) and by_name["a"].dtype == torch.bfloat16
    assert set(by_name["a"].view(torch.uint8).flatten().tolist()) == {0x5A}
    assert by_name["b"].numel() == 0
