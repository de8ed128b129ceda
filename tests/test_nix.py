"""The flake, evaluated and built for real, but with ci/nixpkgs-stub in place of nixpkgs: no network,
no GPU, a Nix store of its own. What a stand-in cannot show is said in docs/toolchain.md.

Skipped where Nix is not installed; MEGAMOE_REQUIRE_NIX=1 (`.ci/run`) makes that a failure.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = tomllib.loads((ROOT / "toolchain.toml").read_text())
LOCK = json.loads((ROOT / "flake.lock").read_text())["nodes"]
SYSTEM = f"{os.uname().machine}-linux"
FEATURES = {"sm90": ["cuda", "cuda-sm90"], "sm100": ["cuda", "cuda-sm100"]}
BACKENDS = {"sm90": "triton", "sm100": "deep_gemm"}
SHARDS = 4

REQUIRED = os.environ.get("MEGAMOE_REQUIRE_NIX", "") not in ("", "0")
MISSING = next((tool for tool in ("nix", "bash") if shutil.which(tool) is None), None)
needs_nix = pytest.mark.skipif(
    MISSING is not None and not REQUIRED, reason=f"{MISSING} is not installed"
)


@dataclass
class Flake:
    """A copy of what the flake reads, and a Nix whose store and settings are its own."""

    root: Path
    store: Path
    settings: dict[str, str] = field(default_factory=dict)

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace ``old``, which must be there, in a file of the copy."""
        text = (self.root / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (self.root / name).write_text(text.replace(old, new))

    def run(
        self, *command: str, cwd: Path | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with that Nix; ``more`` are environment variables."""
        for name in ("store", "state", "home"):
            (self.store / name).mkdir(parents=True, exist_ok=True)
        clean = {k: v for k, v in os.environ.items() if not re.match(r"NIX|PYTEST|MAKE|MEGAMOE", k)}
        own = {
            "NIX_STORE_DIR": str(self.store / "store"),
            "NIX_STATE_DIR": str(self.store / "state"),
            "NIX_LOG_DIR": str(self.store / "log"),
            "NIX_CONF_DIR": str(self.store / "none"),
            "NIX_USER_CONF_FILES": "",
            "HOME": str(self.store / "home"),
            "XDG_CACHE_HOME": str(self.store / "cache"),
        }
        return subprocess.run(
            command, cwd=cwd or self.root, env=clean | own | more, capture_output=True, text=True
        )

    def nix(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`nix` with the stub in place of every input; `.` is the copy."""
        fixed = [re.sub(r"^\.(?=#|$)", f"path:{self.root}", argument) for argument in arguments]
        return self.run("sh", "ci/nixpkgs-stub/nix.sh", *fixed, **more)

    def value(self, attribute: str, *arguments: str):
        """An attribute of the flake's outputs."""
        return json.loads(ok(self.nix("eval", "--json", f".#{attribute}", *arguments)).stdout)

    def build(self, attribute: str, *arguments: str, **more: str) -> Path:
        """Build it; the path in the store."""
        done = ok(self.nix("build", "--no-link", "--json", f".#{attribute}", *arguments, **more))
        return Path(json.loads(done.stdout)[0]["outputs"]["out"])

    def expression(self, text: str):
        """The value of a Nix expression, in which `stub` is the stub."""
        stub = self.root / "ci/nixpkgs-stub"
        text = f'let stub = {{ outPath = "{stub}"; lib = import {stub}/lib.nix; }}; in {text}'
        command = ["nix-instantiate", "--eval", "--strict", "--json", "--expr", text]
        return json.loads(ok(self.run(*command)).stdout)


def ok(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nix").resolve()


@pytest.fixture
def flake(tmp_path: Path, store: Path) -> Flake:
    """The flake and what its evaluation reads, but not the goldens: they only cost time here."""
    copy = tmp_path.resolve() / "flake"
    for name in ("nix", "ci", "requirements"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tools").mkdir()
    for name in ("flake.nix", "flake.lock", "pyproject.toml", "toolchain.toml"):
        shutil.copy(ROOT / name, copy)
    shutil.copy(ROOT / "tools/setup_env.sh", copy / "tools")
    return Flake(copy, store)


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
    assert rows == TABLE["inputs"]
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
    named = {path for path in plain if pattern.search(path.read_text(errors="replace"))}
    assert len(plain) > 100 and named == set()


# --- outputs -------------------------------------------------------------------------------------


@needs_nix
def test_show_lists_the_outputs(flake: Flake) -> None:
    shown = json.loads(ok(flake.nix("flake", "show", "--json", ".")).stdout)
    shown = shown.get("inventory", shown)
    for system in ("x86_64-linux", "aarch64-linux"):
        assert set(shown["packages"][system]) == {"default", "megamoe", "deep-gemm"}
        assert set(shown["devShells"][system]) == {"default", "cpu"}
        assert set(shown["checks"][system]) == {"megamoe", "lint", "quick"}
        assert "check" in shown["apps"][system] and system in shown["formatter"]
    assert {"overlays", "nixosModules", "gpuChecks"} <= set(shown)
    assert set(shown["nixosModules"]) == {"gpu-runner"}


@needs_nix
def test_flake_check_needs_no_gpu(flake: Flake) -> None:
    ok(flake.nix("flake", "check", "--no-build", "."))
    log = ok(flake.nix("flake", "check", "-L", ".")).stderr
    assert "-m megamoe check --backend eager --tier quick" in log
    assert re.search(r"building '\S*-megamoe-0", log), "the package with its tests is a check"
    assert "ruff check" in log and "-m mypy" in log


@needs_nix
def test_fmt_runs_the_formatter(flake: Flake) -> None:
    assert "nixfmt" in ok(flake.nix("fmt", ".")).stdout


@needs_nix
def test_the_app_is_megamoe_check(flake: Flake) -> None:
    done = ok(flake.nix("run", ".#check", "--", "--backend", "mine.py:Kernel"))
    assert "-m megamoe check --backend mine.py:Kernel" in done.stdout


# --- DeepGEMM ------------------------------------------------------------------------------------


@needs_nix
def test_deep_gemm_is_built_from_the_pinned_source_without_a_network(flake: Flake) -> None:
    what = '{ DG_FORCE_BUILD, DG_USE_LOCAL_VERSION, CUDA_HOME, version, ... }@all: {'\
           ' inherit DG_FORCE_BUILD DG_USE_LOCAL_VERSION CUDA_HOME version; }'  # fmt: skip
    made = flake.value(f"packages.{SYSTEM}.deep-gemm", "--apply", what)
    home = made.pop("CUDA_HOME")
    assert made == {"DG_FORCE_BUILD": "1", "DG_USE_LOCAL_VERSION": "0", "version": "2.6.1"}
    assert home.endswith(f"megamoe-cuda-home-{TABLE['least']['cuda']}")

    source = flake.build(f"packages.{SYSTEM}.deep-gemm.src")
    for name in ("cutlass", "fmt"):
        assert (source / f"third-party/{name}/README").is_file(), "submodules are put in place"


@needs_nix
def test_the_compiler_of_its_kernels_comes_with_its_headers(flake: Flake) -> None:
    name = flake.value(f"packages.{SYSTEM}.deep-gemm.postPatch")
    home = Path(re.search(r"\S*-megamoe-cuda-home-[\d.]+", name)[0].strip("'\""))
    flake.build(f"gpuChecks.{SYSTEM}.sm90-1-of-4", "--option", "system-features", "cuda cuda-sm90")
    script = (home / "bin/nvcc").read_text()
    assert re.search(rf"exec \S+-cuda_nvcc-\S+/bin/nvcc -I{home}/include", script)
    assert (home / "bin/cuda_cuobjdump").exists() and (home / "bin/cccl").exists()


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
    done = flake.nix("eval", f".#packages.{SYSTEM}.deep-gemm.version")
    assert done.returncode != 0 and "names no __version__" in done.stderr


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
        versions = flake.root / "ci/nixpkgs-stub/versions.json"
        versions.write_text(json.dumps(json.loads(versions.read_text()) | {what: old}))
    done = flake.nix("develop", ".", "-c", "true")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert done.returncode != 0 and "megamoe: " in line and message in line
    cpu = flake.nix("develop", ".#cpu", "-c", "true")
    assert (cpu.returncode == 0) == (what == "cuda"), "the CPU shell needs no CUDA"


@needs_nix
def test_the_least_versions_are_the_tables(flake: Flake) -> None:
    flake.edit("toolchain.toml", 'cuda = "12.9" #', 'cuda = "13.1" #')
    done = flake.nix("develop", ".", "-c", "true")
    assert "CUDA 12.9 is too old, 13.1 or newer is needed" in done.stderr


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
    said = "echo $MEGAMOE_PYTHON; command -v uv; echo ${CUDA_HOME:-none}"
    done = ok(flake.nix("develop", f".#{shell}", "-c", "bash", "-c", said)).stdout.splitlines()
    assert done[0].startswith(str(flake.store)) and done[0].endswith("-python3-env/bin/python3")
    assert done[1].startswith(str(flake.store))
    assert ("cuda-home" in done[2]) == (shell == "default")


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
    done = flake.nix("develop", ".", "-c", *verb, MEGAMOE_STUB_PYTHON=sys.executable)
    assert re.search(r"\b\d+ passed", ok(done).stdout) and "setup:" not in done.stdout


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


# --- GPU checks ----------------------------------------------------------------------------------


@needs_nix
def test_gpu_checks_cover_each_shard_of_each_architecture(flake: Flake) -> None:
    what = "builtins.mapAttrs (_: check: { features = check.requiredSystemFeatures;"\
           " settings = [ (check.BACKEND or null) (check.ARCH or null) (check.DEVICE or null) ]; })"  # fmt: skip
    for system in ("x86_64-linux", "aarch64-linux"):
        found = flake.value(f"gpuChecks.{system}", "--apply", what)
        wanted = {}
        for arch, features in FEATURES.items():
            shard = {"features": features, "settings": [BACKENDS[arch], arch, "cuda"]}
            names = [f"{arch}-{index}-of-{SHARDS}" for index in range(1, SHARDS + 1)]
            wanted |= dict.fromkeys(names, shard)
            wanted[f"{arch}-import"] = {"features": features, "settings": [None] * 3}
        assert found == wanted


@needs_nix
@pytest.mark.parametrize(("arch", "other"), [("sm90", "sm100"), ("sm100", "sm90")])
def test_a_gpu_check_is_refused_without_the_feature_and_built_with_it(
    flake: Flake, arch: str, other: str
) -> None:
    name = f"gpuChecks.{SYSTEM}.{arch}-2-of-{SHARDS}"
    for offered in ("kvm", "cuda", f"cuda cuda-{other}"):
        done = flake.nix("build", "--no-link", f".#{name}", "--option", "system-features", offered)
        assert done.returncode != 0 and f"features {{cuda, cuda-{arch}}}" in done.stderr
    offered = ("--option", "system-features", f"cuda cuda-{arch}")
    made = flake.build(name, *offered)
    assert {path.name for path in made.iterdir()} == {"result.json", "junit.xml", "provenance.json"}
    assert f"BACKEND={BACKENDS[arch]} DEVICE=cuda" in (made / "result.json").read_text()


@needs_nix
def test_a_red_shard_is_red_and_its_report_can_still_be_had(flake: Flake) -> None:
    flake.edit("ci/nixpkgs-stub/python.sh", "verdict=0", "verdict=1")
    offered = ("--option", "system-features", "cuda cuda-sm90")
    name = f"gpuChecks.{SYSTEM}.sm90-1-of-{SHARDS}"
    assert flake.nix("build", "--no-link", f".#{name}", *offered).returncode != 0
    assert (flake.build(f"{name}.report", *offered) / "junit.xml").is_file()


@needs_nix
def test_a_shard_that_judged_nothing_is_no_report(flake: Flake) -> None:
    flake.edit("ci/nixpkgs-stub/python.sh", '>"$2"', "")
    offered = ("--option", "system-features", "cuda cuda-sm90")
    name = f"gpuChecks.{SYSTEM}.sm90-1-of-{SHARDS}.report"
    done = flake.nix("build", "--no-link", "-L", f".#{name}", *offered)
    assert done.returncode != 0 and "left no result.json" in done.stderr


@needs_nix
def test_an_edit_of_a_document_repeats_no_gpu_check(flake: Flake) -> None:
    name = f"gpuChecks.{SYSTEM}.sm90-1-of-{SHARDS}.drvPath"
    before = flake.value(name)
    (flake.root / "docs").mkdir()
    (flake.root / "docs/new.md").write_text("new")
    assert flake.value(name) == before
    (flake.root / "megamoe").mkdir()
    (flake.root / "megamoe/new.py").write_text("new")
    assert flake.value(name) != before


# --- the runner ----------------------------------------------------------------------------------

RUNNER = """
let
  pkgs = import stub {{ system = "x86_64-linux"; }};
  module = import {root}/nix/gpu-runner.nix {{
    inherit pkgs;
    inherit (stub) lib;
    config = {{
      hardware.graphics.enable = true;
      services.xserver.videoDrivers = [ {driver} ];
      services.megamoe-gpu = {{
        enable = true;
        architecture = "sm100";
        builder.keys = [ {keys} ];
        runner = {{ enable = {runner}; url = "u"; tokenFile = "/run/token"; }};
      }};
    }};
  }};
in
module.config
"""


def runner(flake: Flake, driver: str = '"nvidia"', keys: str = '"key"', enable: str = "true"):
    words = {"driver": driver, "keys": keys, "runner": enable}
    return flake.expression(RUNNER.format(root=flake.root, **words))


@needs_nix
def test_a_builder_offers_its_features_and_gives_the_sandbox_the_driver(flake: Flake) -> None:
    made = runner(flake, enable="false")
    assert {"cuda", "cuda-sm100", "big-parallel"} <= set(made["nix"]["settings"]["system-features"])
    assert "cuda-sm90" not in made["nix"]["settings"]["system-features"]
    mounts = made["programs"]["nix-required-mounts"]
    assert mounts == {"enable": True, "presets": {"nvidia-gpu": {"enable": True}}}
    assert made["nix"]["sshServe"]["keys"] == ["key"] and made["nix"]["sshServe"]["write"]
    assert made["nix"]["settings"]["trusted-users"] == ["nix-ssh"]
    assert "services" not in made, "a builder alone is no runner"
    assert "sshServe" not in runner(flake, keys="")["nix"]


@needs_nix
def test_a_runner_is_fresh_for_each_job_and_refuses_forks(flake: Flake) -> None:
    made = runner(flake)["services"]["github-runners"]["megamoe"]
    assert made["ephemeral"] is True and made["extraLabels"] == ["gpu", "sm100"]
    hook = made["extraEnvironment"]["ACTIONS_RUNNER_HOOK_JOB_STARTED"]
    assert hook.endswith("-refuse_forks.sh")
    assert made["serviceOverrides"]["PrivateDevices"] is False


@needs_nix
def test_a_builder_without_a_driver_says_so(flake: Flake) -> None:
    (assertion,) = runner(flake, driver="")["assertions"]
    assert not assertion["assertion"] and "no NVIDIA driver: set" in assertion["message"]
    assert runner(flake)["assertions"][0]["assertion"]


# --- the doctor ----------------------------------------------------------------------------------

FAKE_NIX = """#!/bin/sh
case "$*" in
--version) echo "nix (Nix) $FAKE_VERSION" ;;
*'config show') [ -z "$FAKE_OLD_WORDS" ] || exit 1; printf '%b' "$FAKE_CONFIG" ;;
*show-config) printf '%b' "$FAKE_CONFIG" ;;
*'flake lock'*) exit "${FAKE_LOCK:-0}" ;;
esac
"""


@dataclass
class Host:
    """A host as the doctor sees it: a fake Nix and a folder for its root."""

    root: Path
    features: str = "flakes nix-command"
    system: str = "benchmark kvm"
    builders: str = "@/etc/nix/machines"
    settings: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, text: str = "") -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def doctor(self, *arguments: str) -> str:
        """What it says, one line."""
        config = f"builders = {self.builders}\\nexperimental-features = {self.features}\\n"
        config += f"system-features = {self.system}\\n"
        fake = {"FAKE_VERSION": "2.18.1", "FAKE_CONFIG": config, "FAKE_OLD_WORDS": ""}
        path = {"PATH": f"{self.root}/bin:/usr/bin:/bin", "HOST_ROOT": str(self.root)}
        done = subprocess.run(
            ["sh", str(ROOT / "nix/doctor.sh"), *arguments],
            env=fake | path | self.settings,
            capture_output=True,
            text=True,
        )
        (line,) = (done.stdout + done.stderr).splitlines()
        assert (done.returncode == 0) == ("nothing found" in line), line
        assert done.returncode == 0 or "; mend: " in line
        return line


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.put("bin/nix", FAKE_NIX)
    (tmp_path / "bin/nix").chmod(0o755)
    return made


def test_a_host_that_is_well(host: Host) -> None:
    assert host.doctor() == "doctor: Nix 2.18.1, flakes, flake.lock: nothing found"
    host.settings["FAKE_OLD_WORDS"] = "1"
    assert "nothing found" in host.doctor()


@pytest.mark.parametrize("version", ["2.8.0", "2.17.9", "2.3pre1"])
def test_an_old_nix(host: Host, version: str) -> None:
    host.settings["FAKE_VERSION"] = version
    assert f"is older than {TABLE['least']['nix']}; mend: nix upgrade-nix" in host.doctor()


@pytest.mark.parametrize("version", ["2.18", "2.26.3", "3.0.1"])
def test_a_new_enough_nix(host: Host, version: str) -> None:
    host.settings["FAKE_VERSION"] = version
    assert "nothing found" in host.doctor()


def test_flakes_off(host: Host) -> None:
    host.features = "nix-command"
    line = host.doctor()
    assert "flakes are off" in line and "experimental-features = nix-command flakes" in line


def test_a_lock_out_of_step(host: Host) -> None:
    host.settings["FAKE_LOCK"] = "1"
    line = host.doctor()
    assert "out of step" in line and line.endswith("mend: nix flake lock && git add flake.lock")


def test_no_driver(host: Host) -> None:
    host.put("dev/nvidiactl")
    assert "no NVIDIA driver library" in host.doctor()
    host.put("run/opengl-driver/lib/libcuda.so.1")
    assert "nothing found" in host.doctor()


def test_no_builder_with_the_feature(host: Host) -> None:
    assert "no builder offers the feature cuda-sm90" in host.doctor("sm90")
    host.put("etc/nix/machines", "ssh-ng://nix-ssh@a x86_64-linux - 1 1 cuda,cuda-sm100\n")
    line = host.doctor("sm90")
    assert "cuda,cuda-sm90' | sudo tee -a /etc/nix/machines" in line
    host.put("etc/nix/machines", "ssh-ng://nix-ssh@a x86_64-linux - 1 1 cuda,cuda-sm90\n")
    assert "nothing found" in host.doctor("sm90")
    host.builders = "ssh://b x86_64-linux - 1 1 kvm ; ssh://c x86_64-linux - 1 1 cuda,cuda-sm100"
    assert "nothing found" in host.doctor("sm100")
    assert "no builder" in host.doctor("sm90")


def test_a_gpu_host_that_does_not_offer_it(host: Host) -> None:
    host.put("dev/nvidiactl")
    host.put("usr/lib64/libcuda.so.1")
    assert "extra-system-features = cuda cuda-sm90" in host.doctor("sm90")
    host.system = "kvm cuda cuda-sm90"
    assert "nothing found" in host.doctor("sm90")


def test_a_word_that_is_no_architecture(host: Host) -> None:
    assert "hopper is no architecture" in host.doctor("hopper")


def test_no_nix_at_all(host: Host) -> None:
    for tool in ("dirname", "sed"):
        (host.root / "bin" / tool).symlink_to(str(shutil.which(tool)))
    (host.root / "bin/nix").unlink()
    host.settings["PATH"] = str(host.root / "bin")
    sh = str(shutil.which("sh"))
    done = subprocess.run(
        [sh, str(ROOT / "nix/doctor.sh")], env=host.settings, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Nix is not installed; mend: " in done.stderr


# --- the driver on a host that is not NixOS ------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_only_the_drivers_own_libraries_are_found(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    driver.mkdir()
    for name in ("libcuda.so.1", "libnvidia-ml.so.1", "libc.so.6"):
        (driver / name).touch()
    said = f". {ROOT}/nix/driver.sh; echo $LD_LIBRARY_PATH; echo $TRITON_LIBCUDA_PATH"
    env = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": "/none",
           "MEGAMOE_DRIVER": str(driver), "MEGAMOE_NIXOS_DRIVER": str(tmp_path / "none")}  # fmt: skip
    done = subprocess.run(["bash", "-ec", said], env=env, capture_output=True, text=True)
    folder = tmp_path / "cache/megamoe/driver"
    assert ok(done).stdout.splitlines() == [str(folder), str(folder)]
    assert {path.name for path in folder.iterdir()} == {"libcuda.so.1", "libnvidia-ml.so.1"}

    env["MEGAMOE_NIXOS_DRIVER"] = str(driver)
    done = subprocess.run(["bash", "-ec", said], env=env, capture_output=True, text=True)
    assert ok(done).stdout.split() == [], "NixOS needs nothing of this"
