"""Results of ``megamoe check --json`` over published kernels, and their provenance.

Anybody may add a file to ``docs/kernels/results/``. So a file is refused, with one line, if it does
not say which kernel, which versions, which machine and which command gave it.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megamoe import schema
from megamoe.files import REPORT_LIMIT, read_json
from megamoe.judge import STATUSES
from megamoe.kernels.registry import Kernel, kernels
from megamoe.printable import printable

_WORD: Final = 300
"""Characters of one word of provenance."""
CASE: Final = schema.Object({"id": str, "kind": str, "status": schema.OneOf(STATUSES)})
FORM: Final = schema.Object(
    {
        "backend": str, "contract": str, "device": str, "cases": schema.Items(CASE),
        "versions": schema.Each(str), "machine": dict, "options": str, "tier": str,
        "kind": schema.OrNull(str), "case": schema.OrNull(str),
    },
    {"environment": schema.Each(str)},
)  # fmt: skip
"""``options`` are those of the command line that decide a verdict. ``environment``: variables that
were set for the run and that its adapter did not put into the fingerprint; a person adds them."""


@dataclass(frozen=True)
class Result:
    """One result file of one kernel."""

    file: str
    """Its name, without a folder."""
    kernel: Kernel
    contract: str
    device: str
    command: str
    """The command that gives it again."""
    machine: str
    """GPU and driver, or the processor."""
    versions: tuple[tuple[str, str], ...]
    cases: tuple[Mapping[str, Any], ...]

    @property
    def counts(self) -> dict[str, int]:
        """Status to number of cases, in the order of the statuses."""
        counter = Counter(case["status"] for case in self.cases)
        return {status: counter.get(status, 0) for status in STATUSES}

    @property
    def kinds(self) -> list[str]:
        """The kinds of its cases, sorted."""
        return sorted({case["kind"] for case in self.cases})

    def of_kind(self, kind: str) -> Result:
        """The same with the cases of one kind alone."""
        few = tuple(case for case in self.cases if case["kind"] == kind)
        return Result(
            self.file, self.kernel, self.contract, self.device, self.command, self.machine,
            self.versions, few,
        )  # fmt: skip


def verdict(counts: Mapping[str, int]) -> str:
    """``red`` for a fail or an error, ``green`` if something passed and nothing failed, ``grey``
    where nothing was judged. A skip is no pass."""
    if counts.get("fail", 0) or counts.get("error", 0):
        return "red"
    return "green" if counts.get("pass", 0) and not counts.get("not-run", 0) else "grey"


def summary(counts: Mapping[str, int]) -> str:
    """``12 pass, 1 fail``; every status that occurs."""
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "no case"


def read(path: Path) -> Result:
    """The result in ``path``; ``ValueError`` of one line where it lacks something."""
    try:
        data = read_json(path, REPORT_LIMIT)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    wrong = schema.fault(data, FORM)
    if wrong:
        raise ValueError(
            f"{path}: {wrong}; a result needs versions, machine and options beside its cases, as "
            "`megamoe check --json` writes them"
        )
    by_name = kernels()
    name = data["backend"]
    if name not in by_name:
        raise ValueError(f"{path}: {_word(name)!r} is no kernel of `megamoe kernels`")
    machine = _machine(data["machine"])
    lacking = [] if machine else ["machine"]
    lacking += [] if data["contract"].strip() else ["contract"]
    lacking += [] if data["versions"].get("megamoe") else ["versions of megamoe"]
    if not any(_has_version(data, need.package) for need in by_name[name].needs):
        lacking.append(f"the version of {by_name[name].needs[0].package}")
    if lacking:
        raise ValueError(f"{path}: the provenance lacks {', '.join(lacking)}; it is refused")
    versions = dict(data["versions"])
    if isinstance(data.get("fingerprint"), dict):
        versions["judged"] = str(data["fingerprint"].get("options", ""))
    return Result(
        path.name, by_name[name], _word(data["contract"]), _word(data["device"]),
        _command(data), machine,
        tuple((_word(n), _word(v)) for n, v in sorted(versions.items()) if v),
        tuple(_case(case) for case in sorted(data["cases"], key=lambda c: str(c["id"]))),
    )  # fmt: skip


def read_all(paths: Sequence[Path]) -> list[Result]:
    """All of them, by kernel in the order of the registry, then by name of file.

    ``ValueError`` where two files have one name: the site could not tell them apart.
    """
    results = [read(path) for path in paths]
    twice = [name for name, n in Counter(one.file for one in results).items() if n > 1]
    if twice:
        raise ValueError(f"two results are named {twice[0]}; give each a name of its own")
    order = list(kernels())
    return sorted(results, key=lambda one: (order.index(one.kernel.name), one.file))


def table(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """Rows of kernel, contract, kind, verdict, counts, versions, machine and file.

    A kind that the kernel does not provide at all has no row.
    """
    return [
        (
            one.kernel.name, one.contract, kind, verdict(part.counts), summary(part.counts),
            judged_version(one), one.machine, one.file,
        )
        for one in results for kind in one.kinds for part in (one.of_kind(kind),)
        if {name for name, n in part.counts.items() if n} != {"not-provided"}
    ]  # fmt: skip


COLUMNS: Final = (
    "kernel", "contract", "kind", "verdict", "cases", "version", "machine", "result",
)  # fmt: skip


def markdown(results: Sequence[Result]) -> str:
    """The table as Markdown, and below it the command of each file."""
    if not results:
        return "No result file yet: no published kernel has been judged.\n"
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *table(results)]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    commands = [f"    {one.command}    # {one.file}" for one in results]
    return "\n".join([*lines, "", *commands]) + "\n"


def judged_version(one: Result) -> str:
    """The package that was judged, with its version, and the options of its build."""
    versions = dict(one.versions)
    build = versions.get("judged", "")
    names = [name for need in one.kernel.needs for name in (need.package, *need.other)]
    if any(name in build for name in names):
        return build
    packages = [f"{name} {versions[name]}" for name in names if name in versions][:1]
    return ", ".join([*packages, *([build] if build else [])])


def _has_version(data: Mapping[str, Any], package: str) -> bool:
    """Whether the versions or the backend's fingerprint name the package."""
    build = data.get("fingerprint")
    text = f"{build.get('sources')} {build.get('options')}" if isinstance(build, dict) else ""
    return package in data["versions"] or f"{package} " in f"{text} "


def _command(data: Mapping[str, Any]) -> str:
    """The command line of the run, from what the file says of its selection and options.

    A wheel has no name here, since its place is another on each machine. An adapter whose build
    a variable decides puts ``NAME=value`` into the options of its fingerprint.
    """
    selection = [("--kind", data["kind"]), ("--case", data["case"])]
    selection += [("--tier", data["tier"])] if data["case"] is None else []
    build = data.get("fingerprint")
    options = str(build.get("options")) if isinstance(build, dict) else ""
    wheels = [need.wheel for need in kernels()[data["backend"]].needs if need.wheel]
    before = [f"{name}=FILE.whl" for name in wheels if "(wheel)" in options]
    before += ["TRITON_INTERPRET=1"] if "interpreter" in options else []
    before += [word for word in options.split() if re.match(r"[A-Z][A-Z0-9_]*=", word)]
    before += [f"{name}={value}" for name, value in data.get("environment", {}).items()]
    words = [*before, "megamoe", "check", "--backend", data["backend"]]
    words += [word for name, value in selection if value for word in (name, value)]
    return _word(shlex.join(words) + data["options"])


def _machine(data: Mapping[str, Any]) -> str:
    gpu, driver = data.get("gpu"), data.get("driver")
    if isinstance(gpu, str) and gpu:
        return _word(f"{gpu}, driver {driver}" if driver else gpu)
    processor = data.get("processor")
    return _word(f"CPU {processor}") if isinstance(processor, str) and processor else ""


def _case(case: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: _word(case[name]) for name in ("id", "kind", "status")}
    reason = case.get("reason")
    return texts | {"reason": printable(str(reason or ""))[:2000]}


def _word(value: Any) -> str:
    return printable(str(value))[:_WORD]


__all__ = ["COLUMNS", "Result", "markdown", "read", "read_all", "summary", "table", "verdict"]
