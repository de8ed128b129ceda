"""A git history written by a script: a small kernel, and what is planted in it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

KERNEL = '''"""A kernel that grows."""

import os

from megamoe.backends.eager import EagerBackend


class Kernel(EagerBackend):
    name = "toy"

    def forward(self, problem):
        out = super().forward(problem)
        {edits}
        return out


# revision {number}
'''

STAGED = 'out["x_sf"][0, 0] += 1'
CODE = 'out["l2_acts"][0, 0, 0] ^= 1'
Y = 'out["y"][0, 0] += 1'
NOISE = 'out["y"][1, 0] = float(int.from_bytes(os.urandom(2), "little"))'
"""Edits, by the stage that they move. ``CODE`` is of the codes shown, so ``y`` does not see it."""
BROKEN = "this does not compile"

BUILD = '"$MEGAMOE_PYTHON" -c "compile(open(\'kernel.py\').read(), \'kernel.py\', \'exec\')"'
"""A build: refuses what does not compile."""


def git(home: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{what}": value
           for role in ("AUTHOR", "COMMITTER")
           for what, value in (("NAME", "a"), ("EMAIL", "a@b"), ("DATE", "2026-01-01T00:00:00Z"))}  # fmt: skip
    return subprocess.run(
        ["git", "-C", str(home), *arguments], check=True, capture_output=True, text=True,
        env={**os.environ, **who},
    ).stdout.strip()  # fmt: skip


def write(home: Path, count: int, planted: Mapping[int, str], code_every: int = 3) -> list[str]:
    """``count`` commits; gives their names, the first one's at 0.

    ``planted[i]`` is an edit that commit ``i`` brings; from then on it stays, but for what is
    broken or noisy, which the next commit takes out. One commit in ``code_every``, and each that
    plants or repairs something, touches the kernel; the others its notes.
    """
    home.mkdir(parents=True)
    git(home, "init", "--quiet", "--initial-branch=main")
    commits, kept = [], []
    for i in range(count):
        passing = {i: planted[i]} if planted.get(i) in (BROKEN, NOISE) else {}
        if i in planted and not passing:
            kept.append(planted[i])
        repairs = planted.get(i - 1) in (BROKEN, NOISE)
        if i % code_every == 0 or i in planted or repairs:
            lines = [*kept, *passing.values()] or ["pass"]
            text = KERNEL.format(edits="\n        ".join(lines), number=i)
            (home / "kernel.py").write_text(text)
            subject = f"kernel: revision {i}"
        else:
            with (home / "notes.md").open("a") as notes:
                notes.write(f"note {i}\n")
            subject = f"notes: {i}"
        git(home, "add", "--all")
        git(home, "commit", "--quiet", "--message", subject)
        commits.append(git(home, "rev-parse", "HEAD"))
    return commits
