"""The report of one shard: which of its keys decide a result, its form, and its completeness."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe import schema
from megamoe.cases import KINDS, TIERS
from megamoe.cases.shards import ShardError
from megamoe.files import REPORT_LIMIT, read_json
from megamoe.judge.verdict import STATUSES
from megamoe.printable import all_printable, quantity

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
    "longest_shard_seconds": "as `shards`: in a report that is itself a merge",
    "machine": "cores and system decide no bit; what does is in `recorded.machine_class`",
    "options": "how to run one case again on that host; its path of golden/ may be another",
    "versions.safetensors": "it stores and loads bytes",
}
"""Key of a report -> why reports that differ in it are one judgement all the same."""

NOT_ALWAYS: Final = ("file_sha256", "modules_sha256", "name", "callables", "batch_invariant",
                      "worker", "versions.triton", "versions.deep_gemm", "versions.sgl-deep-gemm",
                      "versions.vllm", "versions.sglang")  # fmt: skip
"""What all reports may lack: what earlier versions did not write, and what is not installed."""
LONGEST: Final = "longest_shard_seconds"
"""Key of a merge, beside ``seconds``, which are the sum over its shards."""
NOT_RUN: Final = "not-run"
"""Status of a case that a run did not come to before it was stopped."""

_CASE: Final = schema.Object(
    {"id": str, "kind": schema.OneOf(KINDS), "status": str, "seconds": schema.seconds},
    {"reason": str, "how": schema.Items(str), "recorded": str, "predicted": str, "unlike": str,
     "process": schema.natural, "calls": schema.Items(schema.natural)},
)  # fmt: skip
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
        "seconds": schema.seconds, LONGEST: schema.seconds,
        "shards": schema.Items(schema.OrNull(str)), "next": schema.Items(str),
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
    check_form(data, str(path))
    return data


def check_form(report: Report, name: str) -> None:
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


def check_complete(report: Report, name: str) -> None:
    """Each key that decides, and counts that are those of the cases."""
    for key in ("seconds", "counts", *DECIDES):
        top, _, part = key.partition(".")
        if key in NOT_ALWAYS or top in NOT_ALWAYS:
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


def check_end(report: Report, name: str) -> None:
    """A run that was not stopped; :class:`ShardError` in one line."""
    rest = [case["id"] for case in report["cases"] if case["status"] == NOT_RUN]
    if not rest and not report.get("stopped"):
        return
    shard = report.get("shard")
    again = f"run shard {schema.plain(shard)} again" if shard else "run it again"
    loss = (
        f" before {quantity(len(rest), 'case')}, {schema.plain(rest[0])} among them" if rest else ""
    )
    raise ShardError(f"{name}: its run was stopped{loss}; {again}")
