"""The flake's GPU checks and the module of a GPU machine, built with ci/nixpkgs-stub: no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.flake import ROOT, SYSTEM, Flake, flake, needs_nix, ok, store

__all__ = ["flake", "store"]  # fixtures

FEATURES = {"sm90": ["cuda", "cuda-sm90"], "sm100": ["cuda", "cuda-sm100"]}
BACKENDS = {"sm90": "triton", "sm100": "deep_gemm"}
SHARDS = 4


# --- GPU checks ----------------------------------------------------------------------------------


@needs_nix
def test_gpu_checks_cover_each_shard_of_each_architecture(flake: Flake) -> None:
    what = """builtins.mapAttrs (_: check: {
      features = check.requiredSystemFeatures;
      settings = [ (check.BACKEND or null) (check.ARCH or null) (check.DEVICE or null) ];
    })"""
    for system in ("x86_64-linux", "aarch64-linux"):
        checks = flake.value(f"gpuChecks.{system}", "--apply", what)
        expected = {}
        for arch, features in FEATURES.items():
            shard = {"features": features, "settings": [BACKENDS[arch], arch, "cuda"]}
            names = [f"{arch}-{index}-of-{SHARDS}" for index in range(1, SHARDS + 1)]
            expected |= dict.fromkeys(names, shard)
            expected[f"{arch}-import"] = {"features": features, "settings": [None] * 3}
        assert checks == expected


@needs_nix
@pytest.mark.parametrize(("arch", "other"), [("sm90", "sm100"), ("sm100", "sm90")])
def test_a_gpu_check_is_refused_without_the_feature_and_built_with_it(
    flake: Flake, arch: str, other: str
) -> None:
    name = f"gpuChecks.{SYSTEM}.{arch}-2-of-{SHARDS}"
    for features in ("kvm", "cuda", f"cuda cuda-{other}"):
        process = flake.nix(
            "build", "--no-link", f".#{name}", "--option", "system-features", features
        )
        pattern = rf"features:? \{{cuda, cuda-{arch}\}}"  # newer versions of Nix have the colon
        assert process.returncode != 0 and re.search(pattern, process.stderr)
    options = ("--option", "system-features", f"cuda cuda-{arch}", "--cores", "7")
    folder = flake.build(name, *options)
    assert {path.name for path in folder.iterdir()} == {
        "result.json",
        "junit.xml",
        "provenance.json",
    }
    text = (folder / "result.json").read_text()
    assert f"BACKEND={BACKENDS[arch]} DEVICE=cuda workers=2" in text, "however many cores there are"


@needs_nix
def test_a_red_shard_is_red_and_its_report_can_still_be_had(flake: Flake) -> None:
    flake.edit("ci/nixpkgs-stub/python.sh", "verdict=0", "verdict=1")
    options = ("--option", "system-features", "cuda cuda-sm90")
    name = f"gpuChecks.{SYSTEM}.sm90-1-of-{SHARDS}"
    assert flake.nix("build", "--no-link", f".#{name}", *options).returncode != 0
    assert (flake.build(f"{name}.report", *options) / "junit.xml").is_file()


@needs_nix
def test_a_shard_that_judged_nothing_is_no_report(flake: Flake) -> None:
    flake.edit("ci/nixpkgs-stub/python.sh", '>"$2"', "")
    options = ("--option", "system-features", "cuda cuda-sm90")
    name = f"gpuChecks.{SYSTEM}.sm90-1-of-{SHARDS}.report"
    process = flake.nix("build", "--no-link", "-L", f".#{name}", *options)
    assert process.returncode != 0 and "left no result.json" in process.stderr


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


# --- the machine ---------------------------------------------------------------------------------

MACHINE = """
  hardware.nvidia.open = true;
  nixpkgs.config.allowUnfreePredicate = _: true;
  services.megamoe-gpu = { enable = true; architecture = "sm100"; };
"""
X11 = 'services.xserver.videoDrivers = [ "nvidia" ];'
NVSWITCH = "hardware.nvidia.datacenter.enable = true;"
KEYS = 'services.megamoe-gpu.builder.keys = [ "key" ];'
RUNNER = """services.megamoe-gpu.runner = {
  enable = true; url = "u"; repository = "own/name"; tokenFile = "/run/token"; };"""


def machine(flake: Flake, *text: str, what: str):
    return json.loads(ok(flake.machine(what, MACHINE, *text)).stdout)


@needs_nix
@pytest.mark.parametrize("driver", [X11, NVSWITCH])
def test_a_builder_offers_its_features_and_gives_the_sandbox_the_driver(
    flake: Flake, driver: str
) -> None:
    assert machine(flake, driver, KEYS, what="failed") == []
    settings = machine(flake, driver, KEYS, what="config.nix.settings")
    features = settings["system-features"]
    assert {"cuda", "cuda-sm100", "big-parallel", "kvm"} <= set(features)
    assert "cuda-sm90" not in features and len(set(features)) == len(features), "each once"
    assert set(settings["trusted-users"]) == {"root", "nix-ssh"}
    assert "https://cache.flox.dev" in settings["substituters"]
    programs = machine(flake, driver, what="config.programs.nix-required-mounts")
    assert programs == {"enable": True, "presets": {"nvidia-gpu": {"enable": True}}}
    ssh = machine(flake, driver, KEYS, what="config.nix.sshServe")
    assert ssh == {"enable": True, "write": True, "protocol": "ssh-ng", "keys": ["key"]}
    assert machine(flake, driver, what="config.services.github-runners") == {}
    assert machine(flake, driver, what="config.nix.sshServe.enable") is False


@needs_nix
def test_a_runner_is_fresh_for_each_job_and_refuses_forks(flake: Flake) -> None:
    what = """
      let r = config.services.github-runners.megamoe; in
      builtins.removeAttrs r [ "extraPackages" ] // { tools = map (p: p.pname) r.extraPackages; }"""
    runner = machine(flake, X11, RUNNER, what=what)
    assert runner["ephemeral"] is True and runner["extraLabels"] == ["gpu", "sm100"]
    hook = runner["extraEnvironment"]["ACTIONS_RUNNER_HOOK_JOB_STARTED"]
    assert hook.endswith("-megamoe-refuse-forks.sh"), "the runner wants a name that ends so"
    assert runner["tools"] == ["git", "gnumake"]
    service = runner["serviceOverrides"]
    assert service["PrivateDevices"] is False
    assert [runner["workDir"]] == [f"/var/cache/{name}" for name in service["CacheDirectory"]]


@needs_nix
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "services.megamoe-gpu: no NVIDIA driver: set hardware.nvidia.open = true, and "),
        ([X11, NVSWITCH], "You cannot configure both X11 and Data Center drivers"),
        ([X11, "nixpkgs.config = lib.mkForce { };"], "‘nvidia-x11’ has an unfree license"),
        ([NVSWITCH, "nixpkgs.config = lib.mkForce { };"], "‘fabricmanager’ has an unfree license"),
        ([X11, "hardware.nvidia.open = lib.mkForce null;"], "null"),
        ([X11, 'services.megamoe-gpu.architecture = lib.mkForce "sm70";'], "not of type"),
        (["services.megamoe-gpu.architectures = [ ];"], "does not exist"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(flake: Flake, texts: list[str], message: str) -> None:
    process = flake.machine("[ failed config.nix.settings ]", MACHINE, *texts)
    output = process.stdout if process.returncode == 0 else process.stderr
    assert message in output


def configurations() -> dict[str, str]:
    """The configurations of docs/toolchain.md, by what their first line says they are for."""
    blocks = re.findall(r"((?:^ {7}.*\n|^\n)+)", (ROOT / "docs/toolchain.md").read_text(), re.M)
    return {
        block.strip().splitlines()[0].lstrip("# "): block
        for block in blocks
        if block.lstrip().startswith("# ") and "hardware.nvidia" in block
    }


BUILDERS = configurations()


@needs_nix
@pytest.mark.parametrize("kind", sorted(BUILDERS))
def test_the_documented_machine_evaluates(flake: Flake, kind: str) -> None:
    process = ok(flake.machine("failed", BUILDERS[kind]))
    assert json.loads(process.stdout) == []
    features = ok(flake.machine("config.nix.settings.system-features", BUILDERS[kind])).stdout
    assert "cuda-sm90" in features


def test_both_drivers_are_documented() -> None:
    assert len(BUILDERS) == 2
    assert sum(X11 in text for text in BUILDERS.values()) == 1
    assert sum(NVSWITCH in text for text in BUILDERS.values()) == 1


@needs_nix
@pytest.mark.parametrize("kind", sorted(BUILDERS))
@pytest.mark.parametrize("line", ["hardware.nvidia.open", "allowUnfreePredicate"])
def test_each_documented_line_is_needed(flake: Flake, kind: str, line: str) -> None:
    text = re.sub(rf"^[^\n]*{re.escape(line)}.*?;\n", "", BUILDERS[kind], flags=re.M | re.S)
    assert line not in text
    process = flake.machine("failed", text)
    assert process.returncode != 0 or json.loads(process.stdout) != []


FORK = {"pull_request": {"head": {"repo": {"full_name": "stranger/megamoe"}}}}
OWN = {"pull_request": {"head": {"repo": {"full_name": "own/megamoe"}}}}
NO_REPOSITORY = {"pull_request": {"head": {"repo": None}}}


@pytest.mark.parametrize(
    ("event", "payload", "repository", "reason"),
    [
        ("push", {}, "own/megamoe", ""),
        ("schedule", {}, "own/megamoe", ""),
        ("pull_request", OWN, "own/megamoe", ""),
        ("pull_request", FORK, "own/megamoe", "the pull request comes from stranger/megamoe"),
        ("pull_request", NO_REPOSITORY, "own/megamoe", "names no repository"),
        ("pull_request", [], "own/megamoe", "names no repository"),
        ("pull_request_target", OWN, "own/megamoe", "can be caused by strangers"),
        ("issue_comment", {}, "own/megamoe", "can be caused by strangers"),
        ("", {}, "own/megamoe", "can be caused by strangers"),
        ("push", {}, "stranger/megamoe", "this machine serves own/megamoe only"),
    ],
)
def test_the_runners_hook(
    tmp_path: Path, event: str, payload: object, repository: str, reason: str
) -> None:
    (tmp_path / "event.json").write_text(json.dumps(payload))
    job = {
        "GITHUB_EVENT_NAME": event,
        "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
        "GITHUB_REPOSITORY": repository,
    }
    process = subprocess.run(
        [sys.executable, ROOT / "nix/refuse_forks.py", "own/megamoe"],
        env=os.environ | job,
        capture_output=True,
        text=True,
    )
    assert (process.returncode != 0) == bool(reason) and reason in process.stderr
    assert len(process.stderr.splitlines()) == bool(reason)
