"""What moved between two sides' bits, stage by stage, and what the goldens say of a side's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from megamoe.cases import Case
from megamoe.compare.running import Answer, Running
from megamoe.files import write_atomically
from megamoe.golden import GoldenError, Store, digest_of, make
from megamoe.judge import BadOutput, Finding, GoldenLacks, Place, Verdict, bitwise
from megamoe.spec.contract import REVISIONS
from megamoe.spec.formats import unpack_sf
from megamoe.spec.forms import BF16, BYTE, E4M3, F32, INT32, INT64, UE8M0, Form
from megamoe.suite.kinds import KINDS
from megamoe.suite.runner import Runner

Array = npt.NDArray[Any]

ORDER: Final = (
    "ids", "load", "x_sf", "x", "topk_idx", "topk_weights", "beyond", "l2_acts_sf", "l2_acts",
    "w13", "w13_sf", "w2", "w2_sf", "y",
)  # fmt: skip
"""Stages in the order in which they are computed: the first that moved is where to look."""
_FORMS: Final[Mapping[str, Form]] = {
    "y": BF16, "x": E4M3, "x_sf": UE8M0, "l2_acts": E4M3, "l2_acts_sf": UE8M0,
    "topk_weights": F32, "topk_idx": INT64, "load": INT32, "beyond": INT64, "w13": BYTE,
    "w2": BYTE, "w13_sf": UE8M0, "w2_sf": UE8M0,
}  # fmt: skip
_PACKED: Final = ("x_sf", "w13_sf", "w2_sf")
"""Four scale factors are one element."""
_AXES: Final[Mapping[str, tuple[tuple[str, ...], int]]] = {
    "y": (("token", "channel"), 1), "x": (("token", "channel"), 1),
    "x_sf": (("token", "channel"), 32), "l2_acts": (("token", "slot", "channel"), 1),
    "l2_acts_sf": (("token", "slot", "channel"), 32), "topk_idx": (("token", "slot"), 1),
    "topk_weights": (("token", "slot"), 1), "ids": (("token", "slot"), 1),
    "load": (("expert",), 1), "beyond": (("row",), 1), "w13": (("expert", "row", "channel"), 1),
    "w2": (("expert", "row", "channel"), 1), "w13_sf": (("expert", "row", "channel"), 32),
    "w2_sf": (("expert", "row", "channel"), 32),
}  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """One stage on two sides."""

    elements: int
    moved: int = 0
    """Elements whose bits differ, payloads of NaN and signs of zero included."""
    max_ulps: int | None = 0
    """The largest distance; None: NaN on one side only."""
    finding: Finding | None = None
    text: str = ""
    """What is wrong where the two cannot be compared element by element."""


# --- on the disk ------------------------------------------------------------------------------


def write_bits(path: Path, bits: Mapping[str, Array]) -> None:
    """Keep ``{stage: integers}`` as safetensors. Raises ``OSError``."""
    whole = {name: np.ascontiguousarray(array) for name, array in bits.items()}
    write_atomically(path, save(whole))


def read_bits(path: Path) -> dict[str, Array]:
    """``{stage: integers}`` as they were kept, in the order of computation."""
    return in_order(load(path.read_bytes()))


def in_order(bits: Mapping[str, Array]) -> dict[str, Array]:
    """The same in the order of computation; unknown stages last."""
    return {name: bits[name] for name in sorted(bits, key=place)}


def place(name: str) -> int:
    """Where a stage stands in the order of computation."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


# --- between two ------------------------------------------------------------------------------


def compare(
    left: Mapping[str, Array], right: Mapping[str, Array], ids: Array | None
) -> dict[str, Moved]:
    """Every stage that both sides show. A stage shown by one side only says nothing of it."""
    shared = [name for name in left if name in right]
    return {name: stage_moved(name, left[name], right[name], ids) for name in shared}


def stage_moved(name: str, left: Array, right: Array, ids: Array | None) -> Moved:
    """``right`` against ``left``, bit for bit."""
    if left.shape != right.shape or left.dtype.itemsize != right.dtype.itemsize:
        text = f"{left.dtype} {left.shape} became {right.dtype} {right.shape}"
        return Moved(max(left.size, right.size), max(left.size, right.size, 1), None, text=text)
    form, size = _FORMS.get(name), left.dtype.itemsize
    a: Array = left.astype(np.int64)
    b: Array = right.astype(np.int64)
    if form is None or size != (4 if name in _PACKED else form.width // 8):
        form = INT64 if size == 8 else INT32  # not as a stage is: whole numbers
    elif name in _PACKED:
        a, b = unpack_sf(left), unpack_sf(right)
    elif form.signed_zero or form in (UE8M0, BYTE):
        a, b = _unsigned(left), _unsigned(right)
    count = int((a != b).sum())
    if not count:
        return Moved(int(a.size))
    axes, per = _AXES.get(name, (("row",) * a.ndim, 1))
    if len(axes) != a.ndim:
        axes = ("row",) * a.ndim
    named = sum(axis in ("token", "slot") for axis in axes)
    known = ids if ids is not None and a.shape[:named] == ids.shape[:named] else None
    finding = bitwise(name, form, b, a, Place(axes, per, None, known))
    far = finding.worst.ulps if finding.worst else 0  # 0: only payloads of NaN differ
    return Moved(int(a.size), count, far, finding)


def _unsigned(x: Array) -> Array:
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def signature(digests: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Stages that both show and whose digests differ, in the order of computation."""
    names = [name for name in digests if name in other and digests[name] != other[name]]
    return sorted(names, key=place)


# --- against the golden -----------------------------------------------------------------------


class Judge:
    """The suite's judge, for what a side gave back of one call."""

    def __init__(self, root: Path) -> None:
        self._stores = {name: Store(root, make, c) for name, c in REVISIONS.items()}

    def verdict(
        self, case: Case, given: Mapping[str, Any], answer: Answer, side: Running
    ) -> tuple[Verdict, dict[str, int]]:
        """The golden's verdict, and how many elements of each stage are outside.

        A property case is judged as the forward it makes: its law takes more calls than one. Raises
        :class:`megamoe.golden.GoldenError` where there is no usable golden, and
        :class:`megamoe.judge.BadOutput` where what was given back is none of the contract's.
        """
        store = self._stores[side.identity.contract]
        golden = store.load(case, digest_of(given))
        judged = KINDS[case.kind].judge_returned
        assert judged is not None
        try:
            verdict = judged(Runner(side.worker, store), case, golden, given, answer.returned)
        except (GoldenError, BadOutput, MemoryError):
            raise
        except GoldenLacks as error:
            raise GoldenError(str(error)) from error
        except Exception as error:
            raise GoldenError(f"case {case.id}: {type(error).__name__}: {error}") from error
        outside: dict[str, int] = {}
        for finding in verdict.findings:
            if finding.outside:
                outside[finding.stage] = finding.outside
            elif "beyond" not in answer.bits:
                outside.setdefault(finding.stage, 1)
        if "beyond" in answer.bits:
            outside["beyond"] = int((answer.bits["beyond"] != 0).sum())
        return verdict, outside


def worst_dict(name: str, finding: Finding | None) -> dict[str, Any] | None:
    """The element farthest off, JSON-able: ``expected`` is the left side's, or the good one's."""
    if finding is None or finding.worst is None:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(asdict(finding.worst)))
    return plain
