"""The environment of one side of a comparison: parsed from one word, prepared, never guessed.

A side is a Python interpreter, a virtual environment, a requirement, a git revision, a flake with
one input overridden, or ``this``: the running interpreter with megamoe in its state on the disk.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import megamoe
from megamoe.compare.checkout import around, git
from megamoe.compare.processes import CannotStart, build, clean_environment
from megamoe.compare.requirements import virtual_environment
from megamoe.worker.known import BUILTINS, KERNELS

HOME: Final = Path(megamoe.__file__).resolve().parent.parent
"""The folder from which this megamoe is imported; a side without a megamoe of its own uses it."""

KINDS: Final = ("this", "python", "venv", "requirement", "git", "flake")
_REQUIREMENT: Final = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,.-]+\])?\s*(===?|~=|!=|<=?|>=?|@).+")
HOW: Final = (
    "write this, a Python interpreter, a virtual environment's directory, a requirement such as "
    "sgl-deep-gemm==0.1.5, a git revision, or flake:INPUT=URL"
)


@dataclass(frozen=True)
class Side:
    """One environment before its creation."""

    kind: str
    text: str
    """The word of the user."""
    target: str
    """Interpreter, directory, requirements, revision, or INPUT=URL."""
    repo: Path | None = None
    """The checkout of a git revision, or the directory of a flake."""


@dataclass(frozen=True)
class Ready:
    """An environment that can be started."""

    argv: tuple[str, ...]
    """A command that ends in a Python interpreter; the script follows.

    Words before the interpreter enter the environment. Another command can take the interpreter's
    place.
    """
    front: tuple[str, ...] = ()
    """Put first on the import path."""
    cwd: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Information for a person: a commit, versions."""


def parse(text: str, repo: Path | None = None) -> Side:
    """The side that ``text`` names; ``repo`` is the checkout of its revisions, by default the one
    that holds the current folder, or the folder of a flake, by default this megamoe's.

    A name on the disk comes before a revision of the same name. ``git:`` and ``flake:`` state the
    kind. Raises :class:`CannotStart`.
    """
    if text == "this":
        return Side("this", text, sys.executable)
    if text.startswith("flake:"):
        target = text.removeprefix("flake:")
        if not re.fullmatch(r"[\w./-]+=\S+", target):
            raise CannotStart(f"{text}: write flake:INPUT=URL, as flake:deepgemm=github:OWNER/NAME")
        return Side("flake", text, target, (repo or HOME).resolve())
    if not text.startswith("git:"):
        side = _on_disk(text)
        if side:
            return side
        if text.endswith(".safetensors"):
            raise CannotStart(
                f"{text} is a stored problem, and ab compares two sides on cases; `megamoe replay "
                f"{shlex.quote(text)} --backend B` judges each backend on the file"
            )
        words = [word for word in re.split(r"[,\s]+(?![^\[]*\])", text.strip()) if word]
        if words and all(_REQUIREMENT.fullmatch(word) for word in words):
            return Side("requirement", text, " ".join(words))
    revision, home = text.removeprefix("git:"), repo or around()
    if home is None:
        none = f"no git repository holds {Path.cwd()}; change into one, or name it with --repo DIR"
        if text.startswith("git:"):
            raise CannotStart(f"{revision}: {none}")
        raise CannotStart(f"{text!r} is nothing known here; {_how(text)} ({none})")
    try:
        commit = git(home, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except CannotStart:
        is_repository = git(home, "rev-parse", "--git-dir", check=False)
        where = f"no revision of {home}" if is_repository else f"nothing known in {home}"
        raise CannotStart(f"{text!r} is {where}; {_how(text)}") from None
    return Side("git", text, commit, home)


def _how(text: str) -> str:
    """What to write for a side in place of ``text``."""
    if text in {*BUILTINS, *KERNELS}:
        return f"it is a backend: write `megamoe ab this this --left-backend {text} " \
               "--right-backend B` to compare it with B"  # fmt: skip
    return HOW


def _on_disk(text: str) -> Side | None:
    path = Path(text).expanduser()
    for name in ("bin/python", "Scripts/python.exe"):
        if (path / name).exists():
            return Side("venv", text, str((path / name).absolute()))
    if path.is_dir() and (path / "pyvenv.cfg").exists():
        raise CannotStart(f"{text}: a virtual environment without an interpreter; make it again")
    if path.is_file() and os.sep in text:
        if not os.access(path, os.X_OK):
            raise CannotStart(f"{text}: not executable; name a Python interpreter")
        return Side("python", text, str(path.absolute()))
    interpreter = shutil.which(text) if re.fullmatch(r"python[\d.]*", text) else None
    return Side("python", text, interpreter) if interpreter else None


def ready(
    side: Side, cache: Path, tree: Path | None = None, options: Options | None = None
) -> Ready:
    """Make ``side`` so that it can be started: the slow part. Raises :class:`CannotStart`.

    ``tree`` holds a git side's files, checked out by the caller.
    """
    o = options or Options()
    if side.kind == "this":
        return Ready((side.target,), (str(HOME),))
    if side.kind in ("python", "venv"):
        return Ready((side.target,))
    if side.kind == "requirement":
        words = [*side.target.split(), *o.extra]
        python = virtual_environment(words, o.python or sys.executable, cache)
        return Ready((str(python),), facts={"requirements": words})
    if side.kind == "flake":
        assert side.repo is not None
        return _flake(side.target, side.repo, o, cache)
    assert tree is not None and side.repo is not None
    return _git_side(side, tree, o, cache)


@dataclass(frozen=True)
class Options:
    """The creation of sides."""

    python: str | None = None
    """Interpreter of git and requirement sides; a relative path counts from the tree."""
    build: str | None = None
    """Shell command, run in a git side's tree."""
    path: str = "."
    """Folder of the tree that goes on the import path."""
    extra: tuple[str, ...] = ()
    """Further requirements, installed beside each side's own."""
    shell: str = "default"
    """Dev shell of a flake side."""
    build_timeout: float = 3600.0


def _git_side(side: Side, tree: Path, o: Options, cache: Path) -> Ready:
    if o.build:
        log = cache / "logs" / f"build-{side.target[:12]}.log"
        environment = {**clean_environment(), "MEGAMOE_PYTHON": o.python or sys.executable}
        build(["sh", "-c", o.build], tree, environment, log, o.build_timeout)
    python = o.python or sys.executable
    if os.sep in python and not Path(python).is_absolute():
        python = str(tree / python)
    if o.extra:
        python = str(virtual_environment(list(o.extra), python, cache))
    return Ready((python,), (str(tree / o.path),), tree, {"commit": side.target})


def _flake(target: str, home: Path, o: Options, cache: Path) -> Ready:
    """The command that starts Python in the flake's dev shell with one input overridden.

    The shell is built here, so that a failure of the build is not blamed on the program in it.
    """
    if not (home / "flake.nix").is_file():
        raise CannotStart(f"{home} has no flake.nix; name its directory with --repo")
    if shutil.which("nix") is None:
        raise CannotStart("nix is not installed; a flake side needs it")
    name, _, url = target.partition("=")
    enter = ("nix", "--extra-experimental-features", "nix-command flakes", "develop",
             f"{home}#{o.shell}", "--override-input", name, url, "--no-write-lock-file",
             "--command")  # fmt: skip
    log = cache / "logs" / "flake.log"
    build([*enter, "true"], home, clean_environment(), log, o.build_timeout)
    return Ready((*enter, "python"), (str(home),), home, {"override": target})


def with_target(side: Side, commit: str) -> Side:
    """The same checkout at another commit."""
    return replace(side, target=commit, text=commit[:12])
