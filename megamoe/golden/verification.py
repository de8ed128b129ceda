"""``golden verify``: recompute every golden. It trusts nothing that is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megamoe.cases import Case
from megamoe.golden.candidates import every_golden
from megamoe.golden.computed import digest_of, make, regenerate
from megamoe.golden.each import OnResult, errors_of
from megamoe.golden.places import GoldenError
from megamoe.golden.store import Store, entry_of, pack
from megamoe.spec.contract import CONTRACTS


def verify(root: Path, cases: Sequence[Case], jobs: int, on_result: OnResult) -> list[str]:
    """Recompute every golden; returns one line for each that is not equal in every bit."""
    Store(root, make)  # report an unreadable manifest once, not once a case
    return errors_of(partial(_verify_one, root), cases, jobs, on_result)


def _verify_one(root: Path, case: Case) -> str:
    home = CONTRACTS[case.revisions[0]]
    Store(root, make, home).entry(case)  # before any work
    inputs = regenerate(case)
    digest = digest_of(inputs)
    for revisions, golden in every_golden(case, inputs):
        content, table = pack(golden)
        fresh = entry_of(case, golden, digest, content, table, revisions)
        store = Store(root, make, CONTRACTS[revisions[0]])
        entry = store.entry(case)
        if "file" in entry:
            store.load(case, digest)
        _compare(case, table, entry, fresh)
    return ""


def _compare(
    case: Case, table: Mapping[str, Any], entry: Mapping[str, Any], fresh: Mapping[str, Any]
) -> None:
    for name in sorted(set(table) | set(entry.get("tensors", {}))):
        if table.get(name) != entry.get("tensors", {}).get(name):
            raise GoldenError(
                f"case {case.id}: {name} differs from what the oracle computes; see `megamoe "
                f"golden record --case {case.id}` and `megamoe golden diff`"
            )
    for key in ("kind", "inputs", "zero_freedom", "rows", "file", "sha256", "also"):
        if fresh.get(key) != entry.get(key):
            raise GoldenError(f"case {case.id}: the manifest's {key} is not the case's; record it")
