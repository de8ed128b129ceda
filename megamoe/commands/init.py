"""``megamoe init``: write a correct kernel to start from, a test of it and a workflow."""

from __future__ import annotations

import argparse
import shlex
from importlib import resources
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from megamoe.compare.checkout import git
from megamoe.compare.sides import HOME

TARGETS: Final = {
    "kernel.py": "kernel.py",
    "test_shapes.py": "test_shapes.py",
    "workflow.yml": ".github/workflows/megamoe.yml",
}
"""File of ``templates/`` -> where it goes, under DIR."""
FORM: Final = "git+https://HOST/OWNER/megamoe@COMMIT"


def run(a: argparse.Namespace) -> int:
    """Write all files or none, and say what to do next. ``ValueError`` where one is there."""
    folder = Path(a.dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    targets = {name: folder / place for name, place in TARGETS.items()}
    for path in targets.values():
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} is there already; nothing was written. Move it, or name "
                             "another folder")  # fmt: skip
    templates = resources.files("megamoe.commands").joinpath("templates")
    for name, path in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:  # never over a file that came in the meantime
            file.write(templates.joinpath(name).read_bytes())
    kernel = targets["kernel.py"]
    print(f"wrote {kernel}: a correct kernel in plain torch. Replace it piece by piece.")
    print(f"wrote {targets['test_shapes.py']}: pytest judges the kernel on the shapes in it. Put "
          "yours there.")  # fmt: skip
    print(f"wrote {targets['workflow.yml']}: with it, GitHub judges the kernel after each push.")
    print("  GitHub installs megamoe from the address in the variable MEGAMOE of your repository.")
    print("  Set it once (Settings, Secrets and variables, Actions, Variables) to:")
    print(f"    {source()}")
    if source() == FORM:
        print("  (where your copy of megamoe lies, and what `git rev-parse HEAD` says there)")
    print(f"next: megamoe check --backend {shlex.quote(f'{kernel}:Kernel')}")
    return 0


def source(home: Path = HOME) -> str:
    """What pip installs this megamoe from: the commit of its checkout, at the address from which
    that was cloned; a form to fill in where that is no https address."""
    if (home / ".git").exists():
        address = urlsplit(git(home, "remote", "get-url", "origin", check=False))
        commit = git(home, "rev-parse", "HEAD", check=False)
        if address.scheme == "https" and address.hostname and commit:  # a name or a key is left out
            return f"git+https://{address.hostname}{address.path}@{commit}"
    return FORM
