"""Cases: the tests, as data (``golden/cases/*.toml``).

A file holds an optional table ``[defaults]`` and ``[[case]]`` tables. A case has ``name``,
``kind``, ``breaks`` (one sentence: what is broken if it fails), optionally ``tier`` and ``seed``,
and the parameters of its kind. ``[case.matrix]`` with lists makes one case of each combination,
its ``name`` being a template: ``name = "edge-t{tokens}"``; the values of a key of several names,
``"hidden,intermediate"``, go together. ``docs/goldens.md`` shows examples.

Everything is checked while it is read; an error is one line with file, case and key.
"""

from __future__ import annotations

import itertools
import os
import re
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from megamoe.cases.kind import KINDS, Case, CaseError, Form, form_of
from megamoe.cases.pattern import matching
from megamoe.spec.models import MODELS
from megamoe.suggest import follow, hint

TIERS: Final = ("quick", "full")
_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")
_RECIPES = {
    "hidden": "hidden_recipe", "weights": "weights_recipe", "routing": "routing_recipe",
    "map": "map_recipe", "ids": "ids_recipe",
}  # fmt: skip
_COMMON = ("name", "kind", "breaks", "tier", "seed", "matrix")
C = TypeVar("C", "Case", "Entry")
_MODEL_SIZES = ("hidden", "intermediate", "experts", "top_k")


def golden_root() -> Path:
    """The directory ``golden/``: $MEGAMOE_GOLDEN, or the one inside or beside the package.

    An installed package brings its own; a folder beside it may belong to somebody else.
    """
    path = os.environ.get("MEGAMOE_GOLDEN")
    if path:
        return Path(path)
    package = Path(__file__).resolve().parents[1]
    inside = package / "golden_data"
    return inside if inside.is_dir() else package.parent / "golden"


def load_cases(root: Path | None = None) -> list[Case]:
    """Every case under ``root`` (default: :func:`golden_root`), in the order of files and lines.

    Raises :class:`CaseError` for a file that cannot be read, an unknown or missing key, a value
    of the wrong type, or an id used twice.
    """
    return _unique(root, load_file)


def _unique(root: Path | None, read: Callable[[Path], list[C]]) -> list[C]:
    folder = (root or golden_root()) / "cases"
    if not folder.is_dir():
        raise CaseError(f"no case files: {folder} is not a directory; set MEGAMOE_GOLDEN")
    cases: dict[str, C] = {}
    for path in sorted(folder.glob("*.toml")):
        for case in read(path):
            if case.id in cases:
                first = cases[case.id].source.name
                raise CaseError(f"{path.name}: case {case.id} is already in {first}; rename one")
            cases[case.id] = case
    return list(cases.values())


def load_file(path: Path) -> list[Case]:
    """The cases of one file."""
    return [_case(path, entry) for entry in _entries(path)]


@dataclass(frozen=True)
class Entry:
    """What a list says of a case; the parameters of its kind are not read."""

    id: str
    kind: str
    tier: str
    breaks: str
    source: Path

    @property
    def name(self) -> str:
        return self.id.partition("/")[2]


def load_entries(root: Path | None = None) -> list[Entry]:
    """As :func:`load_cases`, without the parameters: faster, and a wrong parameter is not seen."""
    return _unique(root, lambda path: [_head(path, entry)[0] for entry in _entries(path)])


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The table of each case of one file, with the defaults in it and the matrix resolved."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CaseError(f"{path.name}: cannot be read as TOML: {error}") from error
    unknown = sorted(set(data) - {"defaults", "case"})
    if unknown:
        raise CaseError(f"{path.name}: unknown table {unknown[0]!r}; known: defaults, case")
    defaults, tables = data.get("defaults", {}), data.get("case", [])
    if not isinstance(tables, list) or not isinstance(defaults, dict):
        raise CaseError(f"{path.name}: write cases as [[case]] and defaults as [defaults]")
    for table in tables:
        yield from _expand(path, _merge(defaults, table))


def case_of_params(
    kind: str, name: str, seed: int, params: Mapping[str, Any], where: str
) -> Case:  # fmt: skip
    """A case that no file has, checked as one of a file is. ``where`` begins each error."""
    return Case(
        f"{kind}/{name}", kind, "full", "", seed, _params(where, form_of(kind), dict(params)),
        Path(),
    )  # fmt: skip


def select(
    cases: Iterable[C], kind: str | None = None, tier: str = "full", glob: str | None = None,
    revision: str | None = None,
) -> list[C]:  # fmt: skip
    """The cases of a kind and tier that ``glob`` means (:mod:`megamoe.cases.pattern`); order is
    kept.

    ``revision``: without the cases that this contract does not know. Raises :class:`CaseError` for
    an unknown kind or tier, and for a pattern that matches nothing.
    """
    if kind is not None and kind not in KINDS:
        raise CaseError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if tier not in TIERS:
        raise CaseError(f"unknown tier {tier!r}; known: {', '.join(TIERS)}")
    cases = list(cases)
    if glob is not None:
        cases = matching(cases, glob)
    cases = [c for c in cases if kind in (None, c.kind)]
    if revision is not None:
        cases = [c for c in cases if revision in getattr(c, "revisions", ())]
    return [c for c in cases if tier == "full" or c.tier == "quick"]


def _merge(defaults: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` over ``defaults``; tables are merged key by key."""
    out = dict(defaults)
    for key, value in table.items():
        below = out.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        out[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return out


def _expand(path: Path, table: dict[str, Any]) -> list[dict[str, Any]]:
    """One table for each combination of the lists in ``matrix``."""
    matrix = table.pop("matrix", {})
    name = str(table.get("name", "without a name"))
    if not isinstance(matrix, dict) or not all(isinstance(v, list) and v for v in matrix.values()):
        raise CaseError(f"{path.name}: case {name}: matrix holds non-empty lists only")
    axes = [[_together(path, name, key, v) for v in values] for key, values in matrix.items()]
    out = []
    for combination in itertools.product(*axes):
        pairs = list(itertools.chain(*combination))
        entry = table
        for key, value in pairs:
            if key == "label":  # for the name alone
                continue
            # A dotted key reaches into a table: "routing.kind" = ["same", "skewed"].
            branch = value
            for part in reversed(key.split(".")):
                branch = {part: branch}
            entry = _merge(entry, branch)
        labels = {key.replace(".", "_"): v for key, v in pairs}
        try:
            entry = {**entry, "name": name.format_map(labels)}
        except (KeyError, ValueError, IndexError) as error:
            raise CaseError(
                f"{path.name}: case {name}: the name does not fit the matrix: {error}"
            ) from error
        out.append(entry)
    return out


def _together(path: Path, name: str, key: str, value: Any) -> list[tuple[str, Any]]:
    """Names and values of one entry of a matrix; a key of several names has as many values."""
    names = key.split(",")
    values = [value] if len(names) == 1 else value
    if not isinstance(values, list) or len(values) != len(names):
        raise CaseError(f"{path.name}: case {name}: matrix {key} has {value!r}; give it a list of "
                        f"{len(names)} values")  # fmt: skip
    return list(zip(names, values, strict=True))


def _case(path: Path, table: dict[str, Any]) -> Case:
    """One validated case."""
    head, seed = _head(path, table)
    entries = {k: v for k, v in table.items() if k not in _COMMON}
    params = _params(f"{path.name}: case {head.name}", form_of(head.kind), entries)
    return Case(head.id, head.kind, head.tier, head.breaks, seed, params, path)


def _head(path: Path, table: Mapping[str, Any]) -> tuple[Entry, int]:
    """What every kind of case has, checked, and the seed."""
    name = table.get("name", "without a name")
    where = f"{path.name}: case {name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CaseError(f"{where}: give it a name of a-z, 0-9 and . _ + -")
    kind = table.get("kind")
    if kind not in KINDS:
        raise CaseError(f"{where}: kind is {kind!r}; known: {', '.join(KINDS)}")
    breaks = table.get("breaks")
    if not isinstance(breaks, str) or not breaks.strip():
        raise CaseError(f"{where}: `breaks` is missing; say in one sentence what fails with it")
    tier, seed = table.get("tier", "full"), table.get("seed", zlib.crc32(f"{kind}/{name}".encode()))
    if tier not in TIERS:
        raise CaseError(f"{where}: tier is {tier!r}; known: {', '.join(TIERS)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise CaseError(f"{where}: seed is {seed!r}; it must be an integer from 0 to 2**64 - 1")
    return Entry(f"{kind}/{name}", kind, tier, breaks, path), seed


def _params(where: str, kind: Form, entries: dict[str, Any]) -> dict[str, Any]:
    """Checked parameters with the defaults of the kind."""
    params: dict[str, Any] = {}
    for key, value in entries.items():
        if key in _RECIPES and isinstance(value, dict):
            key = _RECIPES[key]  # a table called `hidden` is the recipe, a number the size
        params[key] = value
    types = kind.keys
    for key, value in params.items():
        if key not in types:
            text = f"{where}: unknown key {key!r}{hint(key, types)}"
            raise CaseError(follow(text, f"known: {', '.join(sorted(types))}"))
        expected = types[key]
        wrong_bool = isinstance(value, bool) and expected is not bool
        if wrong_bool or not isinstance(value, expected):
            names = [t.__name__ for t in (expected if isinstance(expected, tuple) else (expected,))]
            raise CaseError(f"{where}: {key} is {value!r}; it must be {' or '.join(names)}")
        choices = kind.choices.get(key)
        if choices and value not in choices:
            raise CaseError(f"{where}: {key} is {value!r}; known: {', '.join(choices)}")
    if "model" in types:
        params = _with_model(where, kind, params)
    missing = [key for key in kind.required if key not in params]
    if missing:
        raise CaseError(f"{where}: key {missing[0]!r} is missing")
    _check_sizes(where, params)
    kind.complete(where, params)
    for key in ("hidden", "intermediate"):
        if params.get(key, 0) % 128:
            raise CaseError(f"{where}: {key} is {params[key]}; it must be a multiple of 128")
    return params


def _with_model(where: str, kind: Form, params: dict[str, Any]) -> dict[str, Any]:
    """Sizes of ``model`` at ``ep`` ranks in place of the two keys."""
    model = params.get("model")
    if model is None:
        if "ep" in params:
            raise CaseError(f"{where}: ep needs a model; give experts instead")
        return params
    if model not in MODELS:
        raise CaseError(f"{where}: unknown model {model!r}; known: {', '.join(MODELS)}")
    both = [key for key in _MODEL_SIZES if key in params]
    if both:
        raise CaseError(f"{where}: {both[0]} follows from model; drop one of the two")
    m = MODELS[model]
    try:
        experts = m.local_experts(params.get("ep", 1))
    except ValueError as error:
        raise CaseError(f"{where}: {error}") from error
    sizes = {"hidden": m.hidden_size, "intermediate": m.intermediate_size, "experts": experts}
    if "top_k" in kind.keys:
        sizes["top_k"] = m.top_k
    if "clamp" in kind.keys:
        params.setdefault("clamp", "none" if m.clamp is None else m.clamp)
    return {**params, **sizes}


def _check_sizes(where: str, params: dict[str, Any]) -> None:
    for key in ("hidden", "intermediate", "experts", "top_k", "logical", "physical"):
        if params.get(key, 1) < 1:
            raise CaseError(f"{where}: {key} is {params[key]}; it must be at least 1")
    if params.get("tokens", 0) < 0:
        raise CaseError(f"{where}: tokens is {params['tokens']}; it must not be negative")
