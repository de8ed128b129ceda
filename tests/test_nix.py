"""The flake, evaluated and built, with ci/nixpkgs-stub for nixpkgs: no network, no GPU.

What a stand-in cannot show is said in docs/toolchain.md. Skipped where Nix is not installed;
MEGAMOE_REQUIRE_NIX=1 (`.ci/run`) makes that a failure.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.helpers.flake import ROOT, SYSTEM, Flake, flake, needs_nix, ok, store

__all__ = ["flake", "store"]  # fixtures

TABLE = tomllib.loads((ROOT / "toolchain.toml").read_text())
LOCK = json.loads((ROOT / "flake.lock").read_text())["nodes"]


# --- the lock ------------------------------------------------------------------------------------


@needs_nix
def test_every_nix_file_parses(flake: Flake) -> None:
    files = [str(path) for path in sorted(flake.root.rglob("*.nix"))]
    assert len(files) > 12
    ok(flake.run("nix-instantiate", "--parse", *files))


def test_the_lock_is_the_table() -> None:
    """toolchain.toml repeats the confirmed hashes; neither can change alone."""
    rows = {
        name: {
            "source": f"{node['locked']['owner']}/{node['locked']['repo']}",
            **{key: node["locked"][key] for key in ("rev", "lastModified", "narHash")},
        }
        for name, node in LOCK.items()
        if name != "root"
    }
    assert rows == {
        name: {key: row[key] for key in row if key != "branch"}
        for name, row in TABLE["inputs"].items()
    }
    assert all(LOCK[name]["flake"] is False for name in rows if name != "nixpkgs")
    assert LOCK["root"]["inputs"] == {name: name for name in rows}


def in_step(flake: Flake) -> bool:
    """Whether Nix, not allowed to change the lock, finds nothing to change."""
    settings = ("--extra-experimental-features", "nix-command flakes",
                "--option", "download-attempts", "1")  # fmt: skip
    where = ("--no-update-lock-file", f"path:{flake.root}")
    return flake.run("nix", *settings, "flake", "lock", *where).returncode == 0


@needs_nix
def test_the_lock_is_in_step_with_the_flake(flake: Flake) -> None:
    assert in_step(flake)


@needs_nix
@pytest.mark.parametrize("name", sorted(TABLE["inputs"]))
def test_another_revision_in_the_flake_alone_is_out_of_step(flake: Flake, name: str) -> None:
    old = {"nixpkgs": "nixos-26.05"}.get(name, TABLE["inputs"][name]["rev"])
    flake.edit("flake.nix", old, {"nixpkgs": "nixos-25.11"}.get(name, "0" * 40))
    assert not in_step(flake)


def test_the_document_lists_every_pin() -> None:
    """docs/toolchain.md has the rows of toolchain.toml, revisions for bisecting included."""
    text = (ROOT / "docs/toolchain.md").read_text()
    rows = re.findall(
        r"^\| `?([\w./-]+)`? .*\| `([0-9a-f]{8,40})` \| `(sha256-\S+)` \|$", text, re.M
    )
    inputs = {(row["source"], row["rev"], row["narHash"]) for row in TABLE["inputs"].values()}
    others = {("deepseek-ai/DeepGEMM", rev, digest) for rev, digest in TABLE["deepgemm"].items()}
    assert set(rows) == inputs | others and len(rows) == len(inputs) + len(others)


def test_mmasim_is_the_locked_wheel() -> None:
    text = (ROOT / "nix/mmasim.nix").read_text()
    version, digest = (re.search(rf'{key} = "(.*)";', text)[1] for key in ("version", "sha256"))
    (block,) = re.findall(
        rf"^mmasim=={re.escape(version)} .*\n(?: .*\n)+",
        (ROOT / "requirements/test.txt").read_text(),
        re.M,
    )
    assert f"--hash=sha256:{digest}" in block


def test_no_committed_file_names_a_registry() -> None:
    hosts = ("pypi", "org"), ("pythonhosted", "org"), ("download.pytorch", "org"), \
        ("cache.nixos", "org"), ("npmjs", "org"), ("crates", "io"), ("docker", "io")  # fmt: skip
    pattern = re.compile("|".join(re.escape(".".join(host)) for host in hosts))
    folders = ("nix", "ci", "docs", "tools", "tests", "requirements", "megamoe", ".ci", ".github")
    files = [path for name in folders for path in (ROOT / name).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    plain = [path for path in files if path.suffix not in (".pyc", ".svg", ".safetensors")]
    matches = {path for path in plain if pattern.search(path.read_text(errors="replace"))}
    assert len(plain) > 100 and matches == set()


# --- outputs -------------------------------------------------------------------------------------


@needs_nix
def test_show_lists_the_outputs(flake: Flake) -> None:
    outputs = json.loads(ok(flake.nix("flake", "show", "--json", ".")).stdout)
    outputs = outputs.get("inventory", outputs)
    for system in ("x86_64-linux", "aarch64-linux"):
        assert set(outputs["packages"][system]) == {"default", "megamoe", "deep-gemm"}
        assert set(outputs["devShells"][system]) == {"default", "cpu"}
        assert set(outputs["checks"][system]) == {"megamoe", "lint", "quick"}
        assert "check" in outputs["apps"][system] and system in outputs["formatter"]
    assert {"overlays", "nixosModules", "gpuChecks"} <= set(outputs)
    assert set(outputs["nixosModules"]) == {"gpu-runner"}


@needs_nix
def test_flake_check_needs_no_gpu(flake: Flake) -> None:
    ok(flake.nix("flake", "check", "--no-build", "."))
    log = ok(flake.nix("flake", "check", "-L", ".")).stderr
    assert "-m megamoe check --backend eager --tier quick" in log
    assert re.search(r"building '\S*-megamoe-0", log), "the package with its tests is a check"
    assert "ruff check" in log and "-m mypy" in log


@needs_nix
def test_fmt_runs_the_formatter(flake: Flake) -> None:
    assert "treefmt" in ok(flake.nix("fmt", ".")).stdout


@needs_nix
def test_the_app_is_megamoe_check(flake: Flake) -> None:
    process = ok(flake.nix("run", ".#check", "--", "--backend", "mine.py:Kernel"))
    assert "-m megamoe check --backend mine.py:Kernel" in process.stdout


# --- DeepGEMM ------------------------------------------------------------------------------------


@needs_nix
def test_deep_gemm_is_built_from_the_pinned_source_without_a_network(flake: Flake) -> None:
    what = '{ DG_FORCE_BUILD, DG_USE_LOCAL_VERSION, CUDA_HOME, version, ... }@all: {'\
           ' inherit DG_FORCE_BUILD DG_USE_LOCAL_VERSION CUDA_HOME version; }'  # fmt: skip
    environment = flake.value(f"packages.{SYSTEM}.deep-gemm", "--apply", what)
    home = environment.pop("CUDA_HOME")
    assert environment == {"DG_FORCE_BUILD": "1", "DG_USE_LOCAL_VERSION": "0", "version": "2.6.1"}
    assert home.endswith(f"megamoe-cuda-home-{TABLE['least']['cuda']}")

    source = flake.build(f"packages.{SYSTEM}.deep-gemm.src")
    for name in ("cutlass", "fmt"):
        assert (source / f"third-party/{name}/README").is_file(), "submodules are put in place"


@needs_nix
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_deep_gemm_with_a_libstdcxx_of_its_own_is_no_package(flake: Flake, tmp_path: Path):
    script = flake.value(f"packages.{SYSTEM}.deep-gemm.postInstall")
    (tmp_path / "deep_gemm").mkdir()
    source = tmp_path / "a.cpp"
    source.write_text("#include <locale>\nstd::locale made() { return std::locale(); }\n")
    build = ["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "deep_gemm/_C.abi3.so")]
    run = ["bash", "-euc", script]
    for linked, status in (([], 0), (["-static-libstdc++"], 1)):
        subprocess.run([*build, *linked], check=True)
        process = subprocess.run(run, env={**os.environ, "out": str(tmp_path)}, capture_output=True)
        assert process.returncode == status, process.stderr


@needs_nix
def test_the_compiler_of_its_kernels_comes_with_its_headers(flake: Flake) -> None:
    name = flake.value(f"packages.{SYSTEM}.deep-gemm.postPatch")
    home = Path(re.search(r"\S*-megamoe-cuda-home-[\d.]+", name)[0].strip("'\""))
    flake.build(f"gpuChecks.{SYSTEM}.sm90-1-of-4", "--option", "system-features", "cuda cuda-sm90")
    script = (home / "bin/nvcc").read_text()
    assert re.search(rf"exec \S+-cuda_nvcc-\S+/bin/nvcc -I{home}/include", script)
    for name in ("bin/cuobjdump", "bin/ptxas", "include/cuda/std/version", "include/nvrtc.h",
                 "include/cuda_runtime.h", "include/crt/host_config.h"):  # fmt: skip
        assert (home / name).exists(), name


@needs_nix
def test_bisecting_by_input_needs_no_other_edit(flake: Flake, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(flake.root / "ci/nixpkgs-stub/sources/deepgemm", other)
    (other / "deep_gemm/__init__.py").write_text("import os\n__version__ = '2.4.2'\n")
    attribute = f"packages.{SYSTEM}.deep-gemm"
    override = ("--override-input", "deepgemm-src", f"path:{other}")
    assert flake.value(f"{attribute}.version") == "2.6.1"
    assert flake.value(f"{attribute}.version", *override) == "2.4.2"
    assert flake.value(f"{attribute}.drvPath") != flake.value(f"{attribute}.drvPath", *override)
    source = flake.build(f"{attribute}.src", *override)
    assert "2.4.2" in (source / "deep_gemm/__init__.py").read_text()


@needs_nix
def test_a_source_that_is_not_deep_gemm_is_named(flake: Flake) -> None:
    (flake.root / "ci/nixpkgs-stub/sources/deepgemm/deep_gemm/__init__.py").write_text("")
    process = flake.nix("eval", f".#packages.{SYSTEM}.deep-gemm.version")
    assert process.returncode != 0 and "names no __version__" in process.stderr


# --- least versions, licences --------------------------------------------------------------------


@needs_nix
@pytest.mark.parametrize(
    ("what", "old", "message"),
    [
        ("cuda", "12.8", "CUDA 12.8 is too old, 12.9 or newer is needed"),
        ("torch", "2.8.0", "torch 2.8.0 is too old, "),
        ("torch", "2.10.0", "torch 2.10.0 is too old, 2.11 or newer is needed"),
        ("python", "3.10", "Python 3.10 is too old, 3.11 or newer is needed"),
        ("nix", "99", "is too old, 99 or newer is needed: nix upgrade-nix"),
    ],
)
def test_what_is_too_old_is_named_with_its_version(
    flake: Flake, what: str, old: str, message: str
) -> None:
    if what == "nix":
        flake.edit("ci/nixpkgs-stub/flake.nix", 'minimumNix = "2.8"', f'minimumNix = "{old}"')
    else:
        facts = flake.root / "ci/nixpkgs-stub/facts.json"
        table = json.loads(facts.read_text())
        table["versions"][what]["value"] = old
        facts.write_text(json.dumps(table))
    process = flake.nix("develop", ".", "-c", "true")
    (line,) = (line for line in process.stderr.splitlines() if "error: megamoe: " in line)
    assert process.returncode != 0 and message in line
    cpu = flake.nix("develop", ".#cpu", "-c", "true")
    assert (cpu.returncode == 0) == (what == "cuda"), "the CPU shell needs no CUDA"


@needs_nix
def test_nothing_unfree_but_cuda(flake: Flake) -> None:
    sets = f"""import {flake.root}/nix/package-sets.nix {{
      nixpkgs = stub; system = "{SYSTEM}"; overlay = _: _: {{ }};
      minimum = {{ cpu = x: x; cuda = x: x; }};
    }}"""
    allowed = flake.expression(f"""with {sets};
      let may = package: (builtins.tryEval package.drvPath).success; in {{
        cuda = [ (may cuda.cudaPackages.cuda_nvcc) (may cuda.unfreeAndNotCuda) ];
        cpu = [ (may cpu.cudaPackages.cuda_nvcc) (may cpu.unfreeAndNotCuda) ];
      }}""")
    assert allowed == {"cuda": [True, False], "cpu": [False, False]}


# --- shells --------------------------------------------------------------------------------------


@needs_nix
@pytest.mark.parametrize("shell", ["default", "cpu"])
def test_a_shell_brings_its_python(flake: Flake, shell: str) -> None:
    script = "echo $MEGAMOE_PYTHON; command -v uv; echo ${CUDA_HOME:-none}"
    lines = ok(flake.nix("develop", f".#{shell}", "-c", "bash", "-c", script)).stdout.splitlines()
    assert lines[0].startswith(str(flake.store)) and lines[0].endswith("-python3-env/bin/python3")
    assert lines[1].startswith(str(flake.store))
    assert ("cuda-home" in lines[2]) == (shell == "default")


@needs_nix
def test_the_cpu_shell_has_nothing_of_cuda(flake: Flake) -> None:
    inputs = flake.value(f"devShells.{SYSTEM}.cpu.nativeBuildInputs")
    assert len(inputs) == 4 and not any("cuda" in path for path in inputs)


@needs_nix
def test_a_shells_python_has_all_that_pyproject_names(flake: Flake) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + project["optional-dependencies"]["test"]
    names = {re.match(r"[\w.-]+", need)[0].replace("_", "-") for need in needs}
    packages = "drv: map (package: package.pname) "\
               "(builtins.head drv.arguments.nativeBuildInputs).packages"  # fmt: skip
    assert set(flake.value(f"devShells.{SYSTEM}.cpu", "--apply", packages)) == names
    assert set(flake.value(f"devShells.{SYSTEM}.default", "--apply", packages)) == {
        *names,
        "deep-gemm",
    }


@needs_nix
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_runs_tests_in_the_shell(flake: Flake) -> None:
    tests = "ARGS=tests/test_layout.py tests/test_formats.py"
    verb = ("make", "--no-print-directory", "-C", str(ROOT), "test-fast", "JOBS=1", tests)
    process = flake.nix("develop", ".", "-c", *verb, MEGAMOE_STUB_PYTHON=sys.executable)
    assert re.search(r"\b\d+ passed", ok(process).stdout) and "setup:" not in process.stdout


@needs_nix
def test_a_shell_opens_at_once_and_fetches_no_source(flake: Flake) -> None:
    """With nixpkgs alone replaced: whoever wants a shell with the stub types no more than this."""
    features = ("--extra-experimental-features", "nix-command flakes")
    stub = ("--override-input", "nixpkgs", f"path:{flake.root}/ci/nixpkgs-stub")
    offline = "substituters =\nsandbox = false\nbuild-users-group =\nflake-registry ="
    command = ("nix", *features, "develop", f"path:{flake.root}", "--no-write-lock-file", *stub)
    ok(flake.run(*command, "-c", "true", NIX_CONFIG=offline))
    start = time.monotonic()
    ok(flake.run(*command, "-c", "true", NIX_CONFIG=offline))
    print(f"nix develop -c true: {time.monotonic() - start:.2f} s")
