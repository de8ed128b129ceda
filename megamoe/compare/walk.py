"""The walking: by git itself over commits, by halves over a list."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megamoe.compare.checkout import git
from megamoe.compare.processes import CannotStart, clean_environment, end_group

CODES: Final = {"good": 0, "bad": 1, "skip": 125, "flaky": 125}
"""Exit statuses of ``git bisect run``."""
# The step asks the bisect through one pipe and waits at the other. Where the bisect has been
# killed, both end, and git stops walking.
_STEP: Final = """git rev-parse HEAD >"$1" || exit 255
read -r code <"$2" || exit 255
exit "$code"
"""

Probe = Callable[[str], str]
"""Revision to verdict."""


@dataclass(frozen=True)
class Outcome:
    """The end of a walk: the first bad one, or those it is among."""

    first_bad: str | None
    suspects: tuple[str, ...] = ()


def over_list(revs: Sequence[str], probe: Probe) -> Outcome:
    """Search between ``revs[0]``, good, and ``revs[-1]``, bad: at most log2(n) probes and the
    skips."""
    low, high, skips = 0, len(revs) - 1, set[int]()
    while True:
        between = [i for i in range(low + 1, high) if i not in skips]
        if not between:
            break
        at = min(between, key=lambda i: abs(2 * i - low - high))
        verdict = probe(revs[at])
        if verdict == "good":
            low = at
        elif verdict == "bad":
            high = at
        else:
            skips.add(at)
    if high - low == 1:
        return Outcome(revs[high])
    return Outcome(None, tuple(revs[low + 1 : high + 1]))


def commits(home: Path, good: str, bad: str, only: Sequence[str] = ()) -> list[str]:
    """Commits after ``good`` up to ``bad`` that touch ``only``, the newest first."""
    limits = ["--", *only] if only else []
    return git(home, "rev-list", f"{good}..{bad}", *limits).split()


def require_order(home: Path, good: str, bad: str) -> None:
    """Raises ``ValueError`` unless ``good`` is an ancestor of ``bad``."""
    base = git(home, "merge-base", good, bad, check=False)
    if good == bad:
        raise ValueError("good and bad are the same commit; there is nothing to bisect")
    if base == bad:
        raise ValueError("bad is an ancestor of good; were --good and --bad exchanged?")
    if base != good:
        remedy = f"; give their merge base {base[:12]} as --good" if base else ""
        raise ValueError(f"good is no ancestor of bad{remedy}")


def over_git(
    tree: Path, good: str, bad: str, only: Sequence[str], probe: Probe, folder: Path
) -> tuple[Outcome, str]:
    """Let ``git bisect run`` walk the worktree ``tree``; returns the result, and git's own log."""
    script, log = folder / "step.sh", folder / "logs" / "git-bisect.log"
    script.write_text(_STEP)
    log.parent.mkdir(parents=True, exist_ok=True)
    tidy(tree)
    git(tree, "bisect", "start", bad, good, *(["--", *only] if only else []))
    ask_out, ask_in = os.pipe()
    answer_out, answer_in = os.pipe()
    try:
        with log.open("wb") as out:
            walk = subprocess.Popen(
                ["git", "-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false",
                 "bisect", "run", "sh", str(script), f"/dev/fd/{ask_in}", f"/dev/fd/{answer_out}"],
                cwd=tree, env={**clean_environment(), "LC_ALL": "C"}, stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                pass_fds=(ask_in, answer_out),
            )  # fmt: skip
        for end in (ask_in, answer_out):
            os.close(end)
        try:
            with os.fdopen(ask_out, "r") as requests:
                for line in requests:
                    verdict = probe(line.strip())
                    tidy(tree)  # a build must not stand in the way of the next checkout
                    os.write(answer_in, f"{CODES[verdict]}\n".encode())
        finally:
            end_group(walk)
    finally:
        os.close(answer_in)
    git_log = git(tree, "bisect", "log", check=False)
    outcome = _outcome(git_log)
    if outcome is None:
        last = [x for x in log.read_text(errors="replace").splitlines() if x.strip()][-1:]
        raise CannotStart(f"git bisect stopped: {''.join(last)}; see {log}")
    return outcome, git_log


def tidy(tree: Path) -> None:
    """The tree as its commit has it: no build product of another commit decides a verdict."""
    git(tree, "reset", "--hard", "--quiet")
    git(tree, "clean", "-xffdq")


def _outcome(log: str) -> Outcome | None:
    first = re.findall(r"^# first bad commit: \[([0-9a-f]+)\]", log, re.M)
    if first:
        return Outcome(first[-1])
    among = re.findall(r"^# possible first bad commit: \[([0-9a-f]+)\]", log, re.M)
    return Outcome(None, tuple(among)) if among else None
