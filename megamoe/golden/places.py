"""The place of a golden: it depends on its case's id, and on nothing that a file says.

The manifest and the candidates name files too, for people. A name that differs from the one
computed here is refused, so no edited file leads a write or a deletion out of ``golden/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe.cases import KINDS
from megamoe.environment import machine_class, slug
from megamoe.spec.contract import CONTRACTS

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._+-]*")
"""Names of cases, as the case files take them."""


class GoldenError(ValueError):
    """A golden, the manifest or a candidate is not as it must be; one line with the remedy."""


def key_of(case_id: str, revision: str = "") -> str:
    """The key of a golden: the id of its case, with ``@REV`` for a revision after the first."""
    return f"{case_id}@{revision}" if revision else case_id


def key_fault(key: str) -> str:
    """'' for KIND/NAME or KIND/NAME@REV; otherwise the fault."""
    case_id, at, revision = key.partition("@")
    if at and revision not in CONTRACTS:
        return f"unknown contract {revision!a}; known: {', '.join(CONTRACTS)}"
    return id_fault(case_id)


def id_fault(case_id: str) -> str:
    """'' for kind/name; otherwise the fault."""
    kind, slash, name = case_id.partition("/")
    if slash and kind in KINDS and NAME.fullmatch(name):
        return ""
    return f"a case's id is KIND/NAME with a kind of {', '.join(KINDS)} and a name of a-z 0-9 ._+-"


def tensors_of(key: str) -> str:
    """The file of a golden's tensors, relative to golden/ (or golden/candidates/)."""
    if fault := key_fault(key):
        raise GoldenError(f"case {key!a}: {fault}")
    return f"tensors/{key}.safetensors"


def recorded_file(root: Path, name: str, facts: Mapping[str, Any]) -> Path:
    """Where the recorded bits of backend ``name`` on a worker's machine class are, if any are."""
    return root / "recorded" / slug(name) / f"{machine_class(facts)}.json"


def inside(root: Path, path: Path) -> Path:
    """``path``, if its folder lies in ``root`` once all symbolic links are followed.

    The type of the last part of ``path`` does not matter: to replace or to delete a link never
    touches its target.
    """
    if path.parent.resolve().is_relative_to(root.resolve()):
        return path
    raise GoldenError(
        f"{path} lies outside {root}: a symbolic link leads there; put a folder in the link's place"
    )
