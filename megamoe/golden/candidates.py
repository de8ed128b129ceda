"""record -> diff -> bless: three separate acts, and verify, which trusts nothing.

Only :func:`bless` writes in ``golden/``; :func:`record` writes in ``golden/candidates/``, which is
not under version control.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from megamoe.cases import Case
from megamoe.contract import CURRENT
from megamoe.golden.make import GoldenError, digest_of, generator, make, regenerate
from megamoe.golden.store import (
    DIGEST,
    Store,
    empty_manifest,
    entry_of,
    generator_id,
    manifest_bytes,
    pack,
    read_manifest,
)
from megamoe.judge.formats import BF16, BYTE, E4M3, F32, INT32, INT64, Form

Done = Callable[[Case, str], None]
"""Called once a case: the case, and an error or ''."""


# --- record -----------------------------------------------------------------------------------


def record(root: Path, cases: Sequence[Case], jobs: int, done: Done) -> list[str]:
    """Write a candidate for each case into ``root/candidates``; returns the errors, one line each.

    Candidates of an earlier record stay, so that a set can be recorded in parts.
    """
    folder = root / "candidates"
    write_atomically(folder / ".gitignore", b"*\n")  # candidates are nobody's history
    errors = []
    for case, error in _each(_record_one, [(folder, case) for case in cases], jobs):
        done(case, error)
        if error:
            errors.append(error)
    return errors


def _record_one(work: tuple[Path, Case]) -> str:
    folder, case = work
    given = regenerate(case)
    made = make(case, given)
    content, table = pack(made)
    entry = entry_of(case, made, digest_of(given), content, table)
    if made.tensors:
        write_atomically(folder / entry["file"], content)
    described = {"entry": entry, "generator": generator(), "contract": CURRENT.revision}
    path = folder / "entries" / f"{case.id}.json"
    write_atomically(path, json.dumps(described, indent=1, sort_keys=True).encode())
    return ""


def _each(
    step: Callable[[tuple[Path, Case]], str], work: Sequence[tuple[Path, Case]], jobs: int
) -> Iterator[tuple[Case, str]]:
    """``step`` of every item, over ``jobs`` processes; what it raises becomes its line."""
    if jobs <= 1:
        for item in work:
            yield item[1], _guarded(step, item)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        futures = {pool.submit(_guarded, step, item): item[1] for item in work}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except Exception as error:  # a worker that was killed takes its case with it
                yield futures[future], f"case {futures[future].id}: the worker died: {error}"


def _guarded(step: Callable[[tuple[Path, Case]], str], item: tuple[Path, Case]) -> str:
    try:
        return step(item)
    except GoldenError as error:
        return str(error)
    except Exception as error:
        return f"case {item[1].id}: {type(error).__name__}: {error}"


# --- diff -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What blessing a candidate would change in one tensor, or in a whole case."""

    case_id: str
    tensor: str
    what: str
    """new, changed, same bits (provenance only), removed."""
    elements: int = 0
    """Elements that differ; of a tensor kept as digests, rows."""
    ulps: int | None = None
    """Largest distance in the order of the values; None where it is not known."""


def candidates(root: Path) -> dict[str, Any]:
    """Case id -> recorded description. :class:`GoldenError` where there is none."""
    folder = root / "candidates" / "entries"
    found = {
        str(path.relative_to(folder).with_suffix("")): json.loads(path.read_text())
        for path in sorted(folder.rglob("*.json"))
    }
    if not found:
        raise GoldenError("no candidates; make them with `megamoe golden record`")
    return found


def diff(root: Path, cases: Iterable[Case]) -> list[Change]:
    """Every change that :func:`bless` would make: candidates, and cases that are gone."""
    manifest = _manifest_or_empty(root)
    known = {case.id for case in cases}
    changes = []
    for case_id, described in candidates(root).items():
        changes += _case_changes(root, case_id, described["entry"], manifest["cases"].get(case_id))
    gone = sorted(set(manifest["cases"]) - known)
    return changes + [Change(case_id, "", "removed") for case_id in gone]


def _case_changes(root: Path, case_id: str, new: Mapping[str, Any], old: Any) -> list[Change]:
    if old is None:
        return [Change(case_id, "", "new")]
    new_table, old_table = new.get("tensors", {}), old.get("tensors", {})
    out = [Change(case_id, name, "removed") for name in sorted(set(old_table) - set(new_table))]
    before = _tensors(root, old)
    after = _tensors(root / "candidates", new)
    for name, described in new_table.items():
        if name not in old_table:
            out.append(Change(case_id, name, "new"))
        elif described != old_table[name]:
            elements, ulps = _distance(name, before, after)
            out.append(Change(case_id, name, "changed", elements, ulps))
    if not out and new != old:
        out.append(Change(case_id, "", "same bits"))
    return out


def _tensors(root: Path, entry: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    path = root / entry["file"] if "file" in entry else None
    return dict(load_file(path)) if path is not None and path.is_file() else {}


def _distance(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[int, int | None]:
    old, new = before.get(name), after.get(name)
    digests = old is None or new is None
    if digests:
        old, new = before.get(DIGEST + name), after.get(DIGEST + name)
    if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
        return (0 if new is None else int(new.size)), None
    differ = old != new
    count = int(differ.sum())
    if digests or not count:
        return count, None
    form = _form(name, old.dtype)
    if form is None:
        return count, None
    return count, int(np.abs(form.key(old[differ]) - form.key(new[differ])).max())


def _form(name: str, dtype: Any) -> Form | None:
    """The form of a stored tensor, by its name and type."""
    if name.rpartition(".")[2] in ("x", "l2_acts"):
        return E4M3
    if name == "topk_weights":
        return F32
    forms = {"uint16": BF16, "uint8": BYTE, "int32": INT32, "int64": INT64}
    return forms.get(str(dtype))


# --- bless ------------------------------------------------------------------------------------


def bless(root: Path, cases: Sequence[Case]) -> list[str]:
    """Make every candidate the golden of its case, and drop goldens of cases that are gone.

    Files first, each complete before it takes its name, then the manifest: whoever reads at any
    time sees either the old golden or the new one, or an error, never a mixture taken for good.
    Returns the ids. Raises :class:`GoldenError`, with nothing written, in a CI run, and where a
    candidate is damaged or its case or the sources have changed since it was recorded.
    """
    if os.environ.get("CI"):
        raise GoldenError(
            "bless refuses to run where CI is set: goldens change by a person's hand only; unset "
            "CI if you are one"
        )
    found, by_id = candidates(root), {case.id: case for case in cases}
    manifest = _manifest_or_empty(root)
    for case_id, described in found.items():
        _check_candidate(root, case_id, described, by_id.get(case_id))
    for described in found.values():
        entry = described["entry"]
        if "file" in entry:
            content = (root / "candidates" / entry["file"]).read_bytes()
            write_atomically(root / entry["file"], content)
    manifest["contract"] = CURRENT.revision
    entries = {k: v for k, v in manifest["cases"].items() if k in by_id}
    entries |= {case_id: described["entry"] for case_id, described in found.items()}
    used = {entry["generator"] for entry in entries.values()}
    generators = {**manifest["generators"], generator_id(): generator()}
    manifest["generators"] = {k: v for k, v in generators.items() if k in used}
    removed = [v for k, v in manifest["cases"].items() if k not in entries and "file" in v]
    manifest["cases"] = entries
    write_atomically(root / "manifest.json", manifest_bytes(manifest))
    for entry in removed:
        (root / entry["file"]).unlink(missing_ok=True)
    shutil.rmtree(root / "candidates")
    return list(found)


def _check_candidate(
    root: Path, case_id: str, described: Mapping[str, Any], case: Case | None
) -> None:
    entry = described["entry"]
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
    if "file" in entry:
        path = root / "candidates" / entry["file"]
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise GoldenError(f"candidate {case_id}: its file is missing or damaged; {again}")


def bless_durations(root: Path, reports: Iterable[Mapping[str, Any]]) -> int:
    """Take the seconds of judged cases from JSON reports into ``durations.json``; how many."""
    if os.environ.get("CI"):
        raise GoldenError("bless refuses to run where CI is set; unset CI if you are a person")
    path = root / "durations.json"
    seconds = json.loads(path.read_text()) if path.is_file() else {}
    taken = {
        case["id"]: round(float(case["seconds"]), 2)
        for report in reports
        for case in report["cases"]
        if case["status"] in ("pass", "fail")
    }
    known = read_manifest(root / "manifest.json")["cases"]
    merged = {k: v for k, v in {**seconds, **taken}.items() if k in known}
    write_atomically(path, (json.dumps(merged, indent=0, sort_keys=True) + "\n").encode())
    return len(taken)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, flush to the disk, then rename: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _manifest_or_empty(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    return read_manifest(path) if path.exists() else empty_manifest(CURRENT.revision)


# --- verify -----------------------------------------------------------------------------------


def verify(root: Path, cases: Sequence[Case], jobs: int, done: Done) -> list[str]:
    """Recompute every golden; returns one line for each that is not equal in every bit."""
    Store(root, make)  # a manifest that cannot be read is said once, not once a case
    problems = []
    for case, error in _each(_verify_one, [(root, case) for case in cases], jobs):
        done(case, error)
        if error:
            problems.append(error)
    return problems


def _verify_one(work: tuple[Path, Case]) -> str:
    root, case = work
    store = Store(root, make)
    entry = store.entry(case)
    given = regenerate(case)
    digest = digest_of(given)
    if "file" in entry:
        store.load(case, digest)
    made = make(case, given)
    content, table = pack(made)
    fresh = entry_of(case, made, digest, content, table)
    for name in sorted(set(table) | set(entry.get("tensors", {}))):
        if table.get(name) != entry.get("tensors", {}).get(name):
            raise GoldenError(
                f"case {case.id}: {name} differs from what the oracle computes; see `megamoe "
                f"golden record --case {case.id}` and `megamoe golden diff`"
            )
    for key in ("kind", "inputs", "zero_freedom", "rows", "file", "sha256"):
        if fresh.get(key) != entry.get(key):
            raise GoldenError(f"case {case.id}: the manifest's {key} is not the case's; record it")
    return ""
