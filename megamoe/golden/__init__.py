"""Goldens: reading the store, recording candidates, blessing them, verifying them.

Each name is imported when it is first asked for: the manifest can be read without torch
(``documents.py``).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.cases.kind import OracleGolden
    from megamoe.files import write_atomically
    from megamoe.golden import predicted, recorded
    from megamoe.golden.candidates import bless, bless_durations, record
    from megamoe.golden.changes import diff
    from megamoe.golden.computed import digest_of, make, regenerate, rows_of
    from megamoe.golden.places import GoldenError
    from megamoe.golden.store import Store, StoredGolden
    from megamoe.golden.verification import verify

__all__ = [
    "GoldenError",
    "OracleGolden",
    "Store",
    "StoredGolden",
    "bless",
    "bless_durations",
    "diff",
    "digest_of",
    "make",
    "predicted",
    "record",
    "recorded",
    "regenerate",
    "rows_of",
    "verify",
    "write_atomically",
]

_HOME = {
    "GoldenError": "golden.places",
    "OracleGolden": "cases.kind",
    "Store": "golden.store",
    "StoredGolden": "golden.store",
    "bless": "golden.candidates",
    "bless_durations": "golden.candidates",
    "diff": "golden.changes",
    "digest_of": "golden.computed",
    "make": "golden.computed",
    "record": "golden.candidates",
    "regenerate": "golden.computed",
    "rows_of": "golden.computed",
    "verify": "golden.verification",
    "write_atomically": "files",
}


def __getattr__(name: str) -> Any:
    if name in ("predicted", "recorded"):
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attribute = getattr(import_module(f"megamoe.{_HOME[name]}"), name)
    globals()[name] = attribute  # asked for once
    return attribute
