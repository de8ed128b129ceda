"""Requirements: a cached environment that has them, on top of an interpreter's packages."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from megamoe.compare import disk
from megamoe.compare.processes import CannotStart, clean_environment

_SITE: Final = (
    "import site, sysconfig, json, sys; p = sysconfig.get_paths();"
    "print(json.dumps([sys.version, *{p['purelib']: 0, p['platlib']: 0}]))"
)


def virtual_environment(words: Sequence[str], python: str, cache: Path) -> Path:
    """Interpreter of a cached environment with the requirements ``words`` on top of ``python``'s
    packages.

    It sees the packages of ``python``, so that torch is not installed again; the requirements come
    first. An unfinished environment of a killed run is created again.
    """
    try:
        process = subprocess.run(
            [python, "-c", _SITE], capture_output=True, text=True, env=clean_environment()
        )
    except OSError as error:
        raise CannotStart(f"{python} cannot be started: {error.strerror}") from error
    if process.returncode:
        raise CannotStart(f"{python} cannot be started: {process.stderr.strip().splitlines()[-1:]}")
    below = process.stdout.strip()
    key = hashlib.sha256(f"{words}|{python}|{below}".encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower())[:60].strip("-")
    home = cache / "envs" / f"{name}-{key}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        interpreter = home / "bin" / "python"
        if not (home / "complete").exists():
            shutil.rmtree(home, ignore_errors=True)
            try:
                _make_environment(home, words, python, below)
            except BaseException:
                shutil.rmtree(home, ignore_errors=True)
                raise
            (home / "complete").touch()
    return interpreter


def _make_environment(home: Path, words: Sequence[str], python: str, below: str) -> None:
    _pip([python, "-m", "venv", "--without-pip", "--system-site-packages", str(home)], words)
    site = next(iter(home.glob("lib/python*/site-packages")))
    # The base may be a virtual environment itself, whose packages venv would not pass on.
    (site / "megamoe-below.pth").write_text("\n".join(json.loads(below)[1:]) + "\n")
    # Without --quiet: pip says what a conflict is in a line that --quiet drops.
    _pip([python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python",
          str(home / "bin/python"), "install", "--progress-bar", "off", *words], words)  # fmt: skip


def _pip(command: Sequence[str], words: Sequence[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    if process.returncode:
        output = f"{process.stdout}\n{process.stderr}"
        disk.blame(output)
        errors = [x.strip() for x in output.splitlines() if x.strip().lower().startswith("error")]
        last = errors or [x.strip() for x in output.splitlines() if x.strip()][-1:]
        match = re.search(r"from versions: ([^)]*)", output)
        newest = match[1].split(", ")[-8:] if match else []
        few = f"; published for this Python: {', '.join(newest)}" if newest else ""
        text = _conflict(output) or (
            last[-1].removeprefix("ERROR: ") if last else "it said nothing"
        )
        raise CannotStart(f"cannot install {' '.join(words)}: {text}{few}")


def _conflict(output: str) -> str:
    """Who demands what, in pip's words, where requirements exclude each other; "" otherwise."""
    _, _, after = output.partition("The conflict is caused by:")
    demands = [x.strip() for x in after.strip().partition("\n\n")[0].splitlines()]
    return f"requirements exclude each other: {'; '.join(demands)}" if after else ""
