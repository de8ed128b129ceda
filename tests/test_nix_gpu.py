"""The flake's GPU checks and the module of a GPU machine, built with ci/nixpkgs-stub: no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.flake import ROOT, SYSTEM, Flake, flake, needs_nix, store

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
        wanted = rf"features:? \{{cuda, cuda-{arch}\}}"  # newer versions of Nix have the colon
        assert done.returncode != 0 and re.search(wanted, done.stderr)
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
        runner = {{
          enable = {runner};
          url = "u";
          repository = "own/name";
          tokenFile = "/run/token";
        }};
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
    assert hook.endswith("-megamoe-refuse-forks.sh"), "the runner wants a name that ends so"
    assert made["serviceOverrides"]["PrivateDevices"] is False


@needs_nix
def test_a_builder_without_a_driver_says_so(flake: Flake) -> None:
    (assertion,) = runner(flake, driver="")["assertions"]
    assert not assertion["assertion"] and "no NVIDIA driver: set" in assertion["message"]
    assert runner(flake)["assertions"][0]["assertion"]


FORK = {"pull_request": {"head": {"repo": {"full_name": "stranger/megamoe"}}}}
OWN = {"pull_request": {"head": {"repo": {"full_name": "own/megamoe"}}}}
GONE = {"pull_request": {"head": {"repo": None}}}


@pytest.mark.parametrize(
    ("event", "payload", "repository", "refused"),
    [
        ("push", {}, "own/megamoe", ""),
        ("schedule", {}, "own/megamoe", ""),
        ("pull_request", OWN, "own/megamoe", ""),
        ("pull_request", FORK, "own/megamoe", "the pull request comes from stranger/megamoe"),
        ("pull_request", GONE, "own/megamoe", "names no repository"),
        ("pull_request", [], "own/megamoe", "names no repository"),
        ("pull_request_target", OWN, "own/megamoe", "can be caused by strangers"),
        ("issue_comment", {}, "own/megamoe", "can be caused by strangers"),
        ("", {}, "own/megamoe", "can be caused by strangers"),
        ("push", {}, "stranger/megamoe", "this machine serves own/megamoe only"),
    ],
)
def test_the_runners_hook(
    tmp_path: Path, event: str, payload: object, repository: str, refused: str
) -> None:
    (tmp_path / "event.json").write_text(json.dumps(payload))
    job = {
        "GITHUB_EVENT_NAME": event,
        "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
        "GITHUB_REPOSITORY": repository,
    }
    done = subprocess.run(
        [sys.executable, ROOT / "nix/refuse_forks.py", "own/megamoe"],
        env=os.environ | job,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == bool(refused) and refused in done.stderr
    assert len(done.stderr.splitlines()) == bool(refused)
