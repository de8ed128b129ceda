"""What a Nix build runs, run as it would: ci/sandbox.sh, and ci/sandboxed.py in it.

Skipped where Nix or namespaces are missing; MEGAMOE_REQUIRE_NIX=1 (`.ci/run`) makes that a failure.
The whole check phase is a job of its own (.github/workflows/test.yml).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.flake import REQUIRED, ROOT, needs_nix

NAMESPACES = shutil.which("unshare") is not None and (
    subprocess.run(
        ["unshare", *(["--map-root-user"] if os.getuid() else []), "--mount", "true"],
        capture_output=True,
    ).returncode
    == 0
)
needs_namespaces = pytest.mark.skipif(
    not NAMESPACES and not REQUIRED, reason="this host gives no mount namespace"
)


def sandbox(build: Path, *command: str, tools: str = "sh ls id cat", **more: str):
    argv = ["sh", str(ROOT / "ci/sandbox.sh"), str(build), *command]
    return subprocess.run(
        argv, env=os.environ | {"TOOLS": tools} | more, capture_output=True, text=True
    )


@needs_nix
@needs_namespaces
def test_the_sandbox_is_as_poor_as_nixs(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    (tmp_path / "build").mkdir()
    words = """id -u; ls /; ls /usr; ls /tools; ls "$HOME" 2>&1
        echo x >/build/written
        echo x >"$MOUNT/written" || echo read-only
        ls "$HIDDEN" 2>&1
        cat /proc/net/dev"""
    script = tmp_path / "build/script"
    script.write_text(words)
    hidden = str(Path(__file__).parent)
    mount = str(tmp_path / "mount")
    result = sandbox(tmp_path / "build", mount, "--", "sh", "/build/script", MOUNT=mount,
                     HIDDEN=hidden)  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines[0] == "1000", result.stderr
    assert "nix" not in lines and "root" not in lines and "bin" in lines
    assert not (set(lines) & {"sbin", "local", "share"}), "of /usr there are libraries"
    assert {"cat", "id", "ls", "sh"} <= set(lines) and "git" not in lines
    assert "read-only" in lines and (tmp_path / "build/written").exists()
    assert result.stdout.count("No such file or directory") == 2, "neither a home nor this checkout"
    networks = re.findall(r"^ *(\w+):", result.stdout, re.M)
    assert set(networks) <= {"lo", "tunl0", "sit0", "ip6tnl0", "ls"}, networks


@needs_nix
@needs_namespaces
def test_the_status_is_that_of_the_command(tmp_path: Path) -> None:
    assert sandbox(tmp_path, "--", "sh", "-c", "exit 7").returncode == 7
    assert sandbox(tmp_path).returncode == 2


@needs_nix
@needs_namespaces
def test_the_hosts_programs_stay_as_they_are(tmp_path: Path) -> None:
    """Named twice, and written to inside: a mount of the host's own file would let both through."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "build").mkdir()
    program = tmp_path / "bin/program"
    program.write_text("#!/bin/sh\necho it runs\n")
    program.chmod(0o755)
    before = program.read_bytes()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result = sandbox(
        tmp_path / "build", "--", "sh", "-c", "program; : >/tools/program; program",
        tools="sh program program", PATH=path,
    )  # fmt: skip
    assert "it runs" in result.stdout, result.stderr
    assert program.read_bytes() == before


def sandboxed(*arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not re.match(r"PYTEST|MEGAMOE|PYTHONPATH", k)}
    return subprocess.run(
        [sys.executable, ROOT / "ci/sandboxed.py", *arguments],
        env=clean, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


@needs_nix
@needs_namespaces
def test_the_suite_runs_as_nix_would_run_it() -> None:
    """The package's own check phase, for tests that have failed in one.

    They ask git, start Python without PYTHONPATH, run scripts of ci/, and make a home's cache.
    """
    result = sandboxed(
        "check", "-n0", "-rs",
        "tests/test_ab.py::test_what_is_no_side_is_one_line",
        "tests/test_ab.py::test_identical_is_exit_0_and_the_headline_counts_what_was_compared",
        "tests/test_bisect.py::test_misuse_is_one_line",
        "tests/test_ci_scripts.py::test_the_revision_is_the_commit_and_says_when_the_tree_is_another",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\b6 passed in", result.stdout) and "skipped" not in result.stdout


@needs_nix
@needs_namespaces
def test_the_script_of_a_gpu_check_judges_eager_on_the_cpu() -> None:
    result = sandboxed("shard", "sm90-1-of-4", "eplb/identity-map-*")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "GREEN: the one judged case passed" in result.stdout
    sizes = dict(re.findall(r"^sandboxed: (\S+): (\d+) bytes$", result.stdout, re.M))
    assert set(sizes) == {"result.json", "junit.xml", "provenance.json"}
    assert all(int(size) > 200 for size in sizes.values())
