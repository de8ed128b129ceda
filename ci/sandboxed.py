"""Run what a Nix build would run, in ci/sandbox.sh: the package's check phase, or a GPU check.

    python ci/sandboxed.py check [PYTEST ARGUMENTS]
    python ci/sandboxed.py shard sm90-1-of-4 CASE

Attributes and scripts come from the flake, evaluated with ci/nixpkgs-stub; programs and Python
packages from this host: those that facts.json gives to stdenv and to the inputs that are named, and
the packages of this interpreter. ``check`` runs on a copy of the files that git knows, without
``.git``. ``shard`` runs the script of a GPU check: it judges CASE, a glob, with ``eager`` on the
CPU. The exit status is the command's, and 2 where the host cannot.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "ci/nixpkgs-stub"
FACTS = json.loads((STUB / "facts.json").read_text())
SYSTEM = f"{os.uname().machine}-linux"
CHECK_ATTRIBUTES = ("preCheck", "checkPhase", "postCheck", "pytestFlags", "disabledTests",
           "disabledTestPaths", "disabledTestMarks", "dontUsePytestXdist")  # fmt: skip


def nix(*arguments: str, flake: Path) -> Any:
    """The JSON that ``nix eval`` prints of an attribute of ``flake``, with the stub for nixpkgs."""
    attribute, *more = arguments
    command = ["sh", str(STUB / "nix.sh"), "eval", "--json", f"path:{flake}#{attribute}", *more]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"sandboxed: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout)


def programs(inputs: list[str]) -> list[str]:
    """The programs of stdenv and of packages, by their names in nixpkgs."""
    names = [name for row in FACTS["stdenv"]["programs"].values() for name in row]
    for name in inputs:
        names += FACTS["packages"].get(name, {}).get("programs", [])
    return sorted(set(names))


def source_without_git(target: Path) -> None:
    """The files that git knows, as a flake's source has them: no ``.git``, nothing ignored."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def sandbox(build: Path, visible: list[Path], inputs: list[str], environment: dict[str, str],
            script: str) -> int:  # fmt: skip
    """Run a script of bash in the sandbox, in ``build``, with ``environment`` in its environment.

    /build/env/bin/python3 is an interpreter with the packages of this one, as python3.withPackages
    makes them, and without megamoe: an editable install would lead back to this checkout.
    """
    packages = sysconfig.get_path("purelib")
    venv.create(build / "env", symlinks=True)
    (site,) = (build / "env/lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    environment = environment | {
        "NIX_BUILD_CORES": "2",
        "NIX_BUILD_TOP": "/build",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    (build / "script").write_text("\n".join(["set -e", *lines, script, ""]))
    command = ["sh", str(ROOT / "ci/sandbox.sh"), str(build), sys.base_prefix, packages]
    command += [*map(str, visible), "--", "bash", "/build/script"]
    return subprocess.run(
        command, env=os.environ | {"TOOLS": " ".join(programs(inputs))}
    ).returncode


def check(arguments: list[str]) -> int:
    """The check phase of packages.megamoe; ``arguments`` come after its own."""
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder)
        source_without_git(build / "source")
        pick = "; ".join(f"{name} = drv.arguments.{name} or null" for name in CHECK_ATTRIBUTES)
        apply = f"drv: {{ {pick}; inputs = map (i: i.pname) drv.arguments.nativeCheckInputs; }}"
        attributes = nix(f"packages.{SYSTEM}.megamoe", "--apply", apply, flake=build / "source")
        inputs = attributes.pop("inputs")
        environment = {
            name: as_environment(value) for name, value in attributes.items() if value is not None
        }
        phase = environment.pop("checkPhase", "")
        phase = re.sub(r"\S+-python3-env/bin/python3", "interpreter", phase)
        if phase:
            environment["checkPhase"] = re.sub(r"[^\s:=]+-python3-env/bin", "/build/env/bin", phase)
        environment["nativeCheckInputs"] = " ".join(inputs)
        shutil.copy(STUB / "check-phase.sh", build)
        words = " ".join(map(shlex.quote, arguments))
        # What a check phase finds on PYTHONPATH: the package as it is installed, with its goldens.
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build", "--build-lib", str(build / "installed")],
            cwd=build / "source", check=True, capture_output=True,
        )  # fmt: skip
        shutil.rmtree(build / "source/build", ignore_errors=True)
        environment["PYTHONPATH"] = "/build/installed"
        # Without an environment of its own a check phase has its packages there, too.
        bare = f"{sys.base_prefix}/bin/python3"
        path = f"/build/installed:{sysconfig.get_path('purelib')}"
        script = f"""interpreter() {{ /build/env/bin/python3 "$@" {words}; }}
python3() {{ PYTHONPATH={path} {bare} "$@" {words}; }}
. /build/check-phase.sh
cd source
runCheckPhase"""
        return sandbox(build, [], inputs, environment, script)


def as_environment(value: Any) -> str:
    """A derivation's attribute as its builder sees it: spaces stand between a list's elements."""
    if isinstance(value, list):
        return " ".join(map(as_environment, value))
    return ("1" if value else "") if isinstance(value, bool) else str(value)


def shard(name: str, case: str) -> int:
    """The script of gpuChecks.NAME, with eager on the CPU in place of its backend and its GPU."""
    with tempfile.TemporaryDirectory() as folder:
        build, flake = Path(folder) / "build", Path(folder) / "flake"
        build.mkdir()
        source_without_git(flake)
        what = "drv: { inherit (drv) buildCommand BACKEND DEVICE ARCH; }"
        attributes = nix(f"gpuChecks.{SYSTEM}.{name}.report", "--apply", what, flake=flake)
        match = re.search(r"cp -r (\S+) work", attributes["buildCommand"])
        assert match, "the script copies its source"
        environment = {"BACKEND": "eager", "DEVICE": "cpu", "CASE": case, "out": "/build/out"}
        environment |= {"MEGAMOE_PYTHON": "/build/env/bin/python3", "OMP_NUM_THREADS": "1"}
        code = sandbox(build, [Path(match[1])], [], environment, attributes["buildCommand"])
        for path in sorted((build / "out").glob("*")):
            print(f"sandboxed: {path.name}: {path.stat().st_size} bytes")
        return code


def main(arguments: list[str]) -> int:
    """``check`` or ``shard``."""
    match arguments:
        case ["check", *rest]:
            return check(rest)
        case ["shard", name, case]:
            return shard(name, case)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
