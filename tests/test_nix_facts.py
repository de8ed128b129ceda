"""What the flake takes from nixpkgs stands in ci/nixpkgs-stub/facts.json.

Each defect that a real nixpkgs showed is red when it is put back: docs/toolchain.md lists them.
"""

import json
import re
import tomllib
from dataclasses import dataclass

import pytest

from tests.helpers.flake import NIXPKGS, ROOT, SYSTEM, Flake, flake, needs_nix, ok, store
from tests.test_nix_gpu import KEYS, MACHINE, NVSWITCH, RUNNER, X11

__all__ = ["flake", "store"]  # fixtures

FACTS = json.loads((ROOT / "ci/nixpkgs-stub/facts.json").read_text())
PACKAGE = f"packages.{SYSTEM}.megamoe"
SHARD = f"gpuChecks.{SYSTEM}.sm90-1-of-4"
FEATURES = ("--option", "system-features", "cuda cuda-sm90")


# --- the table ------------------------------------------------------------------------------------


def test_each_row_says_where_it_was_read() -> None:
    rows = [*FACTS["packages"].values(), *FACTS["options"].values(), *FACTS["arguments"].values()]
    rows += [*FACTS["versions"].values(), FACTS["stdenv"], FACTS["unfree-driver"]]
    evidence = [row["evidence"] for row in rows] + list(FACTS["attributes"].values())
    assert len(evidence) > 80 and all(evidence)
    assert set(FACTS["sources"]) >= {"S", "N", "L", "corepkgs"}


@needs_nix
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("nix/shell.nix", "    pkgs.uv # make lock", "    pkgs.uw", "uw"),
        ("nix/megamoe.nix", "  gnumake,", "  gnumake,\n  nosuch,", "nosuch"),
        ("nix/megamoe.nix", "checkPhase =", "chekPhase =", "no argument chekPhase"),
        ("nix/cuda-home.nix", "cudaPackages.cuda_cudart", "cudaPackages.cudart", "cudart"),
        ("nix/shell.nix", "pkgs.mkShell {", "pkgs.mkShell {\n  hook = 1;", "no argument hook"),
        ("nix/project.nix", "lib.findFirst", "lib.findFirts", "findFirts"),
        ("nix/mmasim.nix", 'dist = "py3";', 'dists = "py3";', "no argument dists"),
        ("nix/package-sets.nix", "allowUnfreeCudaPredicate", "allowCuda", "allowCuda"),
    ],
)
def test_a_name_without_a_row_does_not_evaluate(
    flake: Flake, file: str, old: str, new: str, message: str
) -> None:
    flake.edit(file, old, new)
    process = flake.nix("flake", "check", "--no-build", ".")
    assert process.returncode != 0 and message in process.stderr


@pytest.mark.parametrize("table", ["packages", "options", "arguments"])
def test_no_row_is_there_for_nothing(table: str) -> None:
    """Each name of the table is in the flake; a row that nothing uses would only look like care."""
    texts = [path.read_text() for path in [ROOT / "flake.nix", *(ROOT / "nix").glob("*.nix")]]
    texts += [(ROOT / name).read_text() for name in ("pyproject.toml", "docs/toolchain.md")]
    flat = "\n".join(texts).replace("_", "-")
    inferred = {"hardware.graphics.enable", "python3Packages.numpy", "runCommand"}
    unused = {
        name
        for name in FACTS[table]
        if not re.search(rf"\b{re.escape(name.split('.')[-1].replace('_', '-'))}\b", flat)
    }
    assert unused - inferred == set()


# --- defects --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Defect:
    """Edits of a copy of the flake, and what a build of ``attribute`` then says."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    attribute: str
    says: str


CHECK_PHASE = re.search(
    r"  # Not pytestCheckHook.*?'';\n", (ROOT / "nix/megamoe.nix").read_text(), re.S
)[0]
CC = re.compile(r"^.*\bCC\b.*cudaPackages\.backendStdenv\.cc.*\n", re.M)


def without_compiler(file: str) -> tuple[str, str, str]:
    return (file, CC.search((ROOT / file).read_text())[0], "")


DEFECTS = [
    Defect(
        "a flag with a space",
        (
            ("nix/megamoe.nix", CHECK_PHASE, '  pytestFlags = [ "-m" "not slow" ];\n'),
            ("nix/megamoe.nix", "    gnumake\n", "    gnumake\n    pytestCheckHook\n"),
            ("nix/megamoe.nix", "  gnumake,\n", "  gnumake,\n  pytestCheckHook,\n"),
        ),
        PACKAGE,
        "ERROR: file or directory not found: slow",
    ),
    Defect(
        "a check without git",
        (("nix/megamoe.nix", "    git\n", ""),),
        PACKAGE,
        "git, which is not on PATH",
    ),
    Defect(
        "a check without a home",
        (("nix/megamoe.nix", "    writableTmpDirAsHomeHook\n", ""),),
        PACKAGE,
        "tests write to HOME, which is /homeless-shelter",
    ),
    Defect(
        "a GPU check without a compiler",
        (without_compiler("nix/gpu-checks.nix"),),
        SHARD,
        "Failed to find C compiler",
    ),
]


@needs_nix
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_that_is_put_back_is_red(flake: Flake, defect: Defect) -> None:
    for edit in defect.edits:
        flake.edit(*edit)
    process = flake.nix("build", "--no-link", "-L", f".#{defect.attribute}", *FEATURES)
    assert process.returncode != 0 and defect.says in process.stderr


@needs_nix
def test_the_app_brings_its_compiler(flake: Flake) -> None:
    """On a host that has none on its path."""
    words = ("--device", "cuda", "--backend", "triton")

    def run() -> str:
        app = flake.value(f"apps.{SYSTEM}.check.program")
        flake.nix("run", ".#check", "--", "--help")  # so that it is built
        process = flake.run("/bin/bash", app, *words, PATH="/nowhere", HOME=str(flake.store))
        return process.stdout + process.stderr

    assert "Failed to find C compiler" not in run()
    flake.edit(*without_compiler("nix/check-app.nix"))
    assert "Failed to find C compiler" in run()


@needs_nix
def test_one_worker_a_core_on_one_gpu_is_seen(flake: Flake) -> None:
    flake.edit("nix/gpu-checks.nix", "JOBS=${toString workers}", "JOBS=$NIX_BUILD_CORES")
    report = flake.build(SHARD, *FEATURES, "--cores", "7")
    assert "workers=7" in (report / "result.json").read_text()


@needs_nix
def test_the_headers_of_cuda_13_are_there(flake: Flake) -> None:
    facts = flake.root / "ci/nixpkgs-stub/facts.json"
    table = json.loads(facts.read_text())
    table["versions"]["cuda"]["value"] = "13.0"
    facts.write_text(json.dumps(table))

    def home() -> bool:
        name = flake.value(f"packages.{SYSTEM}.deep-gemm.postPatch")
        path = re.search(r"/\S*-megamoe-cuda-home-13\.0", name)[0]
        flake.build(SHARD, *FEATURES)
        return (flake.store / "store" / path.split("/")[-1] / "include/crt/host_config.h").exists()

    assert home()
    flake.edit("nix/cuda-home.nix", 'cudaMajorMinorVersion "13"', 'cudaMajorMinorVersion "99"')
    assert not home()


@needs_nix
def test_a_lint_that_is_not_the_locked_one_warns_and_does_not_gate(flake: Flake) -> None:
    flake.edit("ci/nixpkgs-stub/python.sh", "lint=0", "lint=1")
    lint = ("build", "--no-link", "-L", f".#checks.{SYSTEM}.lint")
    log = ok(flake.nix(*lint)).stderr
    assert "warning: ruff check . ended with 1, but ruff 0.15.20 is not the locked" in log
    locked = re.search(r"^ruff==(\S+)", (ROOT / "requirements/test.txt").read_text(), re.M)[1]
    flake.edit("ci/nixpkgs-stub/python.sh", "ruff 0.15.20", f"ruff {locked}")
    assert flake.nix(*lint).returncode != 0, "the locked one decides"


RUNNER_DEFECTS = {
    "videoDrivers, which machines with NVSwitch exclude": (
        ("config.hardware.nvidia.enabled",
         'builtins.elem "nvidia" config.services.xserver.videoDrivers'),
        [NVSWITCH],
        "failed",
        lambda failures: failures != [],
    ),
    "system-features twice": (
        ('[ "cuda-${cfg.architecture}" ]', '[ "kvm" "cuda" "cuda-${cfg.architecture}" ]'),
        [X11, KEYS],
        "config.nix.settings.system-features",
        lambda features: len(set(features)) < len(features),
    ),
    "work in memory": (
        ('workDir = "/var/cache/${work}";', ""),
        [X11, RUNNER],
        "config.services.github-runners.megamoe.workDir",
        lambda folder: folder is None,
    ),
}  # fmt: skip


@needs_nix
@pytest.mark.parametrize("name", RUNNER_DEFECTS)
def test_a_defect_of_the_machine_that_is_put_back_is_seen(flake: Flake, name: str) -> None:
    """By what test_nix_gpu.py asserts of the module as it is."""
    edit, texts, what, wrong = RUNNER_DEFECTS[name]
    value = json.loads(ok(flake.machine(what, MACHINE, *texts)).stdout)
    assert not wrong(value)
    flake.edit("nix/gpu-runner.nix", *edit)
    assert wrong(json.loads(ok(flake.machine(what, MACHINE, *texts)).stdout))


# --- caches and features --------------------------------------------------------------------------


@needs_nix
def test_the_caches_are_the_same_everywhere(flake: Flake) -> None:
    caches = flake.expression(f"import {flake.root}/nix/caches.nix")
    config = flake.expression(f"(import {flake.root}/flake.nix).nixConfig")
    assert dict(zip(*config.values(), strict=True)) == caches
    document = (ROOT / "docs/toolchain.md").read_text()
    assert all(url in document and key in document for url, key in caches.items())
    settings = json.loads(ok(flake.machine("config.nix.settings", MACHINE, X11)).stdout)
    assert set(settings["substituters"]) == set(caches)
    assert set(settings["trusted-public-keys"]) == set(caches.values())


def test_a_documented_builder_can_build_torch_too() -> None:
    """nixpkgs' torch demands big-parallel; a line of the machines file lists all features."""
    for name in ("docs/toolchain.md", "nix/doctor.sh"):
        lines = re.findall(r"ssh-ng://\S+ .* 1 1 (\S*cuda-\S+)", (ROOT / name).read_text())
        assert lines and all("big-parallel" in line.split(",") for line in lines), name


def test_the_document_lists_every_defect() -> None:
    """With the test that is red, which is there."""
    text = (ROOT / "docs/toolchain.md").read_text()
    names = re.findall(r"^\| .* \| `(test_\w+)`", text, re.M)
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_nix*.py"))
    assert len(names) >= 12 and all(f"def {name}(" in tests for name in names)


@pytest.mark.skipif(not NIXPKGS, reason="MEGAMOE_NIXPKGS names no real lib")
@needs_nix
def test_the_real_lib_is_what_evaluates(flake: Flake) -> None:
    assert flake.expression("stub.lib.version").startswith("26.")
    assert tomllib.loads((ROOT / "toolchain.toml").read_text())["inputs"]["nixpkgs"]["branch"]
