"""What is wrong with a command line, before anything is imported that takes seconds.

Each check has the words of the place that would refuse the value later. That place keeps its own
check, since it has other callers. A verb's default ``combination`` is a function that refuses
options that do not go together.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from megamoe.cases import load_entries, shards
from megamoe.cases.pattern import PROBLEM_SUFFIX as PROBLEM
from megamoe.cases.pattern import matching, one_of
from megamoe.commands import UsageError, early_backend, early_places
from megamoe.commands.parser import KERNEL
from megamoe.commands.parsers.names import DIMENSIONS
from megamoe.spec.contract import contract
from megamoe.suggest import hint
from megamoe.worker.choice import AUTO

PROBLEM_WRITERS: Final = (
    "`megamoe reduce`, `megamoe fuzz` and `megamoe capture` write stored problems"
)
READ: Final = ("file", "result", "reports", "failed", "actual")
"""Arguments that name a file to read. A verb's default ``reads`` names further ones of its own."""
_REPORT_WRITER: Final = "`megamoe check --json FILE` writes one"
WRITERS: Final = {
    "file": PROBLEM_WRITERS,
    "result": _REPORT_WRITER,
    "reports": _REPORT_WRITER,
    "failed": _REPORT_WRITER,
}
"""What writes the file that an argument names."""
REPORTS: Final = ("result", "reports", "failed")
"""Arguments that name a report."""


def check(a: argparse.Namespace) -> None:
    """``ValueError`` of one line for a name, a file or a pattern that nothing has."""
    options = {name: value for name, value in vars(a).items() if value is not None}
    early_places.check(options)
    if "combination" in options:
        options["combination"](a)
    for name in options.get("stored", ()):
        _no_problem(a, str(options[name]))
    if KERNEL.search(str(options.get("actual", ""))):
        raise UsageError(
            f"--actual takes a file with an output; a kernel stands after --backend: "
            f"`megamoe explain {a.subject} --backend {options['actual']}`"
        )
    for name in (*READ, *options.get("reads", ())):
        for path in _list(options.get(name)):
            if name in REPORTS and path.endswith(PROBLEM):
                raise UsageError(
                    f"{path} is the name of a stored problem, and a report is needed here; "
                    f"{early_backend.JUDGES.format(shlex.quote(path))}"
                )
            _check_file(Path(path), WRITERS.get(name, ""))
    python = options.get("interpreter")
    if python is not None and shutil.which(python) is None:
        raise UsageError(f"--python {python}: no program; name a Python interpreter")
    if options.get("contract", AUTO) != AUTO:
        contract(options["contract"])
    if "shard" in options:
        shards.parse(options["shard"])
    if options.get("backend_is") == "here" and "backend" in options:
        early_backend.check(options["backend"], python is None)
    if options.get("dimension", DIMENSIONS[0]) not in DIMENSIONS:
        raise UsageError(unknown_dimension(options["dimension"], DIMENSIONS))
    for name in options.get("stored", ()):
        _check_problem(Path(options[name]))
    if "case_is" in options:
        _case(a, options)


def unknown_dimension(name: str, names: Sequence[str]) -> str:
    """The message for a name that no dimension of ``coverage`` has."""
    listing = f"; known: {', '.join(names)}"
    return f"unknown dimension {name!r}{hint(name, names) or listing}"


def _check_file(path: Path, writer: str) -> None:
    """``UsageError`` where a file to read is not there, is a directory, or is empty."""
    if not path.exists():
        raise UsageError(_no_file(path, writer))
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file")
    if path.suffix != ".py" and path.is_file() and not path.stat().st_size:
        raise UsageError(f"{path} is empty{f'; {writer}' if writer else ''}")


def _no_file(path: Path, writer: str) -> str:
    """The message for a file that is not there: the file beside it that was meant, or what writes
    such a file."""
    if not path.parent.is_dir():
        return f"{path}: no such file, and no folder {path.parent}"
    suggestion = early_backend.beside(path)
    return f"{path}: no such file{suggestion or (f'; {writer}' if writer else '')}"


def _list(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)] * bool(value)


def _no_problem(a: argparse.Namespace, name: str) -> None:
    """A case or a backend where the file of a stored problem is meant."""
    if Path(name).exists() or name.endswith(".safetensors"):
        return
    root = Path(a.golden) if getattr(a, "golden", None) else None
    ids = {one.id for one in load_entries(root) if name in (one.id, one.name)}
    if ids:
        raise UsageError(
            f"{name} is a case, and replay takes the file of a stored problem; "
            f"`megamoe check --backend {getattr(a, 'backend', None) or 'B'} --case {name}` judges "
            "the case"
        )


def _check_problem(path: Path) -> None:
    """A file that cannot be safetensors: this format begins with the length of a JSON object."""
    _check_file(path, PROBLEM_WRITERS)
    if not path.is_file():  # a fifo, say, which must not be read twice
        return
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[8:] != b"{":
        raise UsageError(
            f"{path} is no stored problem, since it is no safetensors file; {PROBLEM_WRITERS}"
        )


def _case(a: argparse.Namespace, options: dict[str, object]) -> None:
    root = Path(a.golden) if a.golden else None
    case = options.get("subject" if options["case_is"] == "subject" else "case")
    if case is None:
        if "needs_case" in options:
            raise UsageError("name a case: its id, its name or a pattern; `megamoe list` shows all")
        return
    takes_file = options["case_is"] == "subject" or "takes_file" in options
    if takes_file and str(case).endswith(PROBLEM):
        _check_problem(Path(str(case)))
        return
    if str(case).endswith(".json") and Path(str(case)).is_file():
        raise UsageError(f"{case} is no case; if it is a report of `check --json`, `megamoe report "
                         f"{shlex.quote(str(case))}` shows its cases")  # fmt: skip
    entries = load_entries(root)
    if options["case_is"] == "pattern":
        matching(entries, str(case))
        return
    file = Path(f"{case}{PROBLEM}")
    if file.is_file() and not any(str(case) in (one.id, one.name) for one in entries):
        raise UsageError(f"unknown case: nothing has the id or name {str(case)!r}; did you mean "
                         f"the file {file}?")  # fmt: skip
    one_of(entries, str(case))
