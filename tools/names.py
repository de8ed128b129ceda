"""Names that are a participle: `found`, `given`, `said`. A noun says what the thing is.

    python tools/names.py [FILE OR FOLDER...]

Prints ``path:line: name`` of each variable, parameter, function, class and field with such a name.
By default it reads the Python code of the project. Exit status: 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDERS: Final = ("megamoe", "tests", "tools", "ci", "examples", "docs/examples")
PARTICIPLES: Final = frozenset((
    "asked", "begun", "built", "chosen", "counted", "done", "drawn", "found", "given", "gone",
    "got", "held", "kept", "known", "lost", "made", "meant", "moved", "named", "said", "seen",
    "sent", "shown", "taken", "told", "used", "wanted",
))  # fmt: skip
ELSEWHERE: Final = frozenset({("megamoe/commands/doctor.py", "said")})
"""Names that a format demands: the field is a key of the JSON that ``doctor --json`` writes."""


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each binding."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def main(words: list[str]) -> int:
    """Print what is to be mended in ``words``, or in the project; the exit status."""
    paths = [Path(word).resolve() for word in words] or [ROOT / folder for folder in FOLDERS]
    files = [f for path in paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    red = 0
    for file in files:
        place = str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)
        for line, name in sorted(names(ast.parse(file.read_text(), place))):
            if name.strip("_").lower() in PARTICIPLES and (place, name) not in ELSEWHERE:
                print(f"{place}:{line}: {name}: say what it is, by a noun")
                red = 1
    return red


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
