"""The changes that a blessing of the candidates would make: tensors, elements, ULPs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.cases import Case
from megamoe.files import TENSORS_LIMIT, read_bounded
from megamoe.golden.documents import read_candidate, read_manifest
from megamoe.golden.places import GoldenError, tensors_of
from megamoe.golden.store import DIGEST, empty_manifest, read_tensors
from megamoe.spec.contract import BASE
from megamoe.spec.forms import BF16, BYTE, E4M3, F32, INT32, INT64, Form
from megamoe.spec.tensors import TENSORS

CANDIDATES: Final = "candidates"
"""The folder under golden/ in which ``record`` writes and from which ``bless`` reads."""


@dataclass(frozen=True)
class Change:
    """The change of one tensor, or of a whole case, by the blessing of a candidate."""

    case_id: str
    tensor: str
    what: str
    """new, changed, same bits (provenance only), removed."""
    elements: int = 0
    """Elements that differ; of a tensor kept as digests, rows."""
    ulps: int | None = None
    """Largest distance in the order of the values; None where it is not known."""


def candidates(root: Path) -> dict[str, Any]:
    """Case id -> description of its candidate. :class:`GoldenError` if there is none."""
    folder = root / CANDIDATES / "entries"
    ids = {path: path.relative_to(folder).as_posix()[:-5] for path in folder.rglob("*.json")}
    descriptions = {case_id: read_candidate(path, case_id) for path, case_id in sorted(ids.items())}
    if not descriptions:
        raise GoldenError("no candidates; make them with `megamoe golden record`")
    return descriptions


def diff(root: Path, cases: Iterable[Case]) -> list[Change]:
    """Every change that :func:`bless` would make: candidates, and cases that are gone."""
    manifest = manifest_or_empty(root)
    case_ids = {case.id for case in cases}
    changes = []
    descriptions = candidates(root)
    for key, description in descriptions.items():
        changes += _case_changes(root, key, description["entry"], manifest["cases"].get(key))
    again = {key.partition("@")[0] for key in descriptions}
    ids = {key: key.partition("@")[0] for key in sorted(manifest["cases"])}
    removals = [
        k for k, i in ids.items() if i not in case_ids or (i in again and k not in descriptions)
    ]
    return changes + [Change(case_id, "", "removed") for case_id in removals]


def _case_changes(root: Path, case_id: str, new: Mapping[str, Any], old: Any) -> list[Change]:
    if old is None:
        return [Change(case_id, "", "new")]
    new_table, old_table = new.get("tensors", {}), old.get("tensors", {})
    out = [Change(case_id, name, "removed") for name in sorted(set(old_table) - set(new_table))]
    before, after = _tensors(root, case_id), _tensors(root / CANDIDATES, case_id)
    for name, entry in new_table.items():
        if name not in old_table:
            out.append(Change(case_id, name, "new"))
        elif entry != old_table[name]:
            elements, ulps = _distance(name, before, after)
            out.append(Change(case_id, name, "changed", elements, ulps))
    if not out and new != old:
        out.append(Change(case_id, "", "same bits"))
    return out


def _tensors(root: Path, case_id: str) -> dict[str, npt.NDArray[Any]]:
    """The stored tensors of a case; empty if files are missing, since then digests are compared."""
    path = root / tensors_of(case_id)
    try:
        return read_tensors(read_bounded(path, TENSORS_LIMIT))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise GoldenError(f"case {case_id}: {path} cannot be read: {error}; restore it") from error


def _distance(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[int, int | None]:
    old, new = before.get(name), after.get(name)
    digests = old is None or new is None
    if digests:
        old, new = before.get(DIGEST + name), after.get(DIGEST + name)
    if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
        return (0 if new is None else int(new.size)), None
    differ = old != new
    count = int(differ.sum())
    if digests or not count:
        return count, None
    form = _form(name, old.dtype)
    if form is None:
        return count, None
    return count, int(np.abs(form.key(old[differ]) - form.key(new[differ])).max())


def _form(name: str, dtype: Any) -> Form | None:
    """The form of a stored tensor, by its name and type."""
    spec = TENSORS.get(name.rpartition(".")[2])
    if spec is not None and spec.form in (E4M3, F32):  # which no type says
        return spec.form
    forms = {"uint16": BF16, "uint8": BYTE, "int32": INT32, "int64": INT64}
    return forms.get(str(dtype))


def manifest_or_empty(root: Path) -> dict[str, Any]:
    """The manifest; a manifest without cases if there is none yet."""
    path = root / "manifest.json"
    return read_manifest(path) if path.exists() else empty_manifest(BASE.revision)
