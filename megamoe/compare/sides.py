"""The environment of one side of a comparison: parsed from one word, prepared, never guessed.

A side is a Python interpreter, a virtual environment, a requirement, a git revision, a flake with
one input overridden, or ``this``: the running interpreter with megamoe in its state on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import megamoe
from megamoe.compare import disk

HOME: Final = Path(megamoe.__file__).resolve().parent.parent
"""The folder from which this megamoe is imported; a side without a megamoe of its own uses it."""

KINDS: Final = ("this", "python", "venv", "requirement", "git", "flake")
_REQUIREMENT: Final = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\w,.-]+\])?\s*(===?|~=|!=|<=?|>=?|@).+")
_SITE: Final = (
    "import site, sysconfig, json, sys; p = sysconfig.get_paths();"
    "print(json.dumps([sys.version, *{p['purelib']: 0, p['platlib']: 0}]))"
)
HOW: Final = (
    "write this, a Python interpreter, a virtual environment's directory, a requirement such as "
    "sgl-deep-gemm==0.1.5, a git revision, or flake:INPUT=URL"
)


class CannotStart(ValueError):
    """A side that cannot be created or run: one line with the reason."""


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
        found = _on_disk(text)
        if found:
            return found
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
        raise CannotStart(f"{text!r} is nothing known here; {HOW} ({none})")
    try:
        commit = git(home, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except CannotStart:
        is_repository = git(home, "rev-parse", "--git-dir", check=False)
        where = f"no revision of {home}" if is_repository else f"nothing known in {home}"
        raise CannotStart(f"{text!r} is {where}; {HOW}") from None
    return Side("git", text, commit, home)


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
    found = shutil.which(text) if re.fullmatch(r"python[\d.]*", text) else None
    return Side("python", text, found) if found else None


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
        made = virtual_environment(words, o.python or sys.executable, cache)
        return Ready((str(made),), facts={"requirements": words})
    if side.kind == "flake":
        assert side.repo is not None
        return _flake(side.target, side.repo, o, cache)
    assert tree is not None and side.repo is not None
    return _built(side, tree, o, cache)


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


def _built(side: Side, tree: Path, o: Options, cache: Path) -> Ready:
    if o.build:
        log = cache / "logs" / f"build-{side.target[:12]}.log"
        environment = {**clean_environment(), "MEGAMOE_PYTHON": o.python or sys.executable}
        _build(["sh", "-c", o.build], tree, environment, log, o.build_timeout)
    python = o.python or sys.executable
    if os.sep in python and not Path(python).is_absolute():
        python = str(tree / python)
    if o.extra:
        python = str(virtual_environment(list(o.extra), python, cache))
    return Ready((python,), (str(tree / o.path),), tree, {"commit": side.target})


def _build(
    argv: Sequence[str], cwd: Path, environment: dict[str, str], log: Path, limit: float
) -> None:
    """Run a command that creates a side; :class:`CannotStart` with its last line if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        code = _run_group(argv, cwd, environment, out, limit)
    if code != 0:
        last = last_line(log)
        disk.blame(last, log)
        how = f"took more than {limit:g} s" if code is None else f"exit {code}"
        raise CannotStart(f"does not build ({how}): {last or 'it said nothing'} [{log}]")


def _run_group(
    argv: Sequence[str], cwd: Path, environment: dict[str, str], out: Any, limit: float
) -> int | None:
    """Exit code, or None where it took too long; nothing it started is left behind."""
    # The process inherits the lock of the state: a process that survives a kill still holds it.
    process = subprocess.Popen(
        argv, cwd=cwd, env=environment, stdout=out, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=disk.held(),
    )  # fmt: skip
    return wait_and_end(process, limit)


def wait_and_end(process: subprocess.Popen[Any], limit: float) -> int | None:
    """Exit code, or None where it took more than ``limit`` seconds; then end its whole session."""
    until = time.monotonic() + limit
    in_time = True
    try:
        # Looked at, not taken: until then nobody else can have its number.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            in_time = time.monotonic() < until
            if not in_time:
                break
            time.sleep(0.02)
    finally:
        end_group(process)
    return process.returncode if in_time else None


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill the process and those that it started in its session, unless it was waited for."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean_environment() -> dict[str, str]:
    """The environment without variables that would lead a side, or git, back to this process's
    files."""
    leads = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "PYTHONPATH", "PYTHONHOME",
             "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in leads}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


# --- git --------------------------------------------------------------------------------------


def around() -> Path | None:
    """The checkout that holds the current folder; None where none does."""
    top = git(Path.cwd(), "rev-parse", "--show-toplevel", check=False)
    return Path(top) if top else None


def git(home: Path, *arguments: str, check: bool = True) -> str:
    """The output of git, without hooks. Raises :class:`CannotStart` with git's last line."""
    command = ["git", "-C", str(home), "-c", "core.hooksPath=/dev/null",
               "-c", "advice.detachedHead=false", *arguments]  # fmt: skip
    try:
        done = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise CannotStart("git is not installed; a revision cannot be looked up") from None
    if done.returncode and check:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        disk.blame(done.stderr)
        last = said[-1] if said else "no message"
        raise CannotStart(f"git {arguments[0]} in {home}: {last}")
    return done.stdout.strip()


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


# --- requirements and flakes ------------------------------------------------------------------


def virtual_environment(words: Sequence[str], python: str, cache: Path) -> Path:
    """Interpreter of a cached environment with the requirements ``words`` on top of ``python``'s
    packages.

    It sees the packages of ``python``, so that torch is not installed again; the requirements come
    first. An unfinished environment of a killed run is created again.
    """
    try:
        told = subprocess.run(
            [python, "-c", _SITE], capture_output=True, text=True, env=clean_environment()
        )
    except OSError as error:
        raise CannotStart(f"{python} cannot be started: {error.strerror}") from error
    if told.returncode:
        raise CannotStart(f"{python} cannot be started: {told.stderr.strip().splitlines()[-1:]}")
    below = told.stdout.strip()
    key = hashlib.sha256(f"{words}|{python}|{below}".encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower())[:60].strip("-")
    home = cache / "envs" / f"{name}-{key}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = home / "bin" / "python"
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            try:
                _make_environment(home, words, python, below)
            except BaseException:
                shutil.rmtree(home, ignore_errors=True)
                raise
            (home / "complete").touch()
    return made


def _make_environment(home: Path, words: Sequence[str], python: str, below: str) -> None:
    import json

    _pip([python, "-m", "venv", "--without-pip", "--system-site-packages", str(home)], words)
    site = next(iter(home.glob("lib/python*/site-packages")))
    # The base may be a virtual environment itself, whose packages venv would not pass on.
    (site / "megamoe-below.pth").write_text("\n".join(json.loads(below)[1:]) + "\n")
    # Without --quiet: pip says what a conflict is in a line that --quiet drops.
    _pip([python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python",
          str(home / "bin/python"), "install", "--progress-bar", "off", *words], words)  # fmt: skip


def _pip(command: Sequence[str], words: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    if done.returncode:
        said = f"{done.stdout}\n{done.stderr}"
        disk.blame(said)
        errors = [x.strip() for x in said.splitlines() if x.strip().lower().startswith("error")]
        last = errors or [x.strip() for x in said.splitlines() if x.strip()][-1:]
        known = re.search(r"from versions: ([^)]*)", said)
        newest = known[1].split(", ")[-8:] if known else []
        few = f"; published for this Python: {', '.join(newest)}" if newest else ""
        text = _conflict(said) or (last[-1].removeprefix("ERROR: ") if last else "it said nothing")
        raise CannotStart(f"cannot install {' '.join(words)}: {text}{few}")


def _conflict(said: str) -> str:
    """Who demands what, in pip's words, where requirements exclude each other; "" otherwise."""
    _, _, after = said.partition("The conflict is caused by:")
    demands = [x.strip() for x in after.strip().partition("\n\n")[0].splitlines()]
    return f"requirements exclude each other: {'; '.join(demands)}" if after else ""


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
    _build([*enter, "true"], home, clean_environment(), log, o.build_timeout)
    return Ready((*enter, "python"), (str(home),), home, {"override": target})


def last_line(log: Path) -> str:
    """The last line of a log that begins with ``error:``, else the last that is not empty."""
    lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    errors = [x for x in lines if x.startswith("error:")]
    return (errors or lines)[-1][:300] if lines else ""


def with_target(side: Side, commit: str) -> Side:
    """The same checkout at another commit."""
    return replace(side, target=commit, text=commit[:12])
