"""git: revisions, and a worktree beside the checkout that holds one of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.compare import disk
from megamoe.compare.processes import CannotStart, clean_environment


def around() -> Path | None:
    """The checkout that holds the current folder; None where none does."""
    top = git(Path.cwd(), "rev-parse", "--show-toplevel", check=False)
    return Path(top) if top else None


def git(home: Path, *arguments: str, check: bool = True) -> str:
    """The output of git, without hooks. Raises :class:`CannotStart` with git's last line."""
    command = ["git", "-C", str(home), "-c", "core.hooksPath=/dev/null",
               "-c", "advice.detachedHead=false", *arguments]  # fmt: skip
    try:
        process = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise CannotStart("git is not installed; a revision cannot be looked up") from None
    if process.returncode and check:
        lines = [line for line in process.stderr.strip().splitlines() if line.strip()]
        disk.blame(process.stderr)
        last = lines[-1] if lines else "no message"
        raise CannotStart(f"git {arguments[0]} in {home}: {last}")
    return process.stdout.strip()


@contextmanager
def worktree(home: Path, commit: str, at: Path) -> Iterator[Path]:
    """``commit`` checked out at ``at``, beside the checkout and never in it; removed at the end."""
    remove_worktree(home, at)
    at.parent.mkdir(parents=True, exist_ok=True)
    try:
        git(home, "worktree", "add", "--force", "--detach", str(at), commit)
        yield at
    finally:
        remove_worktree(home, at)


def remove_worktree(home: Path, at: Path) -> None:
    """Take the tree away, whatever an earlier run left of it."""
    git(home, "worktree", "remove", "--force", "--force", str(at), check=False)
    shutil.rmtree(at, ignore_errors=True)
    if str(at) in git(home, "worktree", "list", "--porcelain", check=False):
        git(home, "worktree", "prune", check=False)
