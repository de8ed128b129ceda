"""A git history written by a script: a small kernel, and what is planted in it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
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

BUILD = "\"$MEGAMOE_PYTHON\" -c \"compile(open('kernel.py').read(), 'kernel.py', 'exec')\""
"""A build: refuses what does not compile."""


def git(home: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(home), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit_all(home: Path, states: Iterable[tuple[str, Mapping[str, str]]]) -> list[str]:
    """A new repository of one commit for each (subject, {file: text}); gives their names."""
    home.mkdir(parents=True)
    git(home, "init", "--quiet", "--initial-branch=main")
    stream: list[str] = []
    for i, (subject, files) in enumerate(states, 1):
        stream += ["commit refs/heads/main", f"mark :{i}", f"committer A <a@b> {i} +0000",
                   f"data {len(subject.encode())}", subject]  # fmt: skip
        for name, text in files.items():
            stream += [f"M 644 inline {name}", f"data {len(text.encode())}", text]
    subprocess.run(
        ["git", "-C", str(home), "fast-import", "--quiet"], check=True,
        input="\n".join([*stream, ""]).encode(),
    )  # fmt: skip
    git(home, "reset", "--hard", "--quiet")
    return git(home, "rev-list", "--reverse", "main").split()


def write(home: Path, count: int, planted: Mapping[int, str], code_every: int = 3) -> list[str]:
    """``count`` commits; gives their names, the first one's at 0.

    ``planted[i]`` is an edit that commit ``i`` brings; from then on it stays, but for what is
    broken or noisy, which the next commit takes out. One commit in ``code_every``, and each that
    plants or repairs something, touches the kernel; the others its notes.
    """
    states, faults, notes = [], [], ""
    for i in range(count):
        passing = {i: planted[i]} if planted.get(i) in (BROKEN, NOISE) else {}
        if i in planted and not passing:
            faults.append(planted[i])
        repairs = planted.get(i - 1) in (BROKEN, NOISE)
        if i % code_every == 0 or i in planted or repairs:
            lines = [*faults, *passing.values()] or ["pass"]
            text = KERNEL.format(edits="\n        ".join(lines), number=i)
            states.append((f"kernel: revision {i}", {"kernel.py": text}))
        else:
            notes += f"note {i}\n"
            states.append((f"notes: {i}", {"notes.md": notes}))
    return commit_all(home, states)
