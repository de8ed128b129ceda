"""The golden store: one safetensors file a case, and one manifest that vouches for all of them.

Reading only; ``bless`` is the one writer. Small tensors are stored in full; of a larger one, a
64-bit digest of each row (or row and slot). A digest says whether a row is right; which element is
wrong, the oracle says live, and its answer must have the stored digests.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from megamoe.cases import Case, kind_of
from megamoe.cases.kind import OracleGolden
from megamoe.files import TENSORS_LIMIT, read_bounded
from megamoe.golden.computed import generator
from megamoe.golden.documents import RESTORE, SCHEMA, manifest_of
from megamoe.golden.places import GoldenError, key_of, tensors_of
from megamoe.spec.contract import NEWEST, Contract
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]

FULL_LIMIT: Final = 64 * 1024
"""Bytes up to which a tensor is stored in full."""
DIGEST: Final = "digest:"
"""Prefix of a tensor of digests, uint64, with the leading axes of the tensor it stands for."""


def canonical(name: str, tensor: Array) -> Array:
    """``tensor`` with one payload for every NaN, so that equal digests mean equal by the judge."""
    spec = TENSORS.get(name.rpartition(".")[2])
    return tensor if spec is None else spec.form_of(tensor).one_nan(tensor)


def _digest_axes(name: str) -> int:
    """Leading axes of a block; a part of an envelope goes by rows."""
    return TENSORS[name].digest_axes if name in TENSORS else 1


def row_digests(name: str, tensor: Array) -> npt.NDArray[np.uint64]:
    """64-bit BLAKE2b of each block: (token, slot) for activations, the first axis otherwise."""
    lead = tensor.shape[: _digest_axes(name)]
    blocks = np.ascontiguousarray(canonical(name, tensor)).reshape(int(np.prod(lead)), -1)
    digests = [
        int.from_bytes(hashlib.blake2b(block.tobytes(), digest_size=8).digest(), "little")
        for block in blocks
    ]
    return np.array(digests, dtype=np.uint64).reshape(lead)


def pack(golden: OracleGolden) -> tuple[bytes, dict[str, Any]]:
    """File content and the manifest's table of its tensors."""
    tensors: dict[str, Array] = {}
    table: dict[str, Any] = {}
    for name, tensor in sorted(golden.tensors.items()):
        full = tensor.nbytes <= FULL_LIMIT or not tensor.ndim
        key = name if full else DIGEST + name
        tensors[key] = np.ascontiguousarray(tensor) if full else row_digests(name, tensor)
        table[name] = {
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "stored": "full" if full else "digests",
            "sha256": hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest(),
        }
    return save_tensors(tensors), table


def entry_of(
    case: Case,
    golden: OracleGolden,
    input_digest: str,
    content: bytes,
    table: Any,
    revisions: Sequence[str],
) -> dict[str, Any]:
    """The manifest's entry of one golden; cases without tensors have no file.

    ``revisions``: the contracts under which it is the case's golden. It is kept under the first.
    """
    first, *also = revisions
    entry: dict[str, Any] = {
        "kind": case.kind,
        "definition": case.definition(),
        "inputs": input_digest,
        "generator": generator_id(),
    }
    if kind_of(case.kind).is_forward:
        entry["zero_freedom"] = golden.zero_freedom
        entry["rows"] = case.rows
    if also:
        entry["also"] = also
    if golden.tensors:
        entry["file"] = tensors_of(key_of(case.id, "" if first == case.revisions[0] else first))
        entry["sha256"] = hashlib.sha256(content).hexdigest()
        entry["tensors"] = table
    return entry


def generator_id() -> str:
    """Short digest of :func:`.computed.generator`, under which the manifest keeps it."""
    text = json.dumps(generator(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class StoredGolden:
    """The stored golden of one case; a tensor stored as digests comes from the oracle on demand."""

    case: Case
    zero_freedom: bool
    full: Mapping[str, Array]
    digests: Mapping[str, npt.NDArray[np.uint64]]
    live: Callable[..., OracleGolden]
    contract: Contract
    _by_class: dict[str, OracleGolden] = field(default_factory=dict, repr=False)
    """Tensors by accumulator class; an empty name holds the tensors that belong to no class."""
    brief: bool = False
    """Whether to name no element if that would take the oracle."""
    is_calibrated: bool = True
    """Cases are chosen so that the statistic is silent about correct kernels."""

    def names(self) -> Sequence[str]:
        return [*self.full, *self.digests]

    def matches(self, name: str, actual: Array, nan: Array | None = None) -> bool:
        """Whether ``actual`` has the stored digests; False if the tensor is stored in full."""
        expected = self.digests.get(name)
        return expected is not None and bool((row_digests(name, actual) == expected).all())

    def other_rows(self, name: str, actual: Array) -> list[int] | None:
        """The rows with a different digest, for a brief judgement; None if elements are at hand."""
        expected = self.digests.get(name)
        if not self.brief or expected is None:
            return None
        other = row_digests(name, actual) != expected
        return [int(r) for r in np.nonzero(other.reshape(len(other), -1).any(axis=1))[0]]

    def get(self, name: str) -> Array:
        """One tensor. Raises :class:`GoldenError` if store and oracle disagree."""
        if name in self.full:
            return self.full[name]
        of_class = name.rpartition(".")[0]
        if of_class not in self._by_class:
            # A tensor of one class does not need the envelopes of all: they are most of the work.
            self._by_class[of_class] = self.live(
                self.case,
                classes=[of_class] if of_class else [],
                contract=self.contract,
            )
        tensor = self._by_class[of_class].tensors.get(name)
        if tensor is None or not self.matches(name, tensor):
            raise GoldenError(
                f"case {self.case.id}: the oracle's {name} is not the stored golden's; run "
                f"`megamoe golden verify --case {self.case.id}`"
            )
        return tensor


class Store:
    """``golden/`` as it lies on the disk."""

    def __init__(
        self, root: Path, live: Callable[..., OracleGolden], contract: Contract = NEWEST
    ) -> None:
        self.root = root
        self.live = live
        self.contract = contract
        self.manifest = manifest_of(root)

    @property
    def cases(self) -> Mapping[str, Any]:
        """Key of a golden -> manifest entry."""
        entries: Mapping[str, Any] = self.manifest["cases"]
        return entries

    def load(self, case: Case, input_digest: str | None = None) -> StoredGolden:
        """The golden of ``case``; every reason why it is unusable is a :class:`GoldenError`.

        ``input_digest`` of the regenerated inputs is checked if the caller passes it.
        """
        key = self.key(case)
        entry = self.entry(case)
        if input_digest is not None and entry["inputs"] != input_digest:
            raise GoldenError(
                f"case {case.id}: its inputs were regenerated with other bits than the golden's; "
                "restore megamoe/cases/recipes.py, or record and bless the case again"
            )
        content = self._content(case, key, entry)
        try:
            tensors = read_tensors(content)
        except ValueError as error:
            raise GoldenError(
                f"case {case.id}: {entry['file']} is no safetensors file ({error}); {RESTORE}"
            ) from error
        if fault := _unlike(tensors, entry["tensors"]):
            raise GoldenError(
                f"case {case.id}: {entry['file']} {fault}, by the manifest; {RESTORE}"
            )
        full = {n: t for n, t in tensors.items() if not n.startswith(DIGEST)}
        digests = {n.removeprefix(DIGEST): t for n, t in tensors.items() if n.startswith(DIGEST)}
        return StoredGolden(
            case, entry.get("zero_freedom", False), full, digests, self.live, self.contract
        )

    def under(self, contract: Contract) -> Store:
        """The same store for another contract."""
        other = copy.copy(self)
        other.contract = contract
        return other

    def key(self, case: Case) -> str:
        """The key of the case's golden under this contract."""
        revision = self.contract.revision
        if revision not in case.revisions:
            raise GoldenError(
                f"case {case.id} is not of contract {revision}; it is of "
                f"{', '.join(case.revisions)}: ask for one of these with --contract"
            )
        if case.id not in self.cases:
            raise GoldenError(
                f"case {case.id}: not in the manifest; record and bless it: "
                f"`megamoe golden record --case {case.id}`"
            )
        if revision == case.revisions[0]:
            return case.id
        for first in ("", *case.revisions[1:]):
            key = key_of(case.id, first)
            entry = self.cases.get(key, {})
            if entry and revision in (first, *entry.get("also", ())):
                return key
        raise GoldenError(
            f"case {case.id}: the manifest has no golden of contract {revision}; record and bless "
            f"it: `megamoe golden record --case {case.id}`"
        )

    def entry(self, case: Case) -> Mapping[str, Any]:
        """The manifest's entry, if it is of this very case."""
        entry: Mapping[str, Any] = self.cases[self.key(case)]
        if entry["definition"] != case.definition():
            raise GoldenError(
                f"case {case.id}: {case.source.name} says something else than when its golden was "
                "blessed; restore the case, or record and bless it again"
            )
        return entry

    def _content(self, case: Case, key: str, entry: Mapping[str, Any]) -> bytes:
        if "file" not in entry:
            raise GoldenError(f"case {case.id}: its golden has no tensors; {RESTORE}")
        path = self.root / tensors_of(key)
        try:
            content = read_bounded(path, TENSORS_LIMIT)
        except (OSError, ValueError) as error:
            why = "is missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error}"
            raise GoldenError(f"case {case.id}: {entry['file']} {why}; {RESTORE}") from error
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise GoldenError(
                f"case {case.id}: {entry['file']} is damaged (sha256 does not match); {RESTORE}"
            )
        return content


def read_tensors(content: bytes) -> dict[str, Array]:
    """The tensors of a safetensors file; ``ValueError`` of one line for any other file."""
    try:
        return dict(load_tensors(content))
    except Exception as error:  # its own error, or a KeyError for a dtype that NumPy lacks
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _unlike(tensors: Mapping[str, Array], table: Mapping[str, Any]) -> str:
    """The part of ``tensors`` that differs from the manifest's table; '' if nothing does."""
    expected = {(n if t["stored"] == "full" else DIGEST + n): (n, t) for n, t in table.items()}
    if odd := sorted(set(expected) ^ set(tensors)):
        return f"{'lacks' if odd[0] in expected else 'holds a tensor too many:'} {odd[0]!a}"
    for key, (name, entry) in expected.items():
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if key != name:
            dtype, shape = "uint64", shape[: _digest_axes(name)]
        if (str(tensors[key].dtype), tensors[key].shape) != (dtype, shape):
            return f"has {key!a} of another dtype or shape"
    return ""


def empty_manifest(contract: str) -> dict[str, Any]:
    """A manifest of no cases."""
    return {"schema": SCHEMA, "contract": contract, "generators": {}, "cases": {}}


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Canonical form: sorted, one key a line, so that a change shows as a small diff."""
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
