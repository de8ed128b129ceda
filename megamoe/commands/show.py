"""``megamoe show CASE``: what a case is, before anything runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe.cases import SIZES, Case, form_of, golden_root, load_cases
from megamoe.cases.pattern import matching
from megamoe.commands.listing import entry
from megamoe.golden.documents import manifest_of

JUDGED: Final[Mapping[str, str]] = {
    "staging": "bitwise: x, x_sf, ids and weights; rows beyond the batch stay untouched",
    "eplb": "bitwise: ids and load",
    "layout": "bitwise: all four tensors",
    "errors": "error: type and exact text; buffer, load and parameters stay untouched",
}
"""Kinds that are judged in one way."""
POINT: Final = "zero freedom: every correct kernel returns these bits, whatever its class"
INTERVAL: Final = (
    "interval: y within the envelope of the backend's class; stages that it shows, each alone; y "
    "without stages, the statistic too"
)


def run(a: argparse.Namespace) -> int:
    """Print each case that the pattern means."""
    root = Path(a.golden) if a.golden else golden_root()
    goldens = manifest_of(root)["cases"]
    found = [described(case, goldens) for case in matching(load_cases(root), a.case)]
    if a.json:
        print(json.dumps(found, indent=1))
        return 0
    print("\n\n".join(_text(one) for one in found))
    return 0


def described(case: Case, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a case without running it; JSON-able. ``manifest``: all goldens."""
    goldens = {key: manifest[key] for key in manifest if key.partition("@")[0] == case.id}
    return {
        **entry(case),
        "sizes": {name: case.params[name] for name in SIZES if name in case.params},
        "judged": judged(case, goldens),
        "needs": needs(case),
        "contracts": case.revisions,
        "goldens": [
            {"file": golden["file"], "contracts": _revisions(case, key, golden)}
            for key, golden in goldens.items()
            if "file" in golden  # what is right of a wrong call stands in the case
        ],
    }


def judged(case: Case, goldens: Mapping[str, Any]) -> str:
    """How a backend's output is judged, in one line."""
    if case.kind in JUDGED:
        return JUDGED[case.kind]
    points = [bool(golden.get("zero_freedom")) for golden in goldens.values()]
    how = "no golden yet" if not points else POINT if all(points) else INTERVAL
    law = case.params.get("law")
    law = f"law {law}, bitwise, the backend against itself; then " if law else ""
    rows = case.rows
    part = "" if rows is None else f"; {len(rows)} of {case.params['tokens']} rows by the golden"
    return f"{law}{how}{part}"


def needs(case: Case) -> list[str]:
    """What a backend must offer: its callable and the features that the case asks."""
    kind = form_of(case.kind)
    cuda = ["a CUDA device"] if case.params.get("cuda_only") else []
    return [*filter(None, [kind.needs]), *kind.features(case), *cuda]


def _revisions(case: Case, key: str, golden: Mapping[str, Any]) -> list[str]:
    named = key.partition("@")[2] or case.revisions[0]
    return [named, *golden.get("also", [])]


def _text(one: Mapping[str, Any]) -> str:
    recipe = {k: v for k, v in one["params"].items() if k not in one["sizes"]}
    lines = [
        ("if it fails", one["breaks"]),
        ("sizes", ", ".join(f"{k.replace('_', '-')} {v}" for k, v in one["sizes"].items())),
        *((f"  {name}", _value(value)) for name, value in recipe.items()),
        ("judged", one["judged"]),
        ("needs", ", ".join(one["needs"])),
        ("contracts", ", ".join(one["contracts"])),
        *(("golden", f"{g['file']} ({', '.join(g['contracts'])})") for g in one["goldens"]),
        ("from", f"{one['file']}, tier {one['tier']}, seed {one['seed']}"),
        ("alone", f"megamoe check --backend B --case {one['id']}"),
    ]
    return "\n".join([one["id"], *(f"  {name:<18} {said}" for name, said in lines if said)])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, list) and len(value) > 16:
        return f"{', '.join(map(str, value[:16]))}, ... ({len(value)} in all)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
