"""The form of the JSON files under ``golden/``: manifest, candidates' entries, recorded bits.

This package writes them, and people keep, edit, merge and cut them. A fault in one is an error of
one line before anything is done with it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megamoe import schema
from megamoe.cases import KINDS
from megamoe.files import CANDIDATE_LIMIT, MANIFEST_LIMIT, RECORDED_LIMIT, read_json
from megamoe.golden.places import GoldenError, id_fault, key_fault, tensors_of
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.stages import STAGES

SCHEMA: Final = 1
"""The schema version of the manifest and of recorded bits."""
RESTORE: Final = "restore golden/ from version control"
Y_LIMIT: Final = 2048
"""Bytes of a recorded ``y`` up to which it is kept whole, so that a moved element can be named."""

_TENSOR: Final = schema.Object(
    {
        "dtype": str, "shape": schema.Items(schema.natural), "sha256": str,
        "stored": schema.OneOf(("full", "digests")),
    }
)  # fmt: skip
_ENTRY: Final = schema.Object(
    {"kind": schema.OneOf(KINDS), "definition": str, "inputs": str, "generator": str},
    {
        "zero_freedom": bool, "rows": schema.OrNull(schema.Items(schema.natural)),
        "file": str, "sha256": str, "tensors": schema.Each(_TENSOR),
        "also": schema.Items(schema.OneOf(tuple(CONTRACTS))),
    },
)  # fmt: skip
_GENERATOR: Final = schema.Object(optional={"sources": schema.Each(str)})
_MANIFEST: Final = schema.Object(
    {
        "contract": str,
        "generators": schema.Each(_GENERATOR),
        "cases": schema.Each(_ENTRY, key=key_fault),
    }
)
_CANDIDATE: Final = schema.Object({"entry": _ENTRY, "generator": _GENERATOR, "contract": str})


def y_fault(value: Any) -> str:
    """A recorded ``y``: base64 of 16-bit elements."""
    try:
        content = base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return "must be base64"
    right = len(content) <= Y_LIMIT and len(content) % 2 == 0
    return "" if right else f"must be base64 of 16-bit elements, at most {Y_LIMIT} bytes"


def _stage(name: str) -> str:
    return "" if name in STAGES else f"known stages: {', '.join(STAGES)}"


_RECORDING: Final = schema.Object(
    {
        "backend": str,
        "machine_class": str,
        "contract": str,
        "fingerprint": schema.Object(
            {"sources": str, "options": str, "binaries": schema.Each(str)}
        ),
        "cases": schema.Each(
            schema.Object(
                {"inputs": str, "stages": schema.Each(str, key=_stage)}, {"y": y_fault}
            ),
            key=id_fault,
        ),
    },
    {"accumulator": str, "declined": schema.Each(str, key=id_fault), "provenance": dict},
)  # fmt: skip


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest; :class:`GoldenError` where it is missing, damaged or of another schema."""
    try:
        manifest = read_json(path, MANIFEST_LIMIT)
    except FileNotFoundError:
        raise GoldenError(
            f"{path.parent} has no {path.name}; {RESTORE}, or name another directory with --golden"
        ) from None
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path.name} cannot be read as JSON ({error}); {RESTORE}") from error
    _of_schema(path.name, manifest)
    if not isinstance(manifest.get("cases"), dict) or "contract" not in manifest:
        raise GoldenError(f"{path.name} has no cases or no contract; {RESTORE}")
    if fault := schema.fault(manifest, _MANIFEST):
        raise GoldenError(f"{path.name}: {fault}; {RESTORE}")
    for case_id, entry in manifest["cases"].items():
        if fault := _entry_fault(case_id, entry):
            raise GoldenError(f"{path.name}: case {case_id}: {fault}; {RESTORE}")
    return dict(manifest)


def manifest_of(root: Path) -> dict[str, Any]:
    """The manifest in ``root``, if its contract is one that this megamoe knows."""
    manifest = read_manifest(root / "manifest.json")
    if manifest["contract"] not in CONTRACTS:
        raise GoldenError(
            f"the goldens are of contract {manifest['contract']}, this megamoe knows "
            f"{', '.join(CONTRACTS)}; use matching versions of the two"
        )
    return manifest


def forward_inputs(root: Path) -> dict[str, str]:
    """Case -> digest of its inputs: the forward cases of the manifest in ``root``."""
    goldens = read_manifest(root / "manifest.json")["cases"].items()
    return {k: v["inputs"] for k, v in goldens if v["kind"] == "forward" and "@" not in k}


def read_candidate(path: Path, case_id: str) -> dict[str, Any]:
    """A candidate's description, as ``golden record`` wrote it, or :class:`GoldenError`."""
    where = f"candidate {schema.plain(case_id)}: {path.name}"
    again = "delete it, and record the case again with `megamoe golden record`"
    if fault := key_fault(case_id):
        raise GoldenError(f"{where}: {fault}; {again}")
    try:
        description = read_json(path, CANDIDATE_LIMIT, follow=False)
    except (OSError, ValueError) as error:
        raise GoldenError(f"{where} cannot be read as JSON ({error}); {again}") from error
    fault = schema.fault(description, _CANDIDATE) or _entry_fault(case_id, description["entry"])
    if fault:
        raise GoldenError(f"{where}: {fault}; {again}")
    return dict(description)


def read_recording(path: Path, slug_of: Any) -> dict[str, Any]:
    """Recorded bits, whose backend and machine must be those that the path says."""
    name = f"recorded/{path.parent.name}/{path.name}"
    data = read_bits(path, name, _RECORDING)
    place = f"{slug_of(data['backend'])}/{data['machine_class']}.json"
    if place != f"{path.parent.name}/{path.name}":
        raise GoldenError(
            f"{name}: by its backend and machine_class it is {schema.preview(place)}; {RESTORE}, "
            "or give it that name"
        )
    return data


def read_bits(path: Path, name: str, form: schema.Form) -> dict[str, Any]:
    """A file of bits, recorded or predicted; :class:`GoldenError` where it is none of its form.

    ``FileNotFoundError`` passes: what its absence means, the caller knows.
    """
    try:
        data = read_json(path, RECORDED_LIMIT)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise GoldenError(f"{name} cannot be read as JSON ({error}); {RESTORE}") from error
    _of_schema(name, data)
    if fault := schema.fault(data, form):
        raise GoldenError(f"{name}: {fault}; {RESTORE}")
    return dict(data)


def _of_schema(name: str, data: Any) -> None:
    version = data.get("schema") if isinstance(data, dict) else None
    if isinstance(version, bool) or version != SCHEMA:
        raise GoldenError(
            f"{name} has schema {schema.preview(version)}, this megamoe reads {SCHEMA}; use the "
            "version that wrote it"
        )


def _entry_fault(case_id: str, entry: Mapping[str, Any]) -> str:
    """The part of a well-formed entry that does not fit its case; '' if all fits."""
    if not case_id.startswith(f"{entry['kind']}/"):
        return f"its kind is {entry['kind']}"
    keys = [key for key in ("file", "sha256", "tensors") if key in entry]
    if keys and len(keys) < 3:
        return f"it has {keys[0]}, but not all of file, sha256 and tensors"
    file = tensors_of(case_id)
    if keys and entry["file"] != file:
        return f"its file is {schema.preview(entry['file'])}, and can only be {file}"
    return ""
