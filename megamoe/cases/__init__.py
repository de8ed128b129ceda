"""What is tested: cases are data, from which inputs follow in every bit.

``load`` reads ``golden/cases/*.toml``; ``recipes`` makes the inputs of a case, from the numbers of
``counter``; ``stored`` is a problem in a file in place of a recipe; ``shards`` spreads a selection
of cases over hosts.
"""

from megamoe.cases.load import (
    CAPACITY_ALIGNMENT,
    FAMILIES,
    KINDS,
    LAWS,
    TIERS,
    Case,
    CaseError,
    golden_root,
    load_cases,
    load_file,
    select,
)

__all__ = [
    "CAPACITY_ALIGNMENT",
    "FAMILIES",
    "KINDS",
    "LAWS",
    "TIERS",
    "Case",
    "CaseError",
    "golden_root",
    "load_cases",
    "load_file",
    "select",
]
