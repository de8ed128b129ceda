"""A Nix whose store and settings are its own, and ci/nixpkgs-stub in place of every input."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = f"{os.uname().machine}-linux"

REQUIRED = os.environ.get("MEGAMOE_REQUIRE_NIX", "") not in ("", "0")
MISSING = next((tool for tool in ("nix", "bash") if shutil.which(tool) is None), None)
needs_nix = pytest.mark.skipif(
    MISSING is not None and not REQUIRED, reason=f"{MISSING} is not installed"
)


# A folder with nixpkgs' own lib/: then that stands in place of the stub's.
NIXPKGS = os.environ.get("MEGAMOE_NIXPKGS", "")


@dataclass
class Flake:
    """A copy of what the flake reads, and a Nix whose store and settings are its own."""

    root: Path
    store: Path

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
        process = ok(self.nix("build", "--no-link", "--json", f".#{attribute}", *arguments, **more))
        return Path(json.loads(process.stdout)[0]["outputs"]["out"])

    def expression(self, text: str):
        """The value of a Nix expression, in which `stub` is the stub."""
        return json.loads(ok(self.evaluated(text)).stdout)

    def evaluated(self, text: str) -> subprocess.CompletedProcess[str]:
        stub = self.root / "ci/nixpkgs-stub"
        text = f'let stub = {{ outPath = "{stub}"; lib = import {stub}/lib.nix; }}; in {text}'
        return self.run("nix-instantiate", "--eval", "--strict", "--json", "--expr", text)

    def machine(self, what: str, *texts: str) -> subprocess.CompletedProcess[str]:
        """``what`` of a NixOS machine with the module of a GPU machine and the modules ``texts``.

        ``failed`` are the messages of the assertions that fail.
        """
        modules = "".join(f"({{ lib, pkgs, config, ... }}: {{ {text} }})" for text in texts)
        return self.evaluated(f"""
            let
              machine = import (stub + "/nixos.nix") {{
                inherit (stub) lib;
                inherit (stub.lib) facts;
                pkgs = import stub {{ system = "x86_64-linux"; }};
                modules = [ (import {self.root}/nix/gpu-runner.nix) {modules} ];
              }};
            in
            with machine; {what}""")


def ok(process: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert process.returncode == 0, process.stdout + process.stderr
    return process


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
    for name in ("setup_env.sh", "lint.sh"):
        shutil.copy(ROOT / "tools" / name, copy / "tools")
    if NIXPKGS:
        stub = copy / "ci/nixpkgs-stub"
        shutil.copytree(Path(NIXPKGS) / "lib", stub / "nixpkgs-lib")
        (stub / "lib.nix").rename(stub / "stub-lib.nix")
        (stub / "lib.nix").write_text("""
            let stub = import ./stub-lib.nix; in
            import ./nixpkgs-lib // { inherit (stub) facts; }
            # The real one needs a newer Nix than 2.8.
            // (if builtins ? readFileType then { } else { inherit (stub) fileset; })
        """)
    return Flake(copy, store)
