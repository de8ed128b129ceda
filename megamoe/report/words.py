"""What a report calls the keys of a result, for a person who has not read the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

FIELDS: Final[Mapping[str, str]] = {
    # a side of an A/B
    "text": "environment", "kind": "kind of environment", "commit": "commit",
    "requirements": "installed", "backend": "backend", "asked": "backend asked for",
    "accumulator": "accumulator class", "contract": "contract",
    "contract_why": "reason for the contract", "made_for": "contract asked for",
    "python": "Python", "torch": "torch", "numpy": "numpy", "device": "device", "gpu": "GPU",
    "processor": "processor", "cores": "cores", "system": "system", "cuda": "CUDA",
    # an A/B, a bisection
    "schema": "version of the format", "first_stage": "first stage that differs",
    "not_compared": "cases that neither side offers", "how": "what a step is judged by",
    "range": "candidates", "builds": "builds", "narrowed": "cases that each step runs",
    "suspects": "the first bad one is one of", "archive": "archive",
    "class": "what the change is", "first_text": "first change",
    # an element
    "case": "case", "stage": "stage", "index": "index", "token": "token", "slot": "slot",
    "expert": "expert", "channel": "channel", "expected": "good",
    "expected_bits": "bits of good", "actual": "bad",
    "actual_bits": "bits of bad", "ulps": "ULPs apart",
}  # fmt: skip
"""Key -> words."""
STATUS: Final[Mapping[str, str]] = {"error": "could not be compared", "skip": "skipped"}
"""Words for the status of a case of an A/B, or the verdict of a step, whose key does not say it."""


def of(key: str) -> str:
    """The words of a key; a key of a later version is its own, without underscores."""
    return FIELDS.get(key, key.replace("_", " "))
