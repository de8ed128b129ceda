"""Recorded bits: the output of one backend on one class of machine.

They lie in ``golden/recorded/BACKEND/MACHINE.json``, apart from the derived goldens, and are no
standard for other kernels: they show that an unchanged kernel still returns the same bits. The
backend's ``fingerprint()`` decides what "unchanged" means, not a version string: digests of the
kernel sources, of their constants and options, and of each compiled binary.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.environment import machine_class, provenance, slug
from megamoe.files import clear_leftovers, folder_lock, write_atomically
from megamoe.golden.documents import SCHEMA, Y_LIMIT, forward_inputs, read_recording
from megamoe.golden.places import GoldenError, inside, recorded_file
from megamoe.golden.store import canonical
from megamoe.judge.elements import bitwise, place_of
from megamoe.judge.judgements import RESULTS, STAGING
from megamoe.judge.verdict import Finding
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.forms import BF16
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]

STAGES: Final = (*STAGING, *RESULTS)
"""In the order in which the judge names them."""
WHAT: Final = (
    "The bits that this backend returned on this class of machine, in three runs of two processes "
    "that agreed. They are this backend's own: nothing that another kernel must return."
)


# --- who and where ----------------------------------------------------------------------------


def same_build(recording: Mapping[str, Any], now: Mapping[str, Any] | None) -> bool:
    """Whether the running build is the recorded build.

    Sources and options must be equal, and so must each binary that both name: a process has
    compiled only the binaries that its cases needed so far. If it compiled any, at least one must
    be a recorded one. If it compiled none (no token, no launch), sources and options decide.
    """
    if now is None or any(recording[n] != now[n] for n in ("sources", "options")):
        return False
    before, after = recording["binaries"], now["binaries"]
    both = set(before) & set(after)
    return (bool(both) or not before or not after) and all(before[n] == after[n] for n in both)


# --- bits -------------------------------------------------------------------------------------


def _plain(name: str, stages: Mapping[str, Array], ids: Array) -> Array:
    """One stage with one payload for every NaN, and zeros in slots that take no part."""
    array = canonical(name, stages[name])
    if not TENSORS[name].reads_masked:
        array = np.where(ids[:, :, None] >= 0, array, 0).astype(array.dtype)
    return np.ascontiguousarray(array)


def digests(stages: Mapping[str, Array], ids: Array) -> dict[str, str]:
    """sha256 of each stage that is shown: dtype, shape and bytes, all tokens of the case."""
    out = {}
    for name in STAGES:
        if name in stages:
            array = _plain(name, stages, ids)
            head = f"{array.dtype}{list(array.shape)}".encode()
            out[name] = hashlib.sha256(head + array.tobytes()).hexdigest()
    return out


def entry(stages: Mapping[str, Array], ids: Array, inputs: str) -> dict[str, Any]:
    """The record of one case; ``inputs`` is the digest of its inputs."""
    out: dict[str, Any] = {"inputs": inputs, "stages": digests(stages, ids)}
    y = _plain("y", stages, ids)
    if y.nbytes <= Y_LIMIT:
        out["y"] = base64.b64encode(y.tobytes()).decode()
    return out


def differences(
    recording: Mapping[str, Any], actual: Mapping[str, Array], ids: Array, machine: str
) -> list[Finding]:
    """A finding for each stage whose bits are not the recorded ones, the earliest first."""
    now = digests(actual, ids)
    out = []
    for name, digest in recording["stages"].items():
        if now.get(name) == digest:
            continue
        size = int(actual[name].size) if name in actual else 0
        what = "moved" if name in actual else "is no longer shown"
        text = f"recorded bits: {name} {what}, on {machine} and with the same fingerprint"
        finding = Finding(name, size, text=text)
        if name == "y" and "y" in recording and name in actual:
            y = _plain("y", actual, ids)
            expected = np.frombuffer(base64.b64decode(recording["y"]), dtype=y.dtype)
            if expected.size == y.size:
                finding = bitwise("y", BF16, y, expected.reshape(y.shape), place_of("y", ids=ids))
                finding = replace(
                    finding, text=f"{text}: {finding.outside} of {finding.total} elements"
                )
        out.append(finding)
    return sorted(out, key=lambda f: STAGES.index(f.stage))


@dataclass(frozen=True)
class Recording:
    """One file of ``golden/recorded``."""

    path: Path
    data: Mapping[str, Any]

    @property
    def machine(self) -> str:
        return str(self.data["machine_class"])

    def state(self, case_id: str, inputs: str, now: Mapping[str, Any] | None, revision: str) -> str:
        """``same`` where the case's bits must be the recorded ones; otherwise why not.

        One of ``none`` (the case was not recorded), ``other contract``, ``other inputs`` and
        ``other fingerprint``.
        """
        of_case = self.data["cases"].get(case_id)
        if of_case is None:
            return "none"
        if self.data["contract"] != revision:
            return "other contract"
        if of_case["inputs"] != inputs:
            return "other inputs"
        return "same" if same_build(self.data["fingerprint"], now) else "other fingerprint"


def find(root: Path, name: str, facts: Mapping[str, Any]) -> Recording | None:
    """The recorded bits of backend ``name`` on a worker's machine class; None if there are none."""
    path = recorded_file(root, name, facts)
    try:
        return Recording(path, read_recording(path, slug))
    except (FileNotFoundError, NotADirectoryError):
        return None


# --- recording and blessing -------------------------------------------------------------------


def write(out: Path, data: Mapping[str, Any]) -> Path:
    """Write a candidate ``out/BACKEND/MACHINE.json``, complete or not at all; returns the path."""
    with folder_lock(out):  # a bless that comes now takes it whole or not at all
        return _write(out, data)


def _write(out: Path, data: Mapping[str, Any]) -> Path:
    machine = str(data["machine_class"])
    if machine != slug(machine):
        raise GoldenError(f"machine class {machine!a}: use a-z, 0-9 and -")
    path = inside(out, out / slug(data["backend"]) / f"{machine}.json")
    write_atomically(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
    return path


def build(
    name: str, accumulator: str, revision: str, facts: Mapping[str, Any],
    build_of: Mapping[str, Any], cases: Mapping[str, Any], refusals: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The content of a file; ``refusals`` are cases that the backend does not do, with its word."""
    return {
        "schema": SCHEMA,
        "what": WHAT,
        "backend": name,
        "accumulator": accumulator,
        "machine_class": machine_class(facts),
        "contract": revision,
        "fingerprint": dict(build_of),
        "provenance": provenance(facts),
        "cases": dict(cases),
        "declined": dict(refusals),
    }


def bless(root: Path, source: Path, *, take: bool = False) -> list[Path]:
    """Make every candidate under ``source`` a recorded golden; returns the files written.

    With ``take`` the candidates are removed: those that were read here, and no others. Raises
    :class:`GoldenError`, with nothing written, in a CI run, where there is no candidate, and where
    one is of another contract, of other inputs, or lacks a forward case.
    """
    if os.environ.get("CI"):
        raise GoldenError(
            "bless-bits refuses to run where CI is set: recorded goldens change by a person's hand "
            "only; unset CI if you are one"
        )
    none = f"no candidates in {source}; make them with `megamoe golden record-bits`"
    if not source.is_dir():
        raise GoldenError(none)
    own = source.resolve().is_relative_to(root.resolve())
    # A lock for each folder; one folder cannot be locked twice.
    with folder_lock(root), nullcontext() if source.samefile(root) else folder_lock(source):
        paths: Sequence[Path] = sorted(source.glob("*/*.json"))
        if not paths:
            raise GoldenError(none)
        inputs = forward_inputs(root)
        recordings = {path: read_recording(path, slug) for path in paths}
        for path, data in recordings.items():
            _check(path, data, inputs)
            # Compute every place before the first is touched.
            inside(root, root / "recorded" / path.parent.name / path.name)
            inside(source, path)
        clear_leftovers(root / "recorded")
        if own:
            clear_leftovers(source)
        targets = [_write(root / "recorded", data) for data in recordings.values()]
        for path in paths if take else ():
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    return targets


def _check(path: Path, data: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    name = f"candidate {path.parent.name}/{path.name}"
    again = "record it again with `megamoe golden record-bits`"
    if data["contract"] not in CONTRACTS:
        raise GoldenError(
            f"{name} is of contract {data['contract']!a}, known are {', '.join(CONTRACTS)}; {again}"
        )
    case_ids = set(data["cases"]) | set(data.get("declined", {}))
    for what, ids in (
        ("lacks", sorted(set(inputs) - case_ids)),
        ("holds a case that the manifest does not:", sorted(case_ids - set(inputs))),
    ):
        if ids:
            more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
            raise GoldenError(f"{name} {what} {ids[0]}{more}; {again}, without --case")
    for case_id, of_case in data["cases"].items():
        if of_case["inputs"] != inputs[case_id]:
            raise GoldenError(
                f"{name}: {case_id} was given other inputs than its golden's; {again}"
            )


__all__ = [
    "Recording",
    "bless",
    "build",
    "differences",
    "digests",
    "entry",
    "find",
    "machine_class",
    "provenance",
    "same_build",
    "write",
]
