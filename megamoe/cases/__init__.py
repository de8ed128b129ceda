"""Cases: data, from which every bit of the inputs follows.

``load`` reads ``golden/cases/*.toml``; ``kind`` defines a kind of case; ``recipes`` computes
inputs, from the numbers of ``counter``; ``stored`` reads a problem from a file in place of a
recipe; ``shards`` spreads a selection of cases over hosts.
"""

from megamoe.callable_room import make_callable
from megamoe.cases.kind import (
    CAPACITY_ALIGNMENT,
    KINDS,
    SIZES,
    Case,
    CaseError,
    Form,
    Kind,
    form_of,
    kind_of,
)
from megamoe.cases.load import (
    TIERS,
    Entry,
    golden_root,
    load_cases,
    load_entries,
    load_file,
    select,
)

__all__ = [
    "CAPACITY_ALIGNMENT",
    "KINDS",
    "SIZES",
    "TIERS",
    "Case",
    "CaseError",
    "Entry",
    "Form",
    "Kind",
    "form_of",
    "golden_root",
    "kind_of",
    "load_cases",
    "load_entries",
    "load_file",
    "select",
]

make_callable(__name__)  # megamoe.cases(...), see docs/api.md
