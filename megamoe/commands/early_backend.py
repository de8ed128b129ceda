"""What is wrong with the value of ``--backend``, and what to type in its place.

The classes of a file are read from its text: nothing is imported. ``worker/offer.py`` says the same
of a file that was imported.
"""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from megamoe.cases.pattern import PROBLEM_SUFFIX
from megamoe.commands import UsageError
from megamoe.suggest import nearest
from megamoe.worker import known
from megamoe.worker.session import METHODS

MAX_NAMES: Final = 6
"""Lines to type that a message has."""
ALL: Final = f"{', '.join(METHODS[:-1])} or {METHODS[-1]}"
JUDGES: Final = "`megamoe replay {} --backend B` judges a backend on it"


def check(spec: str, is_this_python: bool) -> None:
    """``UsageError`` for a file that is not there, or a name that this Python does not know."""
    if spec.endswith(PROBLEM_SUFFIX):
        judges = JUDGES.format(shlex.quote(spec))
        raise UsageError(f"backend {spec}: a stored problem is no backend; {judges}")
    if not known.is_file(spec) and (not is_this_python or spec in ("auto", *known.available())):
        return
    file = known.file_of(spec).removesuffix(":")
    path = Path(file).expanduser().resolve()
    if file and path.is_dir():
        _folder(spec, file, path)
    elif known.is_file(spec):
        if not path.is_file():
            raise UsageError(f"backend {spec}: no Python file at {path}"
                             f"{_suggestion(spec) or '; check the path before the :'}")  # fmt: skip
        if spec.endswith((".py", ":")):
            raise UsageError(f"backend {spec}: {which(file)}")
    else:
        suggestion = _suggestion(spec)
        raise UsageError(
            f"unknown backend {spec!r}{suggestion}" if suggestion else known.unknown(spec)
        )


def _folder(spec: str, file: str, path: Path) -> None:
    """The same for the folder of a package; other folders are no backend."""
    if known.source_of(path).is_file():
        if spec.endswith(":") or ":" not in spec:
            raise UsageError(f"backend {spec}: {which(file)}")
        return
    lines = [
        line for one in sorted(path.glob("*.py")) for line in specs(str(Path(file) / one.name))
    ]
    example = f", as {_line(lines)}" if lines else ", as FOLDER/FILE.py:CLASS"
    raise UsageError(f"backend {spec}: {path} is a folder without __init__.py, so no package; name "
                     f"a file in it{example}")  # fmt: skip


def which(file: str) -> str:
    """What to type for one class of a file, or of a package's folder."""
    lines = specs(file)
    if not lines:
        return f"say which object, as {file}:CLASS; its text shows no class with {ALL}"
    return f"name {'its' if len(lines) == 1 else 'a'} class: {_line(lines)}"


def _line(lines: list[str]) -> str:
    more = f" (or one of {len(lines) - MAX_NAMES} more)" if len(lines) > MAX_NAMES else ""
    return " or ".join(f"--backend {shlex.quote(one)}" for one in lines[:MAX_NAMES]) + more


def specs(file: str) -> list[str]:
    """The values of ``--backend`` that a file, or a package's folder, has."""
    return [f"{file}:{name}" for name in classes(known.source_of(Path(file).expanduser()))]


def classes(path: Path) -> list[str]:
    """The classes of a file that could be a backend, and those that it imports from files beside
    it, in their order."""
    return [name for name, is_backend in _names(path, ()).items() if is_backend]


def _names(path: Path, trail: tuple[Path, ...]) -> dict[str, bool]:
    """The classes that a file has or imports, and whether each could be a backend; ``trail``: the
    files that are being read."""
    names = dict[str, bool]()
    for part in _statements(path):
        if isinstance(part, ast.ImportFrom):
            source = _source(part, path)
            beside = _names(source, (*trail, path)) if source and source not in trail else {}
            for one in part.names:
                if one.name in beside:
                    names[one.asname or one.name] = beside[one.name]
        elif isinstance(part, ast.ClassDef):
            own = {name for statement in part.body for name in _members(statement)} & {*METHODS}
            bases = (names.get(base.id, False) for base in part.bases if isinstance(base, ast.Name))
            names[part.name] = bool(own) or any(bases)
    return names


def _statements(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []


def _source(part: ast.ImportFrom, path: Path) -> Path | None:
    """The file of a ``from MODULE import``, if it lies beside ``path`` or beside its package."""
    words = (part.module or "").split(".") if part.module else []
    around = path.parents[part.level - 1] if part.level else path.parent
    homes = [around] if part.level else [path.parent, path.parent.parent]
    for home in homes:
        folder = home.joinpath(*words)
        for file in (folder.with_suffix(".py"), folder / "__init__.py"):
            if words and file.is_file():
                return file
    return None


def _members(part: ast.stmt) -> Iterator[str]:
    """The names that a statement of a class binds: of a method, or left of a ``=``."""
    if isinstance(part, ast.Assign):
        yield from (target.id for target in part.targets if isinstance(target, ast.Name))
    elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
        yield part.name


def beside(path: Path) -> str:
    """``; did you mean FILE?``: the file of the same folder and ending that has the nearest name;
    empty where none is like it."""
    ending = path.suffix or ".py"
    stems = [one.stem for one in path.parent.glob(f"*{ending}")] if path.parent.is_dir() else []
    name = nearest(path.stem, sorted(stems))
    return f"; did you mean {path.with_name(name + ending)}?" if name else ""


def _suggestion(spec: str) -> str:
    """``; did you mean FILE.py:CLASS?`` for a file without its ending, or with one letter wrong."""
    file, _, name = spec.rpartition(":")
    file, name = (file, name) if file else (name, "")
    path = Path(file)
    for whole in (Path(f"{file}.py"), Path(f"{file.replace('.', '/')}.py")):
        if whole.expanduser().is_file():
            names = classes(whole.expanduser())
            if len(names) > 1 and not nearest(name, names):
                return f": {which(str(whole))}"
            return f"; did you mean {whole}:{nearest(name, names) or name or (*names, 'CLASS')[0]}?"
    return beside(path) if path.suffix == ".py" else ""
