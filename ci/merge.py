"""Merge the folders that ``ci/shard.sh`` wrote: ``python -m ci.merge --out DIR SHARD_DIR...``.

The merge shows that every shard of one cut is there once, that they say of themselves to have run
the same code, goldens and toolchain, that no file was damaged since, and that the union of their
cases is the selection that this checkout's case files give. Otherwise one line says which not, and
nothing is written. It shows nothing against somebody who edits a result and its digest: nothing is
signed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from megamoe import schema
from megamoe.cases import KINDS, TIERS, Case, golden_root, load_cases, select, shards
from megamoe.files import (
    PROVENANCE_LIMIT,
    REPORT_LIMIT,
    FileError,
    digest_bounded,
    parse_json,
    read_bounded,
    write_atomically,
)
from megamoe.judge import STATUSES, WORDS
from megamoe.printable import quantity
from megamoe.suite import merge as merging
from megamoe.suite import provenance, results
from megamoe.suite.provenance import Provenance
from megamoe.suite.summary import verdict_line

MAX_NAMES: Final = 20
"""Red cases that the summary names; report.html has all."""

REQUEST_KEYS: Final = ("backend", "device", "tier", "kind", "case", "shard")
"""Stands in a result and in its provenance."""

_PROVENANCE: Final = schema.Object(
    {
        "shard": str, "backend": str, "device": str, "tier": schema.OneOf(TIERS),
        "kind": schema.OrNull(schema.OneOf(KINDS)), "case": schema.OrNull(str), "revision": str,
        "digests": schema.Object({"goldens": str}), "versions": dict, "machine": dict,
        "files": schema.Object(dict.fromkeys(provenance.FILES, str)),
    }
)  # fmt: skip

Shard = tuple[Path, dict[str, Any], Provenance]
"""Folder, report, provenance."""


class MergeError(ValueError):
    """The shards make no whole; one line that says where and how to mend it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; returns the exit code: 0 green, 1 red or no whole, 2 misuse."""
    parser = argparse.ArgumentParser(prog="python -m ci.merge", allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("folders", nargs="*", type=Path)
    a = parser.parse_args(argv)
    outputs = (*provenance.FILES, provenance.NAME, "summary.md", "report.html")
    try:
        if a.out.resolve() in [folder.resolve() for folder in a.folders]:
            raise _Misuse(f"--out {a.out} is a shard's folder; name another")
        for name in outputs:
            (a.out / name).unlink(missing_ok=True)
        if not a.folders:
            raise _Misuse("name the folders that ci/shard.sh wrote")
        parts = [_load(folder) for folder in a.folders]
        report, origin = merge(parts)
        contents = {
            provenance.NAME: json.dumps(origin, indent=1) + "\n",
            "summary.md": summary(report, origin),
            "junit.xml": results.junit(report).decode(),
            "result.json": json.dumps(report, indent=1) + "\n",  # last: its presence says done
        }
        for name, content in contents.items():
            write_atomically(a.out / name, content.encode(errors="backslashreplace"))
    except (_Misuse, OSError) as error:
        print(f"merge: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ValueError as error:  # MergeError, ShardError
        print(f"merge: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    shards_hold = quantity(len(parts), "shard holds", "shards hold")
    print(f"merge: {shards_hold} each of {quantity(len(report['cases']), 'case')} once")
    print(f"merge: {verdict_line(report)}")
    return results.exit_code(report["counts"])


class _Misuse(ValueError):
    pass


def _load(folder: Path) -> Shard:
    """A shard's folder; raises where a file is missing, no JSON, or not what was sealed."""
    if not folder.is_dir():
        raise _Misuse(f"{folder} is no folder; name those that ci/shard.sh wrote")
    contents = {}
    for name, limit in (("result.json", REPORT_LIMIT), (provenance.NAME, PROVENANCE_LIMIT)):
        path = folder / name
        try:
            contents[name] = read_bounded(path, limit)
        except FileNotFoundError:
            raise _Misuse(f"{path} is missing: did that shard end? Run it again") from None
        except FileError as error:
            raise _Misuse(str(error)) from None
    result, origin = (_parse(folder / name, content) for name, content in contents.items())
    if not isinstance(result, dict) or not isinstance(result.get("cases"), list):
        raise _Misuse(f"{folder / 'result.json'} is no report of `megamoe check --json`")
    if schema.fault(origin, schema.Object({"format": schema.OneOf((1,))})):
        raise _Misuse(f"{folder / provenance.NAME} is not of format 1; merge with the revision "
                      "that wrote it")  # fmt: skip
    if message := schema.fault(origin, _PROVENANCE):
        raise _Misuse(f"{folder / provenance.NAME}: {message}; run that shard again")
    digests = {"result.json": hashlib.sha256(contents["result.json"]).hexdigest()}
    for name in provenance.FILES:
        path = folder / name
        try:
            digest = digests.get(name) or digest_bounded(path, REPORT_LIMIT)
        except FileNotFoundError:
            raise _Misuse(f"{path} is missing: did that shard end? Run it again") from None
        except FileError as error:
            raise _Misuse(str(error)) from None
        if digest != origin["files"][name]:
            raise MergeError(f"{path} was changed after it was made; run that shard again")
    return folder, result, origin


def _parse(path: Path, content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise _Misuse(f"{path} is no JSON ({error}); run that shard again") from None


def merge(parts: Sequence[Shard], root: Path | None = None) -> tuple[dict[str, Any], Provenance]:
    """One report and one provenance of all shards, or :class:`MergeError`, or ``ShardError``."""
    _alike(parts)
    first = parts[0][2]
    root = root or golden_root()
    here = provenance.digest(root, provenance.GOLDENS)
    if first["digests"]["goldens"] != here:
        raise MergeError(f"the shards judged by other goldens than this checkout has; merge at "
                         f"their revision, {schema.plain(first['revision'])}")  # fmt: skip
    request = first["kind"], first["tier"], first["case"], parts[0][1].get("contract")
    selection = select(load_cases(root), *request)
    _all_there(parts, selection, shards.durations(root))
    names = [str(folder / "result.json") for folder, _, _ in parts]
    report = merging.merge([result for _, result, _ in parts], selection, names)
    origin = {
        "format": 1,
        **{name: first[name] for name in provenance.SAME},
        "shards": [
            {**{key: source[key] for key in ("shard", "machine", "files")},
             "cases": len(result["cases"]), "seconds": result["seconds"]}
            for _, result, source in parts
        ],
    }  # fmt: skip
    return report, origin


def _alike(parts: Sequence[Shard]) -> None:
    """All of one judgement: what differs is named with both values and both folders."""
    folder, _, first = parts[0]
    for other, _, origin in parts[1:]:
        for name in provenance.SAME:
            if origin.get(name) == first.get(name):
                continue
            mine, theirs, what = first.get(name), origin.get(name), name
            if isinstance(mine, dict) and isinstance(theirs, dict):
                key = min(k for k in mine | theirs if mine.get(k) != theirs.get(k))
                mine, theirs, what = mine.get(key), theirs.get(key), f"{name}.{key}"
            raise MergeError(
                f"shards differ in {schema.plain(what)}: {schema.plain(mine)} in {folder}, "
                f"{schema.plain(theirs)} in {other}; run them alike, from one commit"
            )
    for folder, result, origin in parts:
        for name in REQUEST_KEYS:
            if name not in result or result[name] != origin[name]:
                raise MergeError(
                    f"{folder}: {name} is {schema.preview(result.get(name))} in result.json, "
                    f"{schema.preview(origin[name])} in {provenance.NAME}; run that shard again"
                )


def _all_there(
    parts: Sequence[Shard], selection: Sequence[Case], seconds: dict[str, float]
) -> None:
    """Each of 1/N to N/N once, so that a lost host is named as such and not by its cases alone."""
    places: dict[tuple[int, int], Path] = {}
    for folder, _, origin in parts:
        shard = shards.parse(origin["shard"])
        if shard in places:
            raise MergeError(f"shard {origin['shard']} came twice: {places[shard]} and {folder}")
        places[shard] = folder
    counts = sorted({count for _, count in places})
    if len(counts) > 1:
        raise MergeError(f"shards of {counts[0]} and of {counts[1]}: two cuts make no whole")
    for index in range(1, counts[0] + 1):
        if (index, counts[0]) not in places:
            ids = [case.id for case in shards.shard(selection, index, counts[0], seconds)]
            more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
            raise MergeError(
                f"shard {index}/{counts[0]} is missing, and with it {quantity(len(ids), 'case')}: "
                f"{', '.join(ids[:3])}{more}; run {_again(parts[0][1])}ci/shard.sh "
                f"{index} {counts[0]}"
            )


def _again(result: dict[str, Any]) -> str:
    """The variables of ``ci/shard.sh`` that made ``result``, as words of a shell."""
    pairs = (("BACKEND", "backend"), ("DEVICE", "device"), ("TIER", "tier"), ("CASE", "case"))
    settings = [(variable, result.get(key)) for variable, key in pairs]
    return "".join(
        f"{variable}={shlex.quote(str(value))} " for variable, value in settings if value
    )


def summary(report: dict[str, Any], origin: Provenance) -> str:
    """A page for people, in Markdown: verdict, counts, red cases, hosts, what made it."""
    lines = [f"## {report['backend']} on {origin['device']}: {verdict_line(report)}", ""]
    lines += [
        f"| kind | {' | '.join(WORDS.get(s, s) for s in STATUSES)} |",
        f"|---|{'---|' * len(STATUSES)}",
    ]
    for kind in KINDS:
        counts = Counter(c["status"] for c in report["cases"] if c["kind"] == kind)
        if counts:
            lines.append(f"| {kind} | {' | '.join(str(counts[s] or '') for s in STATUSES)} |")
    red = [c for c in report["cases"] if c["status"] in ("fail", "error")]
    if red:
        lines += ["", "| red | why |", "|---|---|"]
        for case in red[:MAX_NAMES]:
            why = (case["reason"].splitlines() or [""])[0].replace("|", "\\|")
            lines.append(f"| `{case['id']}` | {why} |")
        if len(red) > MAX_NAMES:
            lines.append(f"| | and {len(red) - MAX_NAMES} more |")
    reasons = Counter(c["reason"] for c in report["cases"] if c["status"] == "not-provided")
    if reasons:
        lines += ["", *(f"- not provided x {n}: {why}" for why, n in reasons.most_common())]
    lines += ["", "| shard | cases | seconds | machine |", "|---|---|---|---|"]
    for shard in origin["shards"]:
        machine = ", ".join(str(v) for k, v in shard["machine"].items() if k != "class" and v)
        lines.append(
            f"| {shard['shard']} | {shard['cases']} | {shard['seconds']:.0f} | {machine} |"
        )
    lines += [
        "",
        f"Revision {origin['revision']}; contract {report['contract']}; "
        + ", ".join(f"{k} {v}" for k, v in origin["versions"].items() if v)
        + ".",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
