"""Merging the reports of shards: the proof that together they are one judgement.

What the reports judged is compared with the selection itself, and the reports with one another: in
:data:`DECIDES` they are equal, in :data:`MAY_DIFFER` they need not be, and a key that neither names
must be equal too.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megamoe import schema
from megamoe.cases import KINDS, TIERS, Case
from megamoe.cases.shards import ShardError
from megamoe.files import REPORT_LIMIT, read_json
from megamoe.judge.verdict import STATUSES
from megamoe.printable import all_printable, printable, quantity

Report = Mapping[str, Any]
"""What ``megamoe check --json`` writes."""

DECIDES: Final[Mapping[str, str]] = {
    "backend": "what was judged, as it was named",
    "name": "what the backend calls itself",
    "callables": "what it offers, and so which cases are `not-provided`",
    "batch_invariant": "whether the laws of batch invariance were judged",
    "accumulator": "how wide the interval is that an output must lie in",
    "fingerprint": "the kernel's sources and options, where the backend gives them",
    "file_sha256": "the file that `--backend` names",
    "modules_sha256": "the Python files of its repository or folder that the kernel imported; "
    "those that two reports both have are compared",
    "device": "where it ran",
    "recorded.machine_class": "GPU model and capability, or the processor: they decide bits",
    "recorded.file": "which recorded bits its own were compared with",
    "goldens.manifest_sha256": "the goldens",
    "contract": "the rules that the goldens were derived by",
    "tier": "part of the selection",
    "kind": "part of the selection",
    "case": "part of the selection",
    "versions.megamoe": "the oracle and the judge",
    "versions.torch": "turns inputs and outputs into bits",
    "versions.numpy": "computes what the judge expects where a golden is kept as digests",
    "versions.python": "its first two numbers; the third changes no arithmetic",
    "versions.triton": "compiles kernels",
    "versions.deep_gemm": "kernels that a backend calls",
    "versions.sgl-deep-gemm": "kernels that a backend calls",
    "versions.vllm": "kernels that a backend calls",
    "versions.sglang": "kernels that a backend calls",
    "worker.python": "as `versions.python`, of the process that ran the backend",
    "worker.torch": "computes the backend's bits, or calls what does",
    "worker.numpy": "computes in backends that use it",
    "worker.triton": "compiles the backend's kernels",
    "worker.device": "where the backend ran",
    "worker.processor": "computes the backend's bits on a CPU",
    "worker.gpu": "computes the backend's bits",
    "worker.capability": "which kernels were compiled, and run",
    "worker.cuda": "the libraries that the backend's torch calls",
}
"""Key of a report -> why it decides a result: reports that differ in it are not merged."""

MAY_DIFFER: Final[Mapping[str, str]] = {
    "cases": "each shard has its own",
    "contract_why": "`contract` itself must be the same; where a kernel lies may differ",
    "predicted": "whether a line explains what is unlike a prediction; no verdict follows from it",
    "counts": "they follow from the cases, and are counted again",
    "shard": "each has its own; `merge` compares the cases with the selection",
    "shards": "as `shard`, in a report that is itself a merge",
    "seconds": "hosts differ in speed",
    "machine": "cores and system decide no bit; what does is in `recorded.machine_class`",
    "options": "how to run one case again on that host; its path of golden/ may be another",
    "versions.safetensors": "it stores and loads bytes",
}
"""Key of a report -> why reports that differ in it are one judgement all the same."""

_NOT_ALWAYS: Final = ("file_sha256", "modules_sha256", "name", "callables", "batch_invariant",
                      "worker", "versions.triton", "versions.deep_gemm", "versions.sgl-deep-gemm",
                      "versions.vllm", "versions.sglang")  # fmt: skip
"""What all reports may lack: what earlier versions did not write, and what is not installed."""
_PARTS: Final = {key.partition(".")[0] for key in (*DECIDES, *MAY_DIFFER) if "." in key}
_TWO_NUMBERS: Final = ("versions.python", "worker.python")
MODULES: Final = "modules_sha256"
"""Its files are compared one by one: which of them a shard loads may depend on its cases."""
NOT_RUN: Final = "not-run"
"""Status of a case that a run did not come to before it was stopped."""

_CASE: Final = schema.Object(
    {"id": str, "kind": schema.OneOf(KINDS), "status": str, "seconds": schema.seconds},
    {"reason": str, "how": schema.Items(str), "recorded": str, "predicted": str, "unlike": str,
     "process": schema.natural, "calls": schema.Items(schema.natural)},
)  # fmt: skip
OF_A_SHARD: Final = ("cases", "counts", "shard", "shards", "next")
"""Keys of a report that a merge computes anew."""

_REPORT: Final = schema.Object(
    {"cases": schema.Items(_CASE)},
    {
        "backend": str, "name": str, "callables": schema.Items(str), "accumulator": str,
        "batch_invariant": bool,
        "fingerprint": schema.OrNull(schema.Each(str)), "file_sha256": str,
        "modules_sha256": schema.Each(str), "device": str,
        "contract": str, "contract_why": str,
        "recorded": schema.Object({}, {"machine_class": str, "file": schema.OrNull(str)}),
        "goldens": schema.Object({}, {"manifest_sha256": str}),
        "tier": schema.OneOf(TIERS), "kind": schema.OrNull(schema.OneOf(KINDS)),
        "case": schema.OrNull(str), "shard": schema.OrNull(str), "versions": schema.Each(str),
        "worker": dict, "machine": dict, "counts": schema.Each(schema.natural),
        "seconds": schema.seconds, "shards": schema.Items(schema.OrNull(str)),
        "next": schema.Items(str),
    },
)  # fmt: skip


def read_report(path: str | Path) -> dict[str, Any]:
    """A report of ``megamoe check --json`` or ``merge --json``; ``ValueError`` of one line if not.

    What it lacks besides ``cases`` is the business of whoever needs it.
    """
    try:
        data = all_printable(read_json(Path(path), REPORT_LIMIT))
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read as a JSON report: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("cases"), list):
        raise ShardError(f"{path} is no report of `megamoe check --json`")
    _check(data, str(path))
    return data


def _check(report: Report, name: str) -> None:
    """Types, statuses and ids of what is there; :class:`ShardError` in one line."""
    if fault := schema.fault(report, _REPORT):
        raise ShardError(f"{name}: {fault}; write it again with `megamoe check --json`")
    for case in report["cases"]:
        case_id = schema.plain(case["id"])
        if not case["id"].startswith(f"{case['kind']}/"):
            raise ShardError(f"{name}: case {case_id} has kind {case['kind']}; judge it again")
        if case["status"] not in (*STATUSES, NOT_RUN):
            raise ShardError(
                f"{name}: case {case_id} has status {schema.preview(case['status'])}, known: "
                f"{', '.join(STATUSES)}; merge with the version that wrote it"
            )
        if case["status"] != "pass" and "reason" not in case:
            raise ShardError(f"{name}: case {case_id} has no reason; judge it again")


def merge(
    reports: Sequence[Report], selection: Sequence[Case], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """One report of all shards, each case of ``selection`` once; ``names`` are of their files.

    Raises :class:`ShardError` for a report of another form or of a run that was stopped, where
    reports differ in what decides a result, and naming cases that are lost, doubled or foreign.
    """
    if not reports:
        raise ShardError("no reports to merge; name the JSON files of all shards")
    names = names or [f"report {at}" for at in range(1, len(reports) + 1)]
    for report, name in zip(reports, names, strict=True):
        _check(report, name)
        _check_end(report, name)
        _complete(report, name)
    for report, name in zip(reports[1:], names[1:], strict=True):
        _alike(reports[0], report, names[0], name)
    modules = _modules(reports, names)
    cases = _each_once(reports, selection)
    counts = Counter(c["status"] for c in cases)
    return {
        **{k: v for k, v in reports[0].items() if k not in OF_A_SHARD},
        **modules,
        "seconds": sum(float(r["seconds"]) for r in reports),
        "counts": {status: counts[status] for status in STATUSES},
        "shards": [part for r in reports for part in r.get("shards", [r.get("shard")])],
        "cases": cases,
    }


def _complete(report: Report, name: str) -> None:
    """Each key that decides, and counts that are those of the cases."""
    for key in ("seconds", "counts", *DECIDES):
        top, _, part = key.partition(".")
        if key in _NOT_ALWAYS or top in _NOT_ALWAYS:
            continue
        if top not in report or (part and part not in report[top]):
            lacking = key if top in report else top
            raise ShardError(f"{name} lacks `{lacking}`; judge it again with this version")
    counts = Counter(case["status"] for case in report["cases"])
    for status in sorted({*counts, *report["counts"]}):
        count = report["counts"].get(status, 0)
        if count != counts[status]:
            raise ShardError(
                f"{name} counts {count} x {schema.plain(status)}, and holds "
                f"{counts[status]} such cases; it was edited or cut: judge it again"
            )


def _check_end(report: Report, name: str) -> None:
    rest = [case["id"] for case in report["cases"] if case["status"] == NOT_RUN]
    if not rest and not report.get("stopped"):
        return
    shard = report.get("shard")
    again = f"run shard {schema.plain(shard)} again" if shard else "run it again"
    loss = (
        f" before {quantity(len(rest), 'case')}, {schema.plain(rest[0])} among them" if rest else ""
    )
    raise ShardError(f"{name}: its run was stopped{loss}; {again}")


def _alike(first: Report, other: Report, first_name: str, other_name: str) -> None:
    mine, theirs = dict(_leaves(first)), dict(_leaves(other))
    for key in sorted({*mine, *theirs} - set(MAY_DIFFER)):
        if mine.get(key) == theirs.get(key) or (key == MODULES and key in mine and key in theirs):
            continue
        why = DECIDES.get(key, "it may decide a result")
        raise ShardError(
            f"reports differ in {schema.plain(key)}: {_value(mine, key)} in {first_name}, "
            f"{_value(theirs, key)} in {other_name} ({why}); run them alike"
        )


def _modules(reports: Sequence[Report], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The modules of all reports, for each may have loaded others; a :class:`ShardError` that names
    the first file with two contents."""
    by_path: dict[str, tuple[str, str]] = {}
    for report, name in zip(reports, names, strict=True):
        for path, digest in sorted(report.get(MODULES, {}).items()):
            first, where = by_path.setdefault(path, (digest, name))
            if digest != first:
                raise ShardError(
                    f"reports differ in {MODULES}: {schema.preview(path, 200)[1:-1]} is "
                    f"{schema.plain(first[:12])} in {where}, {schema.plain(digest[:12])} in {name} "
                    "(a Python file that the kernel imported); run them alike"
                )
    if not any(MODULES in report for report in reports):
        return {}
    return {MODULES: {path: digest for path, (digest, _) in sorted(by_path.items())}}


def _leaves(report: Report) -> Iterator[tuple[str, Any]]:
    """Key path -> what is compared; of the keys that the tables divide, each part."""
    for key, value in report.items():
        if key not in _PARTS or not isinstance(value, Mapping):
            yield key, value
            continue
        for part, below in value.items():
            path = f"{key}.{part}"
            two = path in _TWO_NUMBERS and isinstance(below, str)
            yield path, ".".join(below.split(".")[:2]) if two else below


def _value(leaves: Mapping[str, Any], key: str) -> str:
    if key not in leaves:
        return "nothing"
    value = leaves[key]
    if key == MODULES:
        return quantity(len(value), "file")
    if isinstance(value, Mapping):  # a fingerprint
        pairs = sorted(value.items())
        return ", ".join(f"{schema.plain(k)} {schema.plain(v)}" for k, v in pairs) or "none"
    if isinstance(value, list):
        return schema.plain(", ".join(map(str, value))) or "none"
    return schema.plain(value)


def _each_once(reports: Sequence[Report], selection: Sequence[Case]) -> list[Mapping[str, Any]]:
    """The cases of all reports in the order of the selection."""
    counts = Counter(c["id"] for r in reports for c in r["cases"])
    target = {c.id for c in selection}
    for what, ids in (
        ("lost", sorted(target - set(counts))),
        ("judged twice", sorted(i for i, n in counts.items() if n > 1)),
        ("not in this selection", sorted(set(counts) - target)),
    ):
        if ids:
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            examples = ", ".join(map(schema.plain, ids[:3]))
            mend = _shards(reports) or "run the shards again from one commit"
            raise ShardError(f"{quantity(len(ids), 'case')} {what}: {examples}{more}; {mend}")
    order = {c.id: at for at, c in enumerate(selection)}
    return sorted(_renumbered(reports), key=lambda c: order[c["id"]])


def _renumbered(reports: Sequence[Report]) -> Iterator[Mapping[str, Any]]:
    """The cases, with numbers of worker processes that no two reports share."""
    most = 0
    for report in reports:
        start = most
        for case in report["cases"]:
            if "process" not in case:
                yield case
                continue
            most = max(most, start + case["process"])
            yield {**case, "process": start + case["process"]}


def _shards(reports: Sequence[Report]) -> str:
    """The shards that came twice, and the first that has no report, with its command; empty where
    the reports name no shards of one division."""
    counts = Counter(str(report.get("shard")) for report in reports)
    pairs = [shard.partition("/") for shard in counts]
    if len({of for _, _, of in pairs}) != 1 or not all(f"{a}{b}".isdigit() for a, _, b in pairs):
        return ""
    whole = pairs[0][2]
    twice = [f"shard {schema.plain(shard)} came twice" for shard, n in counts.items() if n > 1]
    missing = [k for k in range(1, min(int(whole), 999) + 1) if f"{k}/{whole}" not in counts]
    if not missing:
        return "; ".join(twice)
    first = reports[0]
    options = "".join(
        f" --{name} {shlex.quote(str(first[name]))}"
        for name in ("tier", "kind", "case") if first.get(name)
    )  # fmt: skip
    lacks = ", ".join(f"{k}/{whole}" for k in missing[:8])
    command = printable(
        f"megamoe check --backend {shlex.quote(str(first['backend']))}"
        f"{first.get('options', '')}{options} --shard {missing[0]}/{whole} --json FILE"
    )
    return "; ".join([*twice, f"no report of shard {lacks}; run `{command}`"])
