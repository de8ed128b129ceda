"""The Python files of a backend that this process has imported. Part of ``serve.py``: needs Python
3.10 only.

They lie in the git repository of the backend's file or, without one, in its outermost package or
its folder. Files of site-packages, of a Python inside that folder, and of megamoe are no part.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

OWN = ("megamoe", "__main__")
SITE_FOLDERS = ("site-packages", "dist-packages")
LIMIT = 64 << 20
"""Bytes of the largest file that is hashed."""


class Sources:
    """The modules of the backend that ``spec`` names; none if ``spec`` is no file."""

    def __init__(self, spec: str) -> None:
        name = spec.rpartition(":")[0]
        self.file = Path(name).expanduser().resolve() if name else None
        self.top = self.file and top_of(self.file)
        self.count = 0
        self.folders = functools.cache(
            self._own_folder
        )  # torch has a thousand modules in few folders
        self.paths: set[str] = set()
        """The names of the files that were looked at, as their modules give them."""
        inside = (Path(p).resolve() for p in (sys.prefix, sys.base_prefix, sys.exec_prefix))
        self.pythons = [p for p in inside if self.top in p.parents]
        """Pythons that lie in the repository, such as a virtual environment."""

    def fresh(self) -> dict[str, str]:
        """Path, relative to the folder of the backend's file, to sha256 of each file that was
        imported since the last call."""
        if self.top is None or self.file is None or len(sys.modules) == self.count:
            return {}
        self.count, out = len(sys.modules), {}
        for name, module in list(sys.modules.items()):
            try:
                path = self._fresh(name, module)
                if path is not None and path.stat().st_size <= LIMIT:
                    digest = hashlib.sha256(path.read_bytes()).hexdigest()
                    out[Path(os.path.relpath(path, self.file.parent)).as_posix()] = digest
            except Exception:  # removed since, or a stand-in for a module, which may do anything
                continue
        return out

    def _fresh(self, name: str, module: Any) -> Path | None:
        """The file of a module if it is the backend's and was not looked at before."""
        file = module.__dict__.get("__file__")
        if not isinstance(file, str) or file in self.paths or not file.endswith(".py"):
            return None
        self.paths.add(file)
        if name.partition(".")[0] in OWN or name.startswith("megamoe_worker_"):
            return None
        folder = self.folders(os.path.dirname(file))  # noqa: PTH120
        path = folder and folder / os.path.basename(file)  # noqa: PTH119
        return None if path == self.file else path  # the judge hashes the file that it is named by

    def _own_folder(self, folder: str) -> Path | None:
        """The folder without links, if what lies in it is the backend's."""
        path = Path(os.path.realpath(folder))
        if self.top is None or self.top not in (path, *path.parents):
            return None
        sites = set(SITE_FOLDERS) & set(path.relative_to(self.top).parts)
        inside = any(python in (path, *path.parents) for python in self.pythons)
        return None if sites or inside else path


def top_of(file: Path) -> Path:
    """The folder of all that belongs to ``file``: its repository, its outermost package or its
    folder."""
    for folder in file.parents:
        if folder.name in SITE_FOLDERS:
            break  # the repository that holds this environment is another's
        if (folder / ".git").exists():
            return folder
    top = file.parent
    while (top / "__init__.py").is_file() and (top.parent / "__init__.py").is_file():
        top = top.parent
    return top
