"""Goldens: reading the store, recording candidates, blessing them, verifying them."""

from megamoe.cases.kind import Made
from megamoe.files import write_atomically
from megamoe.golden import predicted, recorded
from megamoe.golden.candidates import bless, bless_durations, record, verify
from megamoe.golden.changes import diff
from megamoe.golden.make import GoldenError, digest_of, make, regenerate, rows_of
from megamoe.golden.store import Store, StoredGolden

__all__ = [
    "GoldenError",
    "Made",
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
