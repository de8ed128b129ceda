"""The command ``megamoe contract``: revisions, their clauses, and which build follows which."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from megamoe.cases import Case, load_cases
from megamoe.commands.shared import root_of
from megamoe.console import Console
from megamoe.golden import GoldenError, Store, make
from megamoe.kernels.registry import kernels
from megamoe.printable import quantity
from megamoe.spec import builds
from megamoe.spec.contract import CONTRACTS, Clause, Contract
from megamoe.suggest import follow, hint

_FEW: Final = 3
"""Cases of one side alone that are named without ``--verbose``."""
EFFECTS: Final = {
    "features": "nothing: a contract without a feature does not know its cases",
    "situ_tanh": "l2_acts and y of SiTU, where the gate is small",
    "shared_expert": "y where its fp32 sum rounds otherwise with the row at another place",
    "replica_choice": "the remapped ids and the load, where an expert has replicas; never y",
    "replica_hash": "the remapped ids and the load, where an expert has replicas; never y",
    "padding_known": "the load, the staged ids and the staged weights of padding rows",
    "staging_amax_floor": "x_sf and x of groups whose largest value is below the higher floor",
    "staging_exponent_min": "x_sf and x of groups below the higher minimum",
    "staging_exponent_max": "x_sf and x of groups with an infinity",
    "staging_clips": "x where a hidden value is NaN",
    "cast_saturates": "x and l2_acts where a value is beyond 448",
    "amax_drops_nan": "x_sf, l2_acts_sf and their codes in groups with a NaN",
    "gate_up_order": "l2_acts and y of every element",
    "gate_clamped_below": "l2_acts and y where a gate is below minus the clamp",
    "clamp_drops_nan": "l2_acts and y where gate or up is NaN and there is a clamp",
    "precise_silu": "l2_acts and y with fast_math off, in rare last places",
    "routing_weight": "l2_acts, l2_acts_sf and y of every routed slot whose weight is not 1",
    "bf16_before_requant": "l2_acts of a few per cent of the values, and y",
    "requant_scale": "l2_acts_sf, l2_acts and y of groups with an infinity; of a dialect all of y",
    "requant_exponent_min": "l2_acts_sf and l2_acts of groups of small values or zeros",
    "combine_order": "y where its fp32 sum rounds otherwise in another order",
    "weights": "nothing: it decides which cases a dialect knows",
    "activation_scale": "y where a staged value is near a tie of two codes",
    "activation_group": "nearly all of y",
    "gate_up": "y of some rows",
    "token_scale_floor": "y of tokens, or of slots, whose row has a tiny amax",
    "token_codes": "y where a value of a row is near a tie of two codes",
    "silu_type": "y of a few rows, where an activation rounds otherwise",
    "routing_type": "y, where a routing weight is no bfloat16 number",
    "clamp_nan": "y of tokens with a NaN or an infinity, where there is a clamp",
    "requant_group": "y where a half of a wider group is far quieter; all of y if continuous",
    "requant_amax_floor": "y of groups whose activations are below the floor",
}
"""Clause -> what of a golden moves with it."""


def run_list(a: argparse.Namespace) -> int:
    """A table of the revisions, and of the builds that follow each, or kernels that claim it."""
    table = Table("revision", "clauses", "builds that follow it", "where they differ")
    revisions = [build.revision for build in builds.BUILDS.values()]
    for revision in dict.fromkeys([*CONTRACTS, *revisions]):
        count = f"{len(_clauses(CONTRACTS[revision]))}" if revision in CONTRACTS else "not yet"
        rows: dict[str, list[str]] = {}
        for build in builds.BUILDS.values():
            if build.revision == revision:
                rows.setdefault(_differences(build), []).append(build.name)
        adapters = [f"{k.name} (adapter)" for k in kernels().values() if revision in k.contracts]
        if adapters and not rows:
            rows[""] = adapters
        for at, (differences, names) in enumerate((rows or {"": ["none"]}).items()):
            first = (revision, count) if at == 0 else ("", "")
            table.add_row(*first, escape(_together(names)), escape(differences))
        table.add_section()
    Console().print(table)
    return 0


def run_show(a: argparse.Namespace) -> int:
    """A table of the clauses of one revision or build."""
    clauses = _of(a.revision)
    table = Table("clause", "value", "evidence", title=f"contract {a.revision}")
    for name, clause in clauses.items():
        table.add_row(name, escape(_value(clause.value)), escape(clause.evidence))
    Console().print(table)
    build = builds.build_of(a.revision)
    if build is not None:
        _print_build(build)
    return 0


def run_diff(a: argparse.Namespace) -> int:
    """A table of the clauses that differ, and the cases that do."""
    left, right = _of(a.left), _of(a.right)
    table = Table("clause", a.left, a.right, "what a golden would show")
    for name in dict.fromkeys([*left, *right]):
        ours, theirs = (
            _value(side[name].value) if name in side else "not a clause" for side in (left, right)
        )
        if ours != theirs:
            table.add_row(name, escape(ours), escape(theirs), EFFECTS.get(name, "not described"))
    if not table.row_count:
        print(f"{a.left} and {a.right} have the same clauses, with the same values")
    else:
        Console().print(table)
    if a.left in CONTRACTS and a.right in CONTRACTS:
        _print_cases(root_of(a), CONTRACTS[a.left], CONTRACTS[a.right], a.verbose)
    return 0


def _print_cases(root: Path, left: Contract, right: Contract, is_whole: bool) -> None:
    """The cases whose goldens the two contracts do not share, and those of one side: of these the
    first few, unless the list is to be whole."""
    stores = [Store(root, make, one) for one in (left, right)]
    cases = load_cases(root)
    only = [
        [case.id for case in cases if mine in case.revisions and other not in case.revisions]
        for mine, other in ((left.revision, right.revision), (right.revision, left.revision))
    ]
    both = [c for c in cases if {left.revision, right.revision} <= set(c.revisions)]
    # A case of kind errors has no golden: what is right stands in the case.
    changes = [c.id for c in both if len({_key(store, c) for store in stores}) > 1]
    print(f"{quantity(len(changes), 'case')} of {len(both)} with another golden")
    for case_id in changes:
        print(f"  {case_id}")
    for ids, contract in zip(only, (left, right), strict=True):
        title = f"{quantity(len(ids), 'case')} only under {contract.revision}"
        if ids and is_whole:
            print(title, *(f"  {case_id}" for case_id in ids), sep="\n")
        elif ids:
            rest = len(ids) - _FEW
            more = f" and {rest} more; --verbose names all" if rest > 0 else ""
            print(f"{title}: {', '.join(ids[:_FEW])}{more}")


def _key(store: Store, case: Case) -> str:
    try:
        return store.key(case)
    except GoldenError as error:
        return str(error)


def run_detect(a: argparse.Namespace) -> int:
    """Exit status 1 where a kernel is not one whose bits are known."""
    folders = _folders(a.what)
    unknown = False
    for name, folder in folders.items():
        try:
            detection = builds.detect(folder)
        except ValueError as error:
            if len(folders) == 1:
                raise
            print(f"{name}: {error}")
            continue
        unknown |= not detection.same_bits
        print(f"{name}: {detection.description}")
        print(f"  headers: {detection.where}")
        for header in detection.differing if detection.builds else ():
            decides = "decides bits" if header.bits else "no bit depends on it"
            print(f"  differs: {header.path} ({decides}: {header.why})")
        if detection.same_bits:
            _print_build(detection.builds[0])
    return 1 if unknown else 0


# --- parts ------------------------------------------------------------------------------------


def _folders(what: str | None) -> dict[str, Path]:
    if what is not None and Path(what).is_dir():
        return {what: Path(what)}
    folders = builds.installed_packages()
    packages = ", ".join(builds.PACKAGES)
    if what is None:
        if not folders:
            raise ValueError(f"none of {packages} is installed here; name a folder with headers")
        return folders
    name = what.replace("-", "_")
    if name not in folders:
        here = ", ".join(folders) or f"none of {packages}"
        raise ValueError(
            f"{what} is neither a folder nor a package with the kernel that is installed here "
            f"(here: {here}); name a folder"
        )
    return {what: folders[name]}


def _names() -> list[str]:
    return [*CONTRACTS, *(build.name for build in builds.BUILDS.values())]


def _clauses(contract: Contract) -> dict[str, Clause[Any]]:
    return contract.clauses


def _of(name: str) -> dict[str, Clause[Any]]:
    """The clauses of a revision, or of a build: its revision's, with its differences."""
    build = builds.build_of(name)
    revision = name if build is None else build.revision
    if revision not in CONTRACTS:
        revisions = ", ".join(CONTRACTS)
        followers = [b.name for b in builds.BUILDS.values() if b.revision == revision]
        if followers:
            raise ValueError(
                f"revision {revision}, which {followers[-1]} follows, has no clauses written down "
                f"yet; those that have: {revisions}"
            )
        text = f"unknown revision or build {name!r}{hint(name, _names())}"
        raise ValueError(follow(text, f"revisions: {revisions}; `megamoe contract list` shows all"))
    clauses = _clauses(CONTRACTS[revision])
    if build is not None:
        evidence = f"{build.name}; differs from {revision}"
        clauses |= {clause: Clause(value, evidence) for clause, value in build.differs.items()}
    return clauses


def _value(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _differences(build: builds.Build) -> str:
    return ", ".join(f"{clause} = {_value(value)}" for clause, value in build.differs.items())


def _together(names: list[str]) -> str:
    """Builds with each package named once: ``vllm 0.22.1, 0.23.0; DeepGEMM 54e2261``."""
    versions: dict[str, list[str]] = {}
    for name in names:
        package, _, version = name.rpartition(" ")
        versions.setdefault(package, []).append(version)
    return "; ".join(f"{package} {', '.join(v)}".strip() for package, v in versions.items())


def _print_build(build: builds.Build) -> None:
    differences = _differences(build)
    print(f"  revision: {build.revision}{f', but {differences}' if differences else ''}")
    for note in build.notes:
        print(f"  note: {note}")
