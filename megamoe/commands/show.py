"""``megamoe show CASE``: what a case is, before anything runs."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe.cases import SIZES, Case, form_of, golden_root, load_cases
from megamoe.cases.laws import calls_of
from megamoe.cases.pattern import PROBLEM_SUFFIX, matching
from megamoe.commands.listing import entry
from megamoe.golden.documents import manifest_of

METHODS: Final[Mapping[str, str]] = {
    "staging": "bitwise: x, x_sf, ids and weights; rows beyond the batch stay untouched",
    "eplb": "bitwise: ids and load",
    "layout": "bitwise: all four tensors",
    "errors": "error: type and exact text; buffer, load and parameters stay untouched",
}
"""Kinds that are judged in one way."""
POINT: Final = "bitwise: zero freedom, so every correct kernel returns the same bits"
INTERVAL: Final = (
    "staged, if the backend returns l2_acts and l2_acts_sf, else end-to-end and statistic: each "
    "value must be one that a correct kernel of the backend's accumulator class can return"
)
INTERVAL_OF_Y: Final = (
    "end-to-end: each value of y must be one that a correct kernel of the backend's accumulator "
    "class can return; the stages of this format are not judged"
)
MEANINGS: Final[Mapping[str, str]] = {
    "envelope": "correct kernels may differ, each within certified intervals",
    "zero-freedom": "one output is right",
    "bell": "bell-shaped random values",
    "grid": "values of so few bits that every sum is exact",
    "carrier": "weights that keep each gate far from a rounding boundary",
    "directed": "chosen activations and sums",
    "octaves": "powers of two over which values are spread",
    "spread": "powers of two over which the groups are spread",
    "outlier_every": "one channel in so many is 32 times larger",
    "log2_scale": "all values times 2 to this power",
    "w13_scale": "scale bytes of the weights of linear 1 (gate and up)",
    "w2_scale": "scale bytes of the weights of linear 2",
    "sweep": "each expert has one scale byte, a step beyond that of the expert before",
    "pool": "the first so many experts serve all tokens",
    "mask_every": "one slot in so many has no expert",
    "capacity": "rows of the buffer for tokens",
    "fast_math": "silu by approximate exponential (True), or by expf and division (False)",
    "ep": "ranks over which the experts are spread",
    "distinct": "tokens with inputs of their own; each other token repeats one of them",
}
"""The words of a recipe that a person may not know, each where a case has it."""
SCALES: Final = ("w13_scale", "w2_scale", "gate_scale", "up_scale")
"""Keys with a pair of numbers: the lowest byte and how many bytes there are, or, of kind sweep,
the byte of expert 0 and the step to the next expert."""


def run(a: argparse.Namespace) -> int:
    """Print each case that the pattern means, or a stored problem."""
    if a.case.endswith(PROBLEM_SUFFIX):
        return _show_problem(a.case, a.json)
    root = Path(a.golden) if a.golden else golden_root()
    goldens = manifest_of(root)["cases"]
    cases = matching(load_cases(root), a.case)
    entries = [description(case, goldens) for case in cases]
    if len(cases) == 1:
        entries[0]["rows_of_experts"] = _rows_of_experts(cases[0])
    if a.json:
        print(json.dumps(entries, indent=1))
        return 0
    print("\n\n".join(_text(one) for one in entries))
    return 0


def _show_problem(file: str, as_json: bool) -> int:
    """Print the sizes and the origin of a stored problem."""
    from megamoe.cases import stored  # torch, which a case does not need

    record = stored.load(Path(file))
    p, about = record.problem, record.about
    one: dict[str, Any] = {
        "id": file,
        "sizes": {
            "tokens": p.num_tokens, "hidden": p.hidden_size, "intermediate": p.intermediate_size,
            "experts": p.num_experts, "top_k": p.top_k,
        },
        "features": list(p.features),
        "recorded": list(record.outputs),
        "about": {k: v for k, v in about.items() if isinstance(v, str)},
    }  # fmt: skip
    if as_json:
        print(json.dumps([one], indent=1))
        return 0
    lines = [
        ("sizes", _sizes(one["sizes"])),
        ("features", ", ".join(one["features"])),
        ("recorded output", ", ".join(one["recorded"])),
        *((k.replace("_", " "), v) for k, v in one["about"].items()),
        ("judge it", f"megamoe replay {shlex.quote(file)} --backend B"),
    ]
    print("\n".join([file, *(f"  {name:<18} {text}" for name, text in lines if text)]))
    return 0


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {count}" for name, count in sizes.items())


def description(case: Case, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a case without running it; JSON-able. ``manifest``: all goldens."""
    goldens = {key: manifest[key] for key in manifest if key.partition("@")[0] == case.id}
    return {
        **entry(case),
        "sizes": {name: case.params[name] for name in SIZES if name in case.params},
        "judged": judgement(case, goldens),
        "calls": calls(case),
        "needs": needs(case),
        "contracts": case.revisions,
        "goldens": [
            {"file": golden["file"], "contracts": _revisions(case, key, golden)}
            for key, golden in goldens.items()
            if "file" in golden  # what is right of a wrong call stands in the case
        ],
    }


def _rows_of_experts(case: Case) -> str:
    """Of one case only: the routing of all of them takes seconds."""
    from megamoe.suite.routed import routed  # torch, which a case does not need

    routing = routed(case)
    return routing.lines(case.params["experts"]) if routing else ""


def judgement(case: Case, goldens: Mapping[str, Any]) -> str:
    """How a backend's output is judged, in one line."""
    if case.kind in METHODS:
        return METHODS[case.kind]
    points = [bool(golden.get("zero_freedom")) for golden in goldens.values()]
    interval = INTERVAL_OF_Y if "weight_format" in case.params else INTERVAL
    how = "no golden yet" if not points else POINT if all(points) else interval
    law = case.params.get("law")
    law = f"law {law}, bitwise, the backend against itself; then " if law else ""
    rows = case.rows
    part = "" if rows is None else f"; {len(rows)} of {case.params['tokens']} rows by the golden"
    return f"{law}{how}{part}"


def calls(case: Case) -> str:
    """The calls of a property's law, each compared with an ordinary one; else empty."""
    return calls_of(case.params["law"]) if case.kind == "property" else ""


def needs(case: Case) -> list[str]:
    """What a backend must offer: its callable and the features that the case asks."""
    kind = form_of(case.kind)
    cuda = ["a CUDA device"] if case.params.get("cuda_only") else []
    return [*filter(None, [kind.needs]), *kind.features(case), *cuda]


def _revisions(case: Case, key: str, golden: Mapping[str, Any]) -> list[str]:
    revision = key.partition("@")[2] or case.revisions[0]
    return [revision, *golden.get("also", [])]


def _text(one: Mapping[str, Any]) -> str:
    recipe = {k: v for k, v in one["params"].items() if k not in one["sizes"]}
    lines = [
        ("made to catch", one["breaks"]),
        ("sizes", _sizes(one["sizes"])),
        *((f"  {name}", _value(value, name)) for name, value in recipe.items()),
        *((f"  {word}:", MEANINGS[word]) for word in _words(recipe) if word in MEANINGS),
        ("rows of experts", one.get("rows_of_experts", "")),
        ("judged", one["judged"]),
        *((("the law's calls", one["calls"]),) if one["calls"] else ()),
        ("needs", ", ".join(one["needs"])),
        ("contracts", ", ".join(one["contracts"])),
        *(("golden", f"{g['file']} ({', '.join(g['contracts'])})") for g in one["goldens"]),
        ("from", f"{one['file']}, tier {one['tier']}, seed {one['seed']}"),
        ("alone", f"megamoe check --backend B --case {one['id']}"),
    ]
    return "\n".join([one["id"], *(f"  {name:<18} {text}" for name, text in lines if text)])


def _value(value: Any, name: str = "") -> str:
    if isinstance(value, Mapping):
        sweeps = value.get("kind") == "sweep"
        return ", ".join(
            f"{k} {_value(v, f'{k} sweep' if sweeps else k)}" for k, v in value.items()
        )
    if name.removesuffix(" sweep") in SCALES and isinstance(value, list) and len(value) == 2:
        low, count = value
        if name.endswith(" sweep"):
            return f"{low} in steps of {count}"
        return f"{low} to {low + count - 1}" if count > 1 else str(low)
    if isinstance(value, list) and len(value) > 16:
        return f"{', '.join(map(str, value[:16]))}, ... ({len(value)} in all)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _words(recipe: Mapping[str, Any]) -> list[str]:
    """Keys and kinds of a recipe, each once, in their order."""
    words: dict[str, None] = {}
    for name, value in recipe.items():
        words[name] = None
        if isinstance(value, Mapping):
            words.update(dict.fromkeys(_words(value)))
        elif isinstance(value, str):
            words[value] = None
    return list(words)
