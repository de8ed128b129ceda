"""The file or package of a backend: in the trees of revisions, or outside of them."""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from megamoe.compare.checkout import git
from megamoe.compare.job import Job
from megamoe.compare.sides import Side, with_target
from megamoe.worker.known import source_of

PACKAGE: Final = "__init__.py"


def locate(spec: str, front: Iterable[str]) -> str:
    """``spec`` with the whole path of its file or package: in a folder of ``front``, the import
    path of a side, if it is there, else from the current folder. A name stays as it is."""
    name, _, attribute = spec.rpartition(":")
    if not name:
        return spec
    for folder in (*front, os.getcwd()):  # noqa: PTH109
        path = Path(folder) / Path(name).expanduser()
        if source_of(path).is_file():
            return f"{path}:{attribute}"
    return f"{Path(name).expanduser().absolute()}:{attribute}"


def archive(home: Path, job: Job, report: Mapping[str, Any]) -> tuple[str, str]:
    """``backend`` and ``copy`` in the ``cases.json`` of an archive, as ``replay.py`` takes them.

    ``backend`` is the spec, and its path counts from ``--path``: each revision has a file of its
    own. ``copy`` is the spec of a copy in the archive, for a file that lies outside of the trees,
    and empty if both trees hold the file. If no tree can hold it, ``backend`` is the copy too.
    """
    spec = job.test.backend
    name, _, attribute = spec.rpartition(":")
    path, sides = Path(name).expanduser(), sides_of(job, report)
    leaves = path.is_absolute() or path.parts[:1] == ("..",)
    by_tree = not leaves and any(side.kind == "git" for side in sides)
    is_in_trees = by_tree and all(_holds(side, path, job.test.options.path) for side in sides)
    if not name or is_in_trees or not source_of(path).is_file():
        return spec, ""
    # A folder that holds nothing else: the archive has files of its own that may have this name.
    copy = f"backend/{_copy(path.resolve(), home / 'backend')}:{attribute}"
    return (spec if by_tree else copy), copy


def sides_of(job: Job, report: Mapping[str, Any]) -> tuple[Side, Side]:
    """The last good side and the first bad one."""
    texts, where = (report["last_good"], report["first_bad"]), job.where
    by_text = {side.text: side for side in where.sides}
    good, bad = (by_text[t] if by_text else with_target(where.good, t) for t in texts)
    return good, bad


def _holds(side: Side, path: Path, sub: str) -> bool:
    """Whether the commit of a git side has the file or package at ``sub/path``."""
    whole = posixpath.normpath(posixpath.join(sub, path.as_posix()))
    if side.kind != "git" or side.repo is None or whole.startswith(("../", "/")):
        return False
    kinds = [git(side.repo, "cat-file", "-t", f"{side.target}:{name}", check=False)
             for name in (whole, posixpath.normpath(f"{whole}/{PACKAGE}"))]  # fmt: skip
    return "blob" in kinds


def _copy(path: Path, home: Path) -> str:
    """Copy a file, or the whole folder of a package, into ``home``; its path there."""
    home.mkdir()
    if source_of(path) == path and path.name != PACKAGE:
        shutil.copyfile(path, home / path.name)
        return path.name
    package = path.parent if path.name == PACKAGE else path
    shutil.copytree(
        package, home / package.name, ignore_dangling_symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__", ".git"),
    )  # fmt: skip
    return path.relative_to(package.parent).as_posix()
