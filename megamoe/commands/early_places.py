"""Places that a verb is to write to: a bad one is refused before the verb works for minutes.

Defaults of a verb's parser say more of its arguments: ``folders`` names those that are a folder,
``new`` those that may not be there yet, ``endings`` how a file must end.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe.cases.stored_names import new_file
from megamoe.commands import UsageError

OUTPUTS: Final = ("json", "junit", "out", "page", "plot", "archive")
"""Arguments that name a file to write."""


def check(options: Mapping[str, Any]) -> None:
    """``ValueError`` of one line for a place where nothing can be written."""
    folders, new = options.get("folders", ()), options.get("new", ())
    endings: Mapping[str, str] = options.get("endings", {})
    names = dict[Path, str]()
    for name in (*OUTPUTS, *folders):
        value = options.get(name)
        if not isinstance(value, str) or value == "-":
            continue
        path = Path(value)
        if name in folders:
            _folder(path)
            continue
        _file(path, endings.get(name, ""))
        if name in new:
            new_file(value)
        first = names.setdefault(path.resolve(), name)
        if first != name:
            raise UsageError(f"--{first} and --{name} name the same file {path}; name two")


def _file(path: Path, ending: str) -> None:
    """A file in a folder that is there: no verb creates folders on the way to a file."""
    if path.is_dir():
        example = f", such as {path / f'NAME{ending}'}" if ending else ""
        raise UsageError(f"{path} is a directory; name a file{example}")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file, such as a device; name a file")
    folder = path.parent
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{path}: {folder} is a file and no folder; name a file in a folder")
    if not folder.is_dir():
        raise UsageError(f"{path}: there is no folder {folder}; create it first")
    if ending and not path.name.endswith(ending):
        raise UsageError(f"{path}: name a file that ends in {ending}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: you may not write in the folder {folder}")


def _folder(path: Path) -> None:
    """A folder that is there, or that can be created with those around it."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        place = "" if there == path else f"{path}: "
        raise UsageError(f"{place}{there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"{path}: you may not write in the folder {there}")
