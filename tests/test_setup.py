"""The set-up: locks that agree with pyproject.toml, verbs that exist, messages that help.

Nothing here touches the network or the repository's own .venv: the set-up script runs in a copy,
against a fake interpreter that writes down how it was called.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {path.name: path.read_text() for path in sorted((ROOT / "requirements").glob("*.txt"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDS = [*PROJECT["dependencies"], *(need for extra in EXTRAS.values() for need in extra)]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def entries(lock: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Package -> (requirement, digests), of the lines that hold on Linux, as here."""
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    packages: dict[str, tuple[Requirement, list[str]]] = {}
    for block in re.findall(r"^[^#\s].*(?:\n[ \t]+.*)*", LOCKS[lock], flags=re.MULTILINE):
        head, *rest = (line.rstrip("\\ ") for line in block.splitlines())
        requirement = Requirement(head)
        if requirement.marker is None or requirement.marker.evaluate(linux):
            assert canonicalize_name(requirement.name) not in packages, f"{lock} names it twice"
            packages[canonicalize_name(requirement.name)] = (
                requirement,
                [line.strip() for line in rest],
            )
    return packages


# --- locks ---------------------------------------------------------------------------------------


def test_the_four_locks_are_there() -> None:
    assert sorted(LOCKS) == ["base.txt", "test.txt", "torch-cpu.txt", "torch-cuda.txt"]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_exact_and_hashed(lock: str) -> None:
    assert entries(lock)
    for requirement, digests in entries(lock).values():
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert digests, f"{requirement} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in digests)


@pytest.mark.parametrize("lock", LOCKS)
def test_no_lock_names_a_download_host(lock: str) -> None:
    assert not re.search(r"http|://|--(extra-)?index|--find-links|\s@\s", LOCKS[lock])


@pytest.mark.parametrize("torch", ["torch-cpu.txt", "torch-cuda.txt"])
def test_files_installed_together_share_no_package(torch: str) -> None:
    names = [name for lock in (torch, "base.txt", "test.txt") for name in entries(lock)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("torch", ["torch-cpu.txt", "torch-cuda.txt"])
@pytest.mark.parametrize("need", NEEDS)
def test_each_dependency_is_locked_within_its_range(need: str, torch: str) -> None:
    dependency = Requirement(need)
    locked = entries(torch) | entries("base.txt") | entries("test.txt")
    requirement, _ = locked[canonicalize_name(dependency.name)]
    (pin,) = requirement.specifier
    assert dependency.specifier.contains(pin.version)


def test_the_two_torch_locks_differ_only_by_the_gpu() -> None:
    cpu, cuda = entries("torch-cpu.txt"), entries("torch-cuda.txt")
    assert set(cpu) <= set(cuda)
    assert all(re.match(r"nvidia-|cuda-", name) for name in set(cuda) - set(cpu))
    assert all(str(cpu[name]) == str(cuda[name]) for name in cpu if name != "torch")
    (cpu_pin,), (cuda_pin,) = cpu["torch"][0].specifier, cuda["torch"][0].specifier
    assert cpu_pin.version == f"{cuda_pin.version}+cpu"


def test_cpu_torch_is_locked_for_each_supported_python() -> None:
    lines = (ROOT / "requirements/torch-cpu.sha256").read_text().splitlines()
    wheels = {wheel: digest for digest, wheel in (line.split() for line in lines)}
    assert {f"--hash=sha256:{digest}" for digest in wheels.values()} == set(
        entries("torch-cpu.txt")["torch"][1]
    )
    pythons = {re.search(r"-(cp\d+)-manylinux_2_28_x86_64", wheel) for wheel in wheels}
    assert {"cp311", "cp312", "cp313", "cp314"} == {match[1] for match in pythons if match}


# --- the Makefile --------------------------------------------------------------------------------


def make(*arguments: str, inside: Mapping[str, str] = MappingProxyType({})) -> str:
    """What `make` prints, without the variables of a make that may be running this test.

    `inside`: variables that a shell exports.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    clean = {k: v for k, v in clean.items() if k not in ("ARGS", "MEGAMOE_PYTHON", "PYTHON")}
    result = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=clean | inside,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


@needs_make
def test_help_is_the_default_and_lists_every_verb() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (verbs_of_make,) = re.findall(r"^VERBS := (.*)$", text, flags=re.MULTILINE)
    names = re.findall(r"^  ([a-z0-9-]+) {2,}\S", make(), flags=re.MULTILINE)
    assert names == verbs_of_make.split()
    verbs = {"setup", "check", "check-full", "test", "test-fast", "lint", "golden-verify", "clean"}
    assert verbs <= set(names)


@needs_make
def test_check_sets_up_and_judges_eager_on_the_quick_tier() -> None:
    recipe = make("-n", "check")
    assert recipe.index("tools/setup_env.sh") < recipe.index("check --backend 'eager' \n")


@needs_make
def test_check_passes_its_variables_on() -> None:
    recipe = make("-n", "check", "BACKEND=mine.py:Kernel", "TIER=full", "ARGS=--kind eplb")
    assert "check --backend 'mine.py:Kernel' --tier 'full' --kind eplb" in recipe


@needs_make
@pytest.mark.parametrize(
    ("verb", "command"),
    [
        ("check", "check --backend 'eager' --case 'eplb/*,!*-t1'"),  # of any tier, as --case
        ("check-full", "full --case 'eplb/*,!*-t1'"),
        ("golden-verify", "golden verify --case 'eplb/*,!*-t1'"),
    ],
)
def test_case_chooses_cases(verb: str, command: str) -> None:
    assert command in make("-n", verb, "CASE=eplb/*,!*-t1")
    assert "--case" not in make("-n", verb)


@needs_make
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "CASES=x"], "no verb reads CASES; did you mean CASE? `make` reads: PYTHON "),
        (["check", "case=x"], "no verb reads case; did you mean CASE? `make` reads: "),
        (["TIRE=full"], "no verb reads TIRE; did you mean TIER? `make` reads: "),
        (["check", "CAS=x"], "no verb reads CAS; did you mean CASE? `make` reads: "),
        (["chekc"], "no verb chekc; did you mean check? `make` lists the verbs"),
        (["chekc", "CASE=x"], "no verb chekc; did you mean check?"),
        (["test", "CASE=x"], "CASE chooses cases of check check-full golden-verify; test"),
        (["CASE=x"], "golden-verify; help reads none"),
    ],
)  # fmt: skip
def test_a_variable_that_nothing_reads_is_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        make("-n", *arguments)
    assert error.value.returncode == 2 and message in error.value.stderr
    assert error.value.stdout == "", "nothing runs"


@needs_make
def test_what_a_shell_exports_is_not_a_variable_of_make() -> None:
    assert "check --backend" in make("-n", "check", inside={"FOO": "1", "PROJECT": "x"})


@needs_make
def test_a_host_interpreter_replaces_the_environment() -> None:
    recipe = make("-n", "check", "MEGAMOE_PYTHON=/opt/python")
    assert "setup_env.sh --host '/opt/python'" in recipe
    assert ".venv" not in recipe


@needs_make
def test_in_a_nix_shell_its_python_is_used_and_its_packages_stay(tmp_path: Path) -> None:
    """`nix develop` exports MEGAMOE_PYTHON, and may keep packages on PYTHONPATH."""
    python = tmp_path / "python3"
    answers = "*%d*) echo 3.13.1 ;; tools/*) echo PYTHONPATH=$PYTHONPATH ;;"
    python.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    python.chmod(0o755)
    shell = {"MEGAMOE_PYTHON": str(python), "PYTHONPATH": "/nix/store/x"}
    assert make("versions", inside=shell) == "PYTHONPATH=.:/nix/store/x\n"
    assert ".venv" not in make("-n", "test", inside=shell)


# --- the set-up script ---------------------------------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
*'version_info[:3]'*) echo "$FAKE_VERSION" ;;
*'import venv, ensurepip'*) [ -z "$FAKE_NO_VENV" ] || exit 1 ;;
'-m venv '*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*torch-cpu.txt*) [ -z "$FAKE_PIP_ERROR" ] || { echo "$FAKE_PIP_ERROR" >&2; exit 1; } ;;
*find_spec*) echo "$FAKE_MISSING" ;;
esac
"""


@dataclass
class Copy:
    """A copy of what the set-up reads, and a PATH that holds nothing but the fakes put there."""

    root: Path
    bin: Path
    settings: dict[str, str] = field(default_factory=dict)

    def add_python(self, name: str) -> None:
        """Put a fake interpreter on the path."""
        (self.bin / name).write_text(FAKE_PYTHON)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run the set-up script; `settings` are environment variables."""
        fake = {"FAKE_VERSION": "3.12.9", "FAKE_NO_VENV": "", "FAKE_PIP_ERROR": ""}
        fake |= {"FAKE_MISSING": "", "CALLS": str(self.root / "calls"), "TORCH": "cpu"}
        (self.root / "calls").write_text("")
        return subprocess.run(
            ["sh", "tools/setup_env.sh", *arguments],
            cwd=self.root,
            env=fake | {"PATH": str(self.bin)} | settings,
            capture_output=True,
            text=True,
        )

    def calls(self, words: str) -> list[str]:
        """The interpreter calls of the last run that hold `words`."""
        return [call for call in (self.root / "calls").read_text().splitlines() if words in call]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """The set-up's files in a folder of their own, with no Python on the path yet."""
    project, tools = tmp_path / "project", tmp_path / "bin"
    shutil.copytree(ROOT / "requirements", project / "requirements")
    shutil.copytree(ROOT / "tools", project / "tools")
    shutil.copy(ROOT / "pyproject.toml", project)
    tools.mkdir()
    for tool in ("sh", "dirname", "cat", "cksum", "ls", "grep", "mkdir", "cp"):
        path = shutil.which(tool)
        assert path is not None
        (tools / tool).symlink_to(path)
    return Copy(project, tools)


def one_line(stream: str) -> str:
    """The only line of `stream`."""
    (line,) = stream.splitlines()
    return line


def test_without_any_python_one_line_says_what_to_install(copy: Copy) -> None:
    result = copy.run()
    assert result.returncode != 0
    assert "needs one of Python 3.11 3.12 3.13 3.14" in one_line(result.stderr)
    assert "no python3" in result.stderr


def test_an_old_python_is_named_with_its_version(copy: Copy) -> None:
    copy.add_python("python3")
    result = copy.run(FAKE_VERSION="3.9.18")
    assert result.returncode != 0
    assert "(python3 is 3.9.18)" in one_line(result.stderr)
    assert not (copy.root / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_taken(copy: Copy) -> None:
    copy.add_python("python3.13")
    (copy.bin / "python3").write_text("#!/bin/sh\necho 3.9.18\n")
    (copy.bin / "python3").chmod(0o755)
    result = copy.run(FAKE_VERSION="3.13.1")
    assert result.returncode == 0, result.stderr
    assert "using python3.13 (3.13.1): python3 is 3.9.18" in result.stdout


def test_a_missing_venv_module_names_the_package_to_install(copy: Copy) -> None:
    copy.add_python("python3")
    result = copy.run(FAKE_NO_VENV="1")
    assert result.returncode != 0
    assert "apt-get install python3.12-venv" in one_line(result.stderr)
    assert not (copy.root / ".venv").exists()


def test_torch_is_cpu_or_cuda(copy: Copy) -> None:
    copy.add_python("python3")
    result = copy.run(TORCH="rocm")
    assert result.returncode != 0
    assert "TORCH=rocm is neither cpu nor cuda" in one_line(result.stderr)


def test_a_first_run_installs_hashed_wheels_only_and_a_second_nothing(copy: Copy) -> None:
    copy.add_python("python3")
    assert copy.run().returncode == 0
    downloads = [call for call in copy.calls("pip install") if "--no-index" not in call]
    assert len(downloads) == 2
    assert all("--require-hashes --only-binary :all:" in call for call in downloads)
    assert "torch-cpu.txt" in downloads[0]
    assert "base.txt" in downloads[1] and "test.txt" in downloads[1]
    assert len(copy.calls("--no-index --no-build-isolation --editable .")) == 1

    second = copy.run()
    assert (second.returncode, second.stdout) == (0, "")
    assert copy.calls("pip") == copy.calls("-m venv") == []


@pytest.mark.parametrize("change", ["lock", "python", "torch"])
def test_another_lock_python_or_torch_makes_the_environment_afresh(copy: Copy, change: str) -> None:
    copy.add_python("python3")
    assert copy.run().returncode == 0
    if change == "lock":
        lock = copy.root / "requirements/base.txt"
        lock.write_text(lock.read_text() + "# changed\n")
    settings = {"python": {"FAKE_VERSION": "3.12.10"}, "torch": {"TORCH": "cuda"}}
    assert copy.run(**settings.get(change, {})).returncode == 0
    assert len(copy.calls("-m venv --clear .venv")) == 1
    assert len(copy.calls("torch-cuda.txt")) == (change == "torch")


def test_another_pyproject_only_renews_the_editable_install(copy: Copy) -> None:
    copy.add_python("python3")
    assert copy.run().returncode == 0
    project = copy.root / "pyproject.toml"
    project.write_text(project.read_text() + "# changed\n")
    assert copy.run().returncode == 0
    assert copy.calls("-m venv") == copy.calls("--require-hashes") == []
    assert len(copy.calls("--editable .")) == 1


def test_without_a_cpu_build_the_default_comes_and_a_line_says_why(copy: Copy) -> None:
    copy.add_python("python3")
    result = copy.run(FAKE_PIP_ERROR="ERROR: No matching distribution found for torch==2.13.0+cpu")
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if "no CPU build" in line)
    assert "the default build comes instead" in line and "extra-index-url" in line
    assert len(copy.calls("torch-cuda.txt")) == 1


def test_any_other_failure_of_pip_is_shown_and_ends_the_set_up(copy: Copy) -> None:
    copy.add_python("python3")
    result = copy.run(FAKE_PIP_ERROR="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES")
    assert result.returncode != 0
    assert "DO NOT MATCH THE HASHES" in result.stderr
    assert copy.calls("torch-cuda.txt") == []
    assert copy.run().returncode == 0, "an interrupted set-up must be taken up again"


def test_a_venv_that_something_else_made_is_never_cleared(copy: Copy) -> None:
    copy.add_python("python3")
    (copy.root / ".venv").mkdir()
    result = copy.run()
    assert result.returncode != 0
    assert "this set-up did not make it" in one_line(result.stderr)
    assert copy.calls("-m venv") == []


def test_a_host_interpreter_is_told_what_it_lacks(copy: Copy) -> None:
    copy.add_python("python3")
    result = copy.run("--host", "python3", FAKE_MISSING="torch rich")
    assert result.returncode != 0
    assert "MEGAMOE_PYTHON=python3 lacks: torch rich." in one_line(result.stderr)
    assert copy.run("--host", "python3").returncode == 0
    assert not (copy.root / ".venv").exists()


# --- continuous integration ----------------------------------------------------------------------

CLOSING = "====== 1 failed, 7 passed in 3.21s ======"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("output", "status", "last"),
    [
        (CLOSING, 2, CLOSING),
        (
            "====== 8 passed in 75.00s (0:01:15) ======",
            0,
            "====== 8 passed in 75.00s (0:01:15) ======",
        ),
        ("the tests never ran", 2, "ci: pytest did not come to an end (see above)"),
        ("nor did they here", 0, "ci: pytest did not come to an end (see above)"),
    ],
)
def test_ci_ends_with_the_closing_line_of_pytest(
    tmp_path: Path, output: str, status: int, last: str
) -> None:
    fakes = dict.fromkeys(("apt-get", "nix", "chromium"), "exit 0")
    fakes["make"] = f"echo '{output}'\necho 'make: *** Error' >&2\nexit {status}"
    for name, script in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [ROOT / ".ci/run"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == last
    assert (result.returncode == 0) == (status == 0 and "passed" in last)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("there", [True, False])
def test_ci_installs_what_no_test_may_be_skipped_for(tmp_path: Path, there: bool) -> None:
    fakes = {
        "make": "echo nix $MEGAMOE_REQUIRE_NIX chromium $MEGAMOE_REQUIRE_CHROMIUM",
        "apt-get": f'echo "$*" >>{tmp_path}/installed',
    }
    if there:
        fakes |= dict.fromkeys(("nix", "chromium"), "exit 0")
    for name, script in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for tool in ("bash", "sh", "dirname", "mktemp", "tee", "grep", "tail", "rm"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    result = subprocess.run(
        [str(tmp_path / "bash"), ROOT / ".ci/run"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "nix 1 chromium 1" in result.stdout.splitlines()
    log = tmp_path / "installed"
    assert log.exists() != there
    installs = [line.split()[-2:] for line in log.read_text().splitlines()] if not there else []
    assert there or ["nix-bin" in installs[1], "chromium-driver" in installs[2]] == [True, True]


# --- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel that is built from a copy, beside which a candidate lies about."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 builds the wheel")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in ("megamoe", "golden"):
        shutil.copytree(ROOT / name, source / name, ignore=no_caches)
    (source / "golden/candidates/entries").mkdir(parents=True, exist_ok=True)
    (source / "golden/candidates/entries/x.json").write_text("{}")
    build = "import setuptools.build_meta as b; print(b.build_wheel('out'))"
    result = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(source / "out" / result.stdout.splitlines()[-1]) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_its_data(wheel: list[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "megamoe").rglob("*.py")}
    assert modules | {"megamoe/py.typed", "megamoe/judge/statistic.json"} <= set(wheel)


@pytest.mark.slow
def test_a_wheel_holds_the_goldens_and_no_candidate(wheel: list[str]) -> None:
    """``megamoe.cases.load.golden_root`` looks there first."""
    names = ("cases", "tensors", "recorded", "manifest.json", "durations.json", "coverage.json",
             "holes.toml")  # fmt: skip
    golden = ROOT / "golden"
    files = {
        f"megamoe/golden_data/{path.relative_to(golden)}"
        for path in golden.rglob("*")
        if path.is_file() and path.relative_to(golden).parts[0] in names
    }
    assert "megamoe/golden_data/manifest.json" in files
    assert {name for name in wheel if name.startswith("megamoe/golden_data/")} == files
