"""``megamoe ab``: two environments, the same inputs, the answer in bits."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from megamoe.commands.main import main
from megamoe.compare import sides, stages
from megamoe.compare.processes import CannotStart
from megamoe.compare.requirements import virtual_environment
from megamoe.compare.running import Running
from megamoe.compare.sides import Ready, parse
from tests.helpers import history
from tests.helpers.schemas import valid

pytestmark = pytest.mark.usefixtures("warm")
HERE = Path(__file__).resolve().parent
REFACTOR = HERE / "helpers" / "refactor_44367.py"
SMALL = "forward/combine-in-bf16"

KERNEL = '''
import os, sys
import torch
from megamoe.backends.eager import EagerBackend

class Plain(EagerBackend):
    name = "plain"

class Code(Plain):
    """One activation code is another; y is not made of it."""
    def forward(self, p):
        out = super().forward(p)
        at = (out["l2_acts"] & 0x7F > 8).nonzero()[0]
        out["l2_acts"][tuple(at)] += 1
        return out

class YOnly(Plain):
    def forward(self, p):
        return super().forward(p)["y"]

class Raises(Plain):
    def forward(self, p):
        raise RuntimeError("no kernel for this shape")

class Dies(Plain):
    def forward(self, p):
        os._exit(9)

class Hangs(Plain):
    def forward(self, p):
        import time; time.sleep(60)

class Noisy(Plain):
    def forward(self, p):
        out = super().forward(p)
        out["y"][0, 0] = float(int.from_bytes(os.urandom(2), "little"))
        return out

class NoForward(Plain):
    forward = None

class Writes(Plain):
    def forward(self, p):
        p.topk_weights.mul_(2)
        return super().forward(p)

class Threads(Plain):
    def forward(self, p):
        torch.set_num_threads(torch.get_num_threads() + 1)
        return super().forward(p)

class Renames(Plain):
    def forward(self, p):
        self.name = "another"
        return super().forward(p)

class Short(Plain):
    def forward(self, p):
        return super().forward(p)["y"][1:]

class Lists(Plain):
    def forward(self, p):
        return [super().forward(p)["y"]]

class Beyond(Plain):
    """One row more than the batch has is written."""
    def prepare(self, hidden, weights, ids, x, x_sf, topk_idx, topk_weights):
        super().prepare(hidden, weights, ids, x, x_sf, topk_idx, topk_weights)
        topk_idx[len(ids)] = 0

class RowMajor(Plain):
    """The right bytes in the wrong order in memory."""
    def transform_weights(self, *given):
        w13, w13_sf, w2, w2_sf = super().transform_weights(*given)
        w13[0, 0, 0] ^= 1
        return w13, w13_sf, w2, w2_sf.contiguous()

class Talks(Plain):
    """What a backend prints is not taken for an answer."""
    def forward(self, p):
        print('@megamoe {"raised": "from a print"}'); sys.stdout.flush()
        return super().forward(p)
'''


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(KERNEL)
    return path


@pytest.fixture
def ab(kernel, tmp_path, capsys):
    """Compare two backends of ``kernel`` here; exit code, report, what was printed."""

    def run(left, right, *options, case=SMALL):
        out = tmp_path / "ab.json"
        out.unlink(missing_ok=True)
        backends = [
            f"--{side}-backend={kernel}:{name}" for side, name in (("left", left), ("right", right))
        ]
        code = main(["ab", "this", "this", *backends, "--case", case, "--json", str(out), *options])
        report = json.loads(out.read_text())
        valid("ab", report)
        return code, report, capsys.readouterr().out

    return run


# --- the answer -------------------------------------------------------------------------------


def test_identical_is_exit_0_and_the_headline_counts_what_was_compared(ab, kernel):
    code, report, out = ab("Plain", "Talks")
    # Both have the name `plain`, so the files tell them apart.
    assert report["headline"].startswith(f"A/B this, {kernel}:Plain -> this, {kernel}:Talks: ")
    assert code == 0
    assert report["kind"] == "ab"
    (case,) = report["cases"]
    assert case["status"] == "identical"
    assert case["first_stage"] is None
    assert set(case["stages"]) == {"x", "x_sf", "l2_acts", "l2_acts_sf", "y"}
    assert "identical bit for bit in the one case (" in report["headline"]
    assert report["headline"] == out.strip().splitlines()[-1]
    assert "\n" not in report["headline"]


def test_a_moved_code_is_named_by_stage_ulps_and_the_side_outside(ab):
    code, report, _ = ab("Plain", "Code")
    assert code == 1
    (case,) = report["cases"]
    assert (case["status"], case["first_stage"]) == ("moved", "l2_acts")
    stage = case["stages"]["l2_acts"]
    assert (stage["moved"], stage["max_ulps"]) == (1, 1)
    assert (stage["outside_left"], stage["outside_right"]) == (0, 1)
    assert case["stages"]["y"]["moved"] == 0
    assert (case["verdict_left"], case["verdict_right"]) == ("pass", "fail")
    assert case["worst"]["stage"] == "l2_acts"
    assert "first at l2_acts" in report["headline"]
    assert "left 0, right 1" in report["headline"]


def test_a_stage_that_one_side_does_not_show_is_said_and_not_compared(ab):
    code, report, _ = ab("Plain", "YOnly")
    assert code == 0
    (case,) = report["cases"]
    assert list(case["stages"]) == ["y"]
    assert case["one_sided"] == ["l2_acts", "l2_acts_sf", "x", "x_sf"]
    assert "elements of y)" in report["headline"]


def test_a_side_that_does_not_repeat_itself_is_no_proof_against_the_other(ab):
    code, report, _ = ab("Plain", "Noisy")
    assert code == 1
    assert report["cases"][0]["unsteady"] == ["right"]
    assert "right does not repeat its own bits" in report["headline"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Raises", "right: raised RuntimeError: no kernel for this shape (kernel.py"),
        ("Dies", "right: ended its process (exit status 9)"),
        ("NoForward", "right: missing forward"),
        ("Writes", "right: wrote into input topk_weights"),
        ("Threads", "right: left another thread count of torch"),
        ("Renames", "right: now says name 'another', but said 'plain' at the start"),
        ("Lists", "right: y is tuple, not a tensor"),
    ],
)
def test_what_gives_no_bits_is_an_error_and_exit_2(ab, name, reason):
    code, report, _ = ab("Plain", name)
    assert code == 2
    assert report["cases"][0]["status"] == "error"
    assert report["cases"][0]["reason"].startswith(reason)
    assert "could not be compared" in report["headline"]


def test_a_stage_of_another_shape_is_moved_and_no_golden_is_asked(ab):
    code, report, _ = ab("Plain", "Short")
    assert code == 1
    (case,) = report["cases"]
    assert re.search(r"int16 \(\d+, \d+\) became int16", case["stages"]["y"]["text"])
    assert case["verdict_left"] == "pass"
    assert re.match(r"cannot be judged: y has shape .*, expected", case["verdict_right"])


def test_the_goldens_judge_what_was_given_back_and_not_a_copy_of_its_bits(ab):
    """Rows beyond the batch, and the order of bytes in memory, which no bit of a stage shows."""
    case = "staging/scale-words-mispacked-h128"
    code, report, _ = ab("Plain", "Beyond", case=case)
    assert code == 1
    (row,) = report["cases"]
    assert (row["first_stage"], row["verdict_right"]) == ("beyond", "fail")
    assert (row["stages"]["beyond"]["outside_left"], row["verdict_left"]) == (0, "pass")
    assert row["stages"]["beyond"]["outside_right"] == 1
    assert (row["class"], row["right_under"]["right"]) == ("outside", [])
    code, report, _ = ab("Plain", "RowMajor", case="layout/*-h128-i256")
    (row, *_) = report["cases"]
    stages = row["stages"]
    assert (code, row["first_stage"], stages["w2_sf"]["moved"]) == (1, "w13", 0)
    assert (stages["w13"]["outside_right"], stages["w2_sf"]["outside_right"]) == (1, 1)


def test_a_hang_is_ended_and_the_next_case_gets_a_new_process(ab):
    code, report, _ = ab("Hangs", "Plain", "--timeout", "0.5", case="forward/combine-in-bf16")
    assert code == 2
    assert "no result within 0.5 s" in report["cases"][0]["reason"]


@pytest.mark.slow
def test_every_kind_with_tensors_is_compared_and_what_neither_side_has_is_said(ab):
    code, report, _ = ab("Plain", "Plain", case="[ls]*-h128*")
    assert code == 0, report["headline"]
    names = {tuple(case["stages"]) for case in report["cases"]}
    assert ("x_sf", "x", "topk_idx", "topk_weights", "beyond") in names
    assert ("w13", "w13_sf", "w2", "w2_sf") in names
    code, report, _ = ab("Plain", "Plain", case="eplb/no-tokens")
    assert (code, list(report["cases"][0]["stages"])) == (0, ["ids", "load"])
    code, report, _ = ab("NoForward", "NoForward")
    assert (code, report["not_compared"]) == (2, [SMALL])


# --- the refactor of vLLM #44367 --------------------------------------------------------------


def compare_shapes(capsys, right, case="forward/c*"):
    code = main(
        ["ab", "this", "this", f"--left-backend={REFACTOR}:Before",
         f"--right-backend={REFACTOR}:{right}", "--case", case]
    )  # fmt: skip
    return code, capsys.readouterr().out.strip().splitlines()[-1]


def test_inlining_the_private_method_moves_no_bit(capsys):
    code, line = compare_shapes(capsys, "After")
    assert code == 0, line
    assert "private-method -> this, inlined: identical bit for bit" in line


def test_an_argument_lost_while_inlining_shows_at_the_stage_it_belongs_to(capsys):
    code, line = compare_shapes(capsys, "ClampLost")
    assert code == 1
    assert "first at l2_acts" in line  # the clamp comes after linear 1, before the codes


# --- sides ------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """One of its own: a source that Nix or a wheel has unpacked has no history."""
    history.commit_all(tmp_path / "repository", [("first", {"file": "text"})])
    return tmp_path / "repository"


def test_sides_are_told_apart_by_what_they_are(tmp_path, repository):
    venv.create(tmp_path / "env", with_pip=False)
    kinds = {
        "this": "this",
        sys.executable: "python",
        str(tmp_path / "env"): "venv",
        "sgl-deep-gemm==0.1.5": "requirement",
        "torch==2.11 numpy<3": "requirement",
        "HEAD": "git",
        "git:HEAD": "git",
        "flake:deepgemm=github:deepseek-ai/DeepGEMM/54e2261": "flake",
    }
    for text, kind in kinds.items():
        assert parse(text, repository).kind == kind, text


def test_a_revision_is_of_the_checkout_around_the_current_folder(tmp_path, repository, monkeypatch):
    (repository / "below").mkdir()
    monkeypatch.chdir(repository / "below")
    side = parse("HEAD")
    assert (side.repo, side.target) == (repository, parse("HEAD", repository).target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for text, says in (
        ("git:HEAD", "^HEAD: no git repo"),
        ("HEAD", "'HEAD' is nothing known here"),
    ):
        with pytest.raises(CannotStart, match=f"{says}.*--repo DIR"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no-such-thing", "'no-such-thing' is no revision of"),
        ("git:no-such-thing", "is no revision of"),
        ("flake:nothing", "write flake:INPUT=URL"),
    ],
)
def test_what_is_no_side_is_one_line(text, says, capsys, repository):
    assert main(["ab", "this", text, "--repo", str(repository)]) == 2
    assert says in capsys.readouterr().err


def test_an_environment_that_cannot_start_names_the_side(tmp_path, capsys):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    broken.chmod(0o755)
    assert main(["ab", "this", str(broken), "--case", SMALL]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"megamoe: error: right side {broken}: ")
    why = "its process ended (exit status 3; last words: no torch here)"
    assert f"{broken} did not start: {why} while backend eager was loaded" in err


def test_an_interpreter_of_its_own_is_used(tmp_path, capsys):
    """A stand-in that says where it has been, then is Python."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho started >{tmp_path}/mark\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert main(["ab", "this", str(python), "--case", SMALL]) == 0
    assert (tmp_path / "mark").exists()


POOR = """
import sys
from importlib.abc import MetaPathFinder

class Refused(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megamoe", "numpy", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refused())
"""
"""A ``sitecustomize`` of a Python that has torch and none of our packages."""


def test_an_interpreter_without_megamoe_and_numpy_runs_a_backend_in_a_file(tmp_path, capsys):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POOR)
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={tmp_path}/site\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "import torch\n"
        "class Zeros:\n    name, accumulator = 'zeros', 'exact'\n"
        "    def forward(self, p):\n"
        "        assert (p.top_k, p.num_tokens) == (p.topk_ids.shape[1], len(p.hidden_states))\n"
        "        return torch.zeros(p.num_tokens, p.hidden_size, dtype=torch.bfloat16)\n"
    )
    path = tmp_path / "ab.json"
    code = main(["ab", "this", str(python), f"--backend={kernel}:Zeros", "--case", SMALL,
                 "--json", str(path)])  # fmt: skip
    report = json.loads(path.read_text())
    assert code == 0, report
    assert "numpy" not in report["right"] and report["right"]["backend"] == "zeros"
    capsys.readouterr()


@pytest.mark.slow
def test_a_requirement_is_installed_over_the_interpreters_own_packages(tmp_path, monkeypatch):
    """From a folder of wheels; nothing is fetched. A half-made environment is made anew."""
    wheel = make_wheel(tmp_path, "toynum", "1.5")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    cache = tmp_path / "cache"
    for _ in range(2):
        python = virtual_environment(["toynum==1.5"], sys.executable, cache)
        code = "import toynum, torch; print(toynum.V)"
        assert subprocess.check_output([python, "-c", code], text=True) == "1.5\n"
        (python.parent.parent / "complete").unlink()
    with pytest.raises(CannotStart, match=r"cannot install toynum==9: .*toynum==9"):
        virtual_environment(["toynum==9"], sys.executable, cache)
    assert not [p for p in (cache / "envs").glob("toynum-9*") if p.is_dir()]
    make_wheel(tmp_path, "toyuser", "1", needs="toynum==1.4")
    with pytest.raises(CannotStart) as error:
        virtual_environment(["toyuser==1", "toynum==1.5"], sys.executable, cache)
    assert str(error.value) == (
        "cannot install toyuser==1 toynum==1.5: requirements exclude each other: The user "
        "requested toynum==1.5; toyuser 1 depends on toynum==1.4"
    )


def make_wheel(folder, name, version, text=None, needs=""):
    """A wheel of one module that knows its version; ``needs`` is a requirement of it."""
    import zipfile

    path = folder / "wheels" / f"{name}-{version}-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": text or f'V = "{version}"\n',
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    files[f"{info}/RECORD"] = "".join(f"{n},,\n" for n in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as out:
        for file, content in files.items():
            out.writestr(file, content)
    return path


@pytest.fixture
def nix(tmp_path, monkeypatch):
    """A stand-in for nix, in a shell of which GREETED is set; an input called broken fails."""
    stub = tmp_path / "bin" / "nix"
    stub.parent.mkdir()
    stub.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\necho welcome to the shell\n'
        'case "$*" in *broken*) echo "error: no such revision"; echo "(a hint)"; exit 1;; esac\n'
        'while [ "$1" != --command ]; do shift; done\nshift\nexport GREETED=yes\n'
        f'[ "$1" != python ] || {{ shift; set -- {sys.executable} "$@"; }}\nexec "$@"\n'
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "flake.nix").write_text("{}")
    return tmp_path


def test_a_flake_side_is_nix_develop_with_one_input_overridden(nix):
    """With a stand-in for nix: what it is asked, and that its greeting does no harm."""
    side = parse("flake:deepgemm=github:deepseek-ai/DeepGEMM/54e2261", nix)
    ready = sides.ready(side, nix)
    with Running(ready, "eager", "cpu", 60.0) as side:
        assert side.greet().facts["backend"] == "eager"
    commands = (nix / "asked").read_text()
    override = "--override-input deepgemm github:deepseek-ai/DeepGEMM/54e2261"
    assert f"develop {nix}#default {override} --no-write-lock-file --command python" in commands


def test_a_shell_that_cannot_be_built_cannot_be_started(nix):
    with pytest.raises(CannotStart, match=r"does not build \(exit 1\): error: no such rev"):
        sides.ready(parse("flake:deepgemm=broken", nix), nix)


def test_a_command_runs_in_the_shell_of_a_flake(nix, tmp_path, capsys):
    """And an input that cannot be had is skipped, not blamed."""
    path = tmp_path / "report.json"
    code = main([
        "bisect", "--over", *(f"flake:dg={n}" for n in ("1", "2", "broken", "4", "5")),
        "--repo", str(nix), "--state", str(tmp_path / "state"), "--json", str(path),
        "--repeat", "1",
        "--run", 'test "$GREETED" = yes || exit 125; tail -n 1 asked | grep -Eq "dg [12] "',
    ])  # fmt: skip
    report = json.loads(path.read_text())
    verdicts = {s["rev"].removeprefix("flake:dg="): s["verdict"] for s in report["steps"]}
    assert verdicts == {"1": "good", "2": "good", "broken": "skip", "4": "bad", "5": "bad"}
    assert code == 1 and report["suspects"] == ["flake:dg=broken", "flake:dg=4"]
    capsys.readouterr()


def test_a_built_in_backend_of_a_revision_is_the_revisions_own(tmp_path):
    """The tree goes first on the import path: its megamoe, not this one."""
    package = tmp_path / "megamoe" / "backends"
    package.mkdir(parents=True)
    (tmp_path / "megamoe" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "class B:\n    name, accumulator, forward = 'of-the-tree', 'exact', print\n"
        "def load_backend(spec, device):\n    return B()\n"
    )
    with Running(Ready((sys.executable,), (str(tmp_path),)), "eager", "cpu", 60.0) as side:
        assert side.greet().facts["backend"] == "of-the-tree"


# --- bits -------------------------------------------------------------------------------------


def test_moved_counts_every_bit_and_ulps_measure_values():
    left = np.array([[0x3F80, 0x0000, 0x7FC0, 0x3F80]], dtype=np.int16)
    right = left.copy()
    right[0, 1] = np.int16(-0x8000)  # -0
    difference = stages.stage_change("y", left, right, None)
    assert (difference.count, difference.max_ulps) == (1, 0)
    right[0, 2] = 0x7FC1  # another NaN
    assert stages.stage_change("y", left, right, None).count == 2
    right[0, 3] = 0x3F83
    assert stages.stage_change("y", left, right, None).max_ulps == 3
    right[0, 3] = 0x7FC0
    assert stages.stage_change("y", left, right, None).max_ulps is None


def test_packed_scales_are_counted_one_by_one():
    left = np.array([[0x7F7F7F7F]], dtype=np.int32)
    difference = stages.stage_change("x_sf", left, left + 0x0201, None)
    assert (difference.elements, difference.count, difference.max_ulps) == (4, 2, 2)


def test_a_stage_of_another_form_on_both_sides_is_compared_as_whole_numbers():
    left = np.array([[[1, 200]]], dtype=np.uint8)
    difference = stages.stage_change(
        "x_sf", left, left + np.uint8(3), np.zeros((2, 1), dtype=np.int64)
    )
    assert (difference.elements, difference.count, difference.max_ulps) == (2, 2, 3)
