"""Goldens: reading the store, recording candidates, blessing them, verifying them."""

from megamoe.golden.candidates import bless, bless_durations, diff, record, verify
from megamoe.golden.make import GoldenError, Made, make
from megamoe.golden.store import Store, StoredGolden

__all__ = [
    "GoldenError",
    "Made",
    "Store",
    "StoredGolden",
    "bless",
    "bless_durations",
    "diff",
    "make",
    "record",
    "verify",
]
