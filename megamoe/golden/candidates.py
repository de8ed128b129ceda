"""record -> diff -> bless: three separate acts.

Only :func:`bless` writes in ``golden/``; :func:`record` writes in ``golden/candidates/``, which is
not under version control.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megamoe import schema
from megamoe.cases import Case
from megamoe.cases.kind import OracleGolden
from megamoe.cases.shards import durations
from megamoe.files import (
    TENSORS_LIMIT,
    clear_leftovers,
    folder_lock,
    read_bounded,
    write_atomically,
)
from megamoe.golden.changes import CANDIDATES, candidates, manifest_or_empty
from megamoe.golden.computed import digest_of, generator, make, regenerate
from megamoe.golden.documents import read_manifest
from megamoe.golden.each import OnResult, errors_of
from megamoe.golden.places import GoldenError, inside, key_of, tensors_of
from megamoe.golden.store import entry_of, generator_id, manifest_bytes, pack
from megamoe.spec.contract import BASE, CONTRACTS

# --- record -----------------------------------------------------------------------------------


def record(root: Path, cases: Sequence[Case], jobs: int, on_result: OnResult) -> list[str]:
    """Write a candidate for each case into ``root/candidates``; returns the errors, one line each.

    Candidates of an earlier record stay, so that a set can be recorded in parts.
    """
    return errors_of(partial(_record_one, root), cases, jobs, on_result)


def _record_one(root: Path, case: Case) -> str:
    keys = [key_of(case.id), *(key_of(case.id, name) for name in case.revisions[1:])]
    places = {key: [inside(root, path) for path in _files(root, key)] for key in keys}
    inputs = regenerate(case)
    digest = digest_of(inputs)
    goldens = every_golden(case, inputs)
    # All files or none: a bless that comes now takes this candidate whole, or leaves it whole.
    with folder_lock(root):
        ignore = inside(root, root / CANDIDATES / ".gitignore")
        if not ignore.exists():
            write_atomically(ignore, b"*\n")  # candidates are nobody's history
        for key in keys:
            for path in places[key]:
                path.unlink(missing_ok=True)
        for revisions, golden in goldens:
            content, table = pack(golden)
            entry = entry_of(case, golden, digest, content, table, revisions)
            description = {"entry": entry, "generator": generator(), "contract": revisions[0]}
            home = revisions[0] == case.revisions[0]
            path, tensors = places[key_of(case.id, "" if home else revisions[0])]
            if golden.tensors:
                write_atomically(tensors, content)
            write_atomically(path, json.dumps(description, indent=1, sort_keys=True).encode())
    return ""


def every_golden(case: Case, inputs: Mapping[str, Any]) -> list[tuple[list[str], OracleGolden]]:
    """The different goldens of a case, each with the revisions that it is of, the oldest first."""
    out: list[tuple[list[str], OracleGolden]] = []
    by_clauses: dict[Any, list[str]] = {}
    for name in case.revisions:
        contract = CONTRACTS[name]
        clauses = tuple(clause.value for clause in contract.clauses.values())
        if clauses in by_clauses:  # nothing to compute again
            by_clauses[clauses].append(name)
            continue
        golden = make(case, inputs, contract=contract)
        equal = next((names for names, other in out if _same(golden, other)), None)
        if equal is None:
            out.append(([], golden))
            equal = out[-1][0]
        equal.append(name)
        by_clauses[clauses] = equal
    return out


def _same(golden: OracleGolden, other: OracleGolden) -> bool:
    """Whether two goldens are equal, bit for bit."""
    return golden.zero_freedom == other.zero_freedom and pack(golden)[1] == pack(other)[1]


# --- bless ------------------------------------------------------------------------------------


def bless(root: Path, cases: Sequence[Case]) -> list[str]:
    """Make every candidate the golden of its case, and drop goldens of cases that are gone.

    Files first, each complete before it takes its name, then the manifest: a reader sees either the
    old golden or the new one, or an error, and never a mixture without an error. Returns the ids.
    Raises :class:`GoldenError`, with nothing written, in a CI run, and where a candidate is damaged
    or its case or the sources have changed since it was recorded.
    """
    if os.environ.get("CI"):
        raise GoldenError(
            "bless refuses to run where CI is set: goldens change by a person's hand only; unset "
            "CI if you are one"
        )
    with folder_lock(root):  # no record writes meanwhile, so only files read here are removed below
        return _bless(root, {case.id: case for case in cases})


def _bless(root: Path, by_id: Mapping[str, Case]) -> list[str]:
    descriptions, manifest = candidates(root), manifest_or_empty(root)
    contents = {
        key: _content(root, key, description["entry"], by_id.get(key.partition("@")[0]))
        for key, description in descriptions.items()
    }
    again = {key.partition("@")[0] for key in descriptions}  # their goldens go, of every revision
    ids = {key: key.partition("@")[0] for key in manifest["cases"]}
    entries = {
        k: v for k, v in manifest["cases"].items() if ids[k] in by_id and ids[k] not in again
    }
    entries |= {key: description["entry"] for key, description in descriptions.items()}
    removals = [k for k, v in manifest["cases"].items() if k not in entries and "file" in v]
    # Compute every place before the first is touched.
    places = {
        case_id: inside(root, root / tensors_of(case_id)) for case_id in [*descriptions, *removals]
    }
    sources = [inside(root, path) for case_id in descriptions for path in _files(root, case_id)]
    _clear(root)
    for case_id, content in contents.items():
        if content:
            write_atomically(places[case_id], content)
    manifest["contract"] = BASE.revision
    generator_ids = {entry["generator"] for entry in entries.values()}
    generators = {**manifest["generators"], generator_id(): generator()}
    manifest["generators"] = {k: v for k, v in generators.items() if k in generator_ids}
    manifest["cases"] = entries
    write_atomically(root / "manifest.json", manifest_bytes(manifest))
    for case_id in removals:
        places[case_id].unlink(missing_ok=True)
    for path in sources:
        path.unlink(missing_ok=True)
    _remove_empty(root / CANDIDATES)
    return list(again)


def _content(root: Path, case_id: str, entry: Mapping[str, Any], case: Case | None) -> bytes:
    """The content of a candidate's file, b"" where it has none; :class:`GoldenError` if unfit."""
    again = f"`megamoe golden record --case {case_id}`"
    if case is None:
        raise GoldenError(
            f"candidate {case_id}: no case file has this case; delete it from golden/candidates"
        )
    if entry["definition"] != case.definition():
        raise GoldenError(
            f"candidate {case_id}: {case.source.name} has changed since it was recorded; {again}"
        )
    if entry["generator"] != generator_id():
        raise GoldenError(
            f"candidate {case_id}: the oracle, the inputs or a library have changed since it was "
            f"recorded; {again}"
        )
    if "file" not in entry:
        return b""
    path = inside(root, root / CANDIDATES / tensors_of(case_id))
    try:
        content = read_bounded(path, TENSORS_LIMIT, follow=False)
    except FileNotFoundError:
        content = b""
    except (OSError, ValueError) as error:
        raise GoldenError(f"candidate {case_id}: {error}; {again}") from error
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise GoldenError(f"candidate {case_id}: its file is missing or damaged; {again}")
    return content


def _files(root: Path, case_id: str) -> tuple[Path, Path]:
    """A candidate's entry and tensors: all that blessing it removes."""
    folder = root / CANDIDATES
    return folder / "entries" / f"{case_id}.json", folder / tensors_of(case_id)


def _clear(root: Path) -> None:
    """Delete unfinished files of a killed record or bless. The caller must hold the lock."""
    for folder in [root / name for name in ("cases", "inputs", "tensors", CANDIDATES)]:
        if folder.resolve().is_relative_to(root.resolve()):
            clear_leftovers(folder)
    clear_leftovers(root, deep=False)


def _remove_empty(folder: Path) -> None:
    """Remove the folders of candidates that hold nothing more."""
    below = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in sorted(below, reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
    if [path.name for path in folder.iterdir()] == [".gitignore"]:
        (folder / ".gitignore").unlink()
        folder.rmdir()


def bless_durations(root: Path, reports: Iterable[Mapping[str, Any]]) -> int:
    """Take the seconds of judged cases from JSON reports into ``durations.json``; how many.

    Raises ``ValueError``, with nothing written, for a report of another form.
    """
    if os.environ.get("CI"):
        raise GoldenError("bless refuses to run where CI is set; unset CI if you are a person")
    seconds: dict[str, float] = {}
    for at, report in enumerate(reports, 1):
        if fault := schema.fault(report, _DURATIONS):
            raise GoldenError(f"report {at}: {fault}; write it again with `megamoe check --json`")
        seconds |= {
            case["id"]: round(float(case["seconds"]), 2)
            for case in report["cases"]
            if case["status"] in ("pass", "fail")
        }
    with folder_lock(root):
        cases = read_manifest(root / "manifest.json")["cases"]
        table = {k: v for k, v in {**durations(root), **seconds}.items() if k in cases}
        content = json.dumps(table, indent=0, sort_keys=True) + "\n"
        write_atomically(root / "durations.json", content.encode())
    return len(seconds)


_DURATIONS = schema.Object(
    {"cases": schema.Items(schema.Object({"id": str, "status": str, "seconds": schema.seconds}))}
)
