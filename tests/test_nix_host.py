"""What a host needs: nix/doctor.sh against a fake Nix, nix/driver.sh against a fake driver."""

import os
import shutil
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.flake import ROOT, ok

LEAST = tomllib.loads((ROOT / "toolchain.toml").read_text())["least"]


# --- the doctor ----------------------------------------------------------------------------------

FAKE_NIX = """#!/bin/sh
case "$*" in
--version) echo "nix (Nix) $FAKE_VERSION" ;;
*'config show') [ -z "$FAKE_OLD_WORDS" ] || exit 1; printf '%b' "$FAKE_CONFIG" ;;
*show-config) printf '%b' "$FAKE_CONFIG" ;;
*'flake lock'*) exit "${FAKE_LOCK:-0}" ;;
*'build --dry-run'*)
    printf '%b' "$FAKE_PLAN" >&2
    exit "${FAKE_BUILD:-0}"
    ;;
esac
"""


@dataclass
class Host:
    """A host as the doctor sees it: a fake Nix and a folder for its root."""

    root: Path
    features: str = "flakes nix-command"
    system: str = "benchmark kvm"
    builders: str = "@/etc/nix/machines"
    caches: str = "https://cache.flox.dev/"
    settings: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, text: str = "") -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def doctor(self, *arguments: str) -> str:
        """What it says, one line."""
        config = f"builders = {self.builders}\\nexperimental-features = {self.features}\\n"
        config += f"system-features = {self.system}\\nsubstituters = {self.caches}\\n"
        fake = {"FAKE_VERSION": "2.18.1", "FAKE_CONFIG": config, "FAKE_OLD_WORDS": ""}
        path = {"PATH": f"{self.root}/bin:{os.environ['PATH']}", "HOST_ROOT": str(self.root)}
        result = subprocess.run(
            ["sh", str(ROOT / "nix/doctor.sh"), *arguments],
            env=fake | path | self.settings,
            capture_output=True,
            text=True,
        )
        (line,) = (result.stdout + result.stderr).splitlines()
        assert (result.returncode == 0) == ("nothing found" in line), line
        assert result.returncode == 0 or "; mend: " in line
        return line


@pytest.fixture
def host(tmp_path: Path) -> Host:
    fake_host = Host(tmp_path)
    fake_host.write("bin/nix", FAKE_NIX)
    (tmp_path / "bin/nix").chmod(0o755)
    return fake_host


def test_a_host_that_is_well(host: Host) -> None:
    assert host.doctor() == "doctor: Nix 2.18.1, flakes, flake.lock: nothing found"
    host.settings["FAKE_OLD_WORDS"] = "1"
    assert "nothing found" in host.doctor()


@pytest.mark.parametrize("version", ["2.8.0", "2.17.9", "2.3pre1"])
def test_an_old_nix(host: Host, version: str) -> None:
    host.settings["FAKE_VERSION"] = version
    assert f"is older than {LEAST['nix']}; mend: nix upgrade-nix" in host.doctor()


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
    host.write("dev/nvidiactl")
    assert "no NVIDIA driver library" in host.doctor()
    host.write("run/opengl-driver/lib/libcuda.so.1")
    assert "nothing found" in host.doctor()


def test_no_builder_with_the_feature(host: Host) -> None:
    assert "no builder offers the feature cuda-sm90" in host.doctor("sm90")
    host.write("etc/nix/machines", "ssh-ng://nix-ssh@a x86_64-linux - 1 1 cuda,cuda-sm100\n")
    line = host.doctor("sm90")
    assert "cuda,cuda-sm90' | sudo tee -a /etc/nix/machines" in line
    host.write("etc/nix/machines", "ssh-ng://nix-ssh@a x86_64-linux - 1 1 cuda,cuda-sm90\n")
    assert "nothing found" in host.doctor("sm90")
    host.builders = "ssh://b x86_64-linux - 1 1 kvm ; ssh://c x86_64-linux - 1 1 cuda,cuda-sm100"
    assert "nothing found" in host.doctor("sm100")
    assert "no builder" in host.doctor("sm90")


def test_a_gpu_host_that_does_not_offer_it(host: Host) -> None:
    host.write("dev/nvidiactl")
    host.write("usr/lib64/libcuda.so.1")
    assert "extra-system-features = cuda cuda-sm90" in host.doctor("sm90")
    host.system = "kvm cuda cuda-sm90"
    assert "nothing found" in host.doctor("sm90")


@pytest.mark.parametrize("caches", ["", "https://cache.flox.dev.example", "https://example.com"])
def test_no_cache_with_torch(host: Host, caches: str) -> None:
    host.caches = caches
    line = host.doctor()
    assert "it would be compiled, for hours" in line and "shell .#cpu needs none" in line
    assert "extra-substituters = https://cache.nixos-cuda.org https://cache.flox.dev'" in line
    assert "'extra-trusted-public-keys = cache.nixos-cuda.org:74DU" in line
    host.caches = f"{caches} https://cache.nixos-cuda.org"
    assert "nothing found" in host.doctor()


TORCH = "these 2 derivations will be built:\\n  /nix/store/0a-python3.13-torch-2.11.0.drv\\n"
OURS = "this derivation will be built:\\n  /nix/store/0a-python3.13-deep-gemm-2.6.1.drv\\n"
FETCHED = "these paths will be fetched:\\n  /nix/store/0a-python3.13-torch-2.11.0\\n"


def test_torch_that_would_be_compiled_is_named_before_it_starts(host: Host) -> None:
    host.settings["FAKE_PLAN"] = OURS + FETCHED
    assert "nothing found" in host.doctor("compile")
    host.settings["FAKE_PLAN"] = TORCH + OURS
    assert "doctor: python3.13-torch-2.11.0 would be compiled, for hours" in host.doctor("compile")
    assert "nothing found" in host.doctor(), "only where it is asked for"
    host.settings |= {"FAKE_PLAN": "error: no network\\n", "FAKE_BUILD": "1"}
    assert "the CUDA shell does not evaluate: error: no network" in host.doctor("compile")


def test_a_word_that_is_no_architecture(host: Host) -> None:
    assert "hopper is no architecture" in host.doctor("hopper")


def test_no_nix_at_all(host: Host) -> None:
    for tool in ("dirname", "sed"):
        (host.root / "bin" / tool).symlink_to(str(shutil.which(tool)))
    (host.root / "bin/nix").unlink()
    host.settings["PATH"] = str(host.root / "bin")
    sh = str(shutil.which("sh"))
    result = subprocess.run(
        [sh, str(ROOT / "nix/doctor.sh")], env=host.settings, capture_output=True, text=True
    )
    assert result.returncode == 1 and "Nix is not installed; mend: " in result.stderr


# --- the driver on a host that is not NixOS ------------------------------------------------------


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_only_the_drivers_own_libraries_are_found(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    driver.mkdir()
    for name in ("libcuda.so.1", "libnvidia-ml.so.1", "libc.so.6"):
        (driver / name).touch()
    script = f". {ROOT}/nix/driver.sh; echo $LD_LIBRARY_PATH; echo $TRITON_LIBCUDA_PATH"
    env = {
        "PATH": os.environ["PATH"],
        "HOME": "/none",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "MEGAMOE_DRIVER": str(driver),
        "MEGAMOE_NIXOS_DRIVER": str(tmp_path / "none"),
    }
    result = subprocess.run(["bash", "-ec", script], env=env, capture_output=True, text=True)
    folder = tmp_path / "cache/megamoe/driver"
    assert ok(result).stdout.splitlines() == [str(folder), str(folder)]
    assert {path.name for path in folder.iterdir()} == {"libcuda.so.1", "libnvidia-ml.so.1"}

    env["MEGAMOE_NIXOS_DRIVER"] = str(driver)
    result = subprocess.run(["bash", "-ec", script], env=env, capture_output=True, text=True)
    assert ok(result).stdout.split() == [], "NixOS needs nothing of this"
