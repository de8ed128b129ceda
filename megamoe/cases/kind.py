"""A case and its kind: one record, in a module of its own under :mod:`megamoe.kinds`.

Code that reads cases, computes goldens or judges calls :func:`kind_of`, which imports the module at
that time. So the record may use all of these rooms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megamoe.environment import has_gpu
from megamoe.spec.contract import CONTRACTS, Contract

if TYPE_CHECKING:
    import numpy.typing as npt

    from megamoe.judge import Verdict
    from megamoe.worker.exchange import Caller, CallResult

KINDS: Final = ("staging", "eplb", "forward", "errors", "layout", "property", "ep")
"""Names of the modules, in the order in which lists and reports have them."""

SIZES: Final = ("tokens", "hidden", "intermediate", "experts", "top_k", "logical", "physical")
"""Parameters of a case that reports call its shape."""

Inputs = Mapping[str, Any]
Params = dict[str, Any]


class CaseError(ValueError):
    """A case file is wrong, or a case is unknown; the message is one line and says how to mend."""


@dataclass(frozen=True)
class Case:
    """One case, with every default filled in."""

    id: str
    """kind/name: the name under which it is selected, stored and reported."""
    kind: str
    tier: str
    """"quick" cases run in both tiers, "full" ones in the full tier only."""
    breaks: str
    """One sentence: what is broken if this case fails."""
    seed: int
    """The seed of the input streams; by default the CRC-32 of the id."""
    params: Mapping[str, Any]
    """Parameters of the kind, validated; recipes pass through to :mod:`megamoe.cases.recipes`."""
    source: Path

    @property
    def name(self) -> str:
        return self.id.partition("/")[2]

    @property
    def rows(self) -> list[int] | None:
        """Token rows that are stored and judged; None: all of them."""
        rows = self.params.get("rows")
        return None if rows is None else list(rows)

    @property
    def revisions(self) -> list[str]:
        """Contracts that have rules for the whole case; its golden is stored under the first."""
        return [
            name for name, contract in CONTRACTS.items() if form_of(self.kind).knows(self, contract)
        ]

    def definition(self) -> str:
        """sha256 of everything that decides the golden (not of ``breaks``, tier or file)."""
        plain = {"id": self.id, "seed": self.seed, "params": dict(self.params)}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class OracleGolden:
    """The oracle's result for one case."""

    tensors: dict[str, npt.NDArray[Any]]
    zero_freedom: bool = False


@dataclass(frozen=True)
class Parts:
    """The stages of one call: plain data, since a stranger's ``replay.py`` goes by it too."""

    result: tuple[str, ...] = ("y",)
    """The outputs: several as a tuple; a single one by itself, or with others in a mapping by
    name."""
    written: Mapping[str, str] = field(default_factory=dict)
    """Stage -> the tensor that the call writes it into."""
    rows: str = ""
    """The input whose rows are the batch; the rows beyond them form the stage ``beyond``."""


def _complete(where: str, params: Params) -> None:
    """Nothing to add."""


def oracle_tensors(
    case: Case, inputs: Inputs, golden: OracleGolden, contract: Contract
) -> dict[str, Any]:
    """The golden as ``oracle.*``."""
    return {f"oracle.{name}": tensor for name, tensor in golden.tensors.items()}


@dataclass(frozen=True)
class Form:
    """What a case of a kind may say. To read cases takes no more, and no torch."""

    keys: Mapping[str, type | tuple[type, ...]]
    """Parameters that a case may have, and their types."""
    required: tuple[str, ...]
    """The required keys."""
    needs: str | None
    """The callable that a backend must offer; None if that depends on the case."""
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The values of a parameter that has a few."""
    complete: Callable[[str, Params], None] = _complete
    """``complete(where, params)``: defaults, and the checks between parameters."""
    is_forward: bool = False
    """The inputs are the fields of a problem, and the golden is the whole layer's."""
    features: Callable[[Case], tuple[str, ...]] = lambda case: ()
    """The features among :data:`megamoe.spec.features.FEATURES` that the case asks for."""
    knows: Callable[[Case, Contract], bool] = lambda case, contract: contract.knows(case.kind)
    """``knows(case, contract)``: whether the contract has rules for everything in the case."""


@dataclass(frozen=True, kw_only=True)
class Kind(Form):
    """All that is particular to a kind."""

    inputs: Callable[[Case], dict[str, Any]]
    """The regenerated inputs by name, scalars included."""
    golden: Callable[[Case, Inputs, Sequence[str] | None, Contract], OracleGolden]
    """``golden(case, inputs, classes, contract)``: the oracle's result for them."""
    judge: Callable[[Any, Case], Verdict] | None = None
    """``judge(runner, case)``; None: one call, by ``ask`` and ``judge_outcome``. The runner puts
    their exceptions into words."""
    ask: Callable[[Caller, Case, Inputs], CallResult] | None = None
    """One call that returns tensors; None if the case has no such call."""
    judge_outcome: Callable[..., Verdict] | None = None
    """``judge_outcome(runner, case, golden, inputs, outcome)``: the golden's verdict of that
    call. A property's law takes more calls than one, so it is no part of it."""
    lacks: Callable[[Any, Case, Any, Inputs], str] = lambda identity, case, golden, inputs: ""
    """``lacks(identity, case, golden, inputs)``: what this backend does not have and these inputs
    ask; empty where it can be asked."""
    parts: Parts = Parts()  # it is frozen
    """The outputs of one call, for ``ab`` and ``bisect``."""
    dump: Callable[[Case, Inputs, OracleGolden, Contract], dict[str, Any]] | None = oracle_tensors
    """``dump(case, inputs, made, contract)``: the tensors for other tools besides the inputs, by
    full names; a tensor with the name of an input replaces it. None: there are no tensors."""


def kind_of(name: str) -> Kind:
    """The record of a kind; ``ValueError`` naming the known ones otherwise."""
    if name not in KINDS:
        raise ValueError(f"unknown kind {name!r}; known: {', '.join(KINDS)}")
    kind: Kind = import_module(f"megamoe.kinds.{name}").KIND
    return kind


def form_of(name: str) -> Form:
    """The form of a kind's cases: of :mod:`megamoe.cases.forms`, or of the kind's module."""
    form: Form | None = import_module("megamoe.cases.forms").FORMS.get(name)
    return kind_of(name) if form is None else form


# --- checks that several kinds make -----------------------------------------------------------

CAPACITY_ALIGNMENT: Final = 384
"""Capacity of the symmetric buffer is aligned up to this (the kernel's block sizes divide it)."""


def complete_capacity(where: str, params: Params) -> None:
    """A buffer that holds the tokens."""
    blocks = max(1, -(-params["tokens"] // CAPACITY_ALIGNMENT))
    params.setdefault("capacity", blocks * CAPACITY_ALIGNMENT)
    if params["capacity"] < params["tokens"]:
        raise CaseError(
            f"{where}: capacity {params['capacity']} is below tokens {params['tokens']}"
        )


def complete_distinct(where: str, params: Params) -> None:
    """Check that ``distinct``, if it is set, is a number of the tokens."""
    if not 1 <= params.get("distinct", 1) <= max(1, params["tokens"]):
        raise CaseError(f"{where}: distinct is {params['distinct']}; it must be 1 to tokens")


ONLY_CUDA: Final = "a case with so many rows"
"""What of a case with ``cuda_only`` needs a GPU."""


def needs_cuda(what: str) -> str:
    """Why ``what`` is not judged on a CPU: the machine has no GPU, or the run does not use it."""
    rest = "; use --device cuda" if has_gpu() else ", and the machine has none"
    return f"{what} needs a CUDA device{rest}"


def lacks_cuda(case: Case, device: str) -> bool:
    """Whether the case is for a GPU alone, and ``device`` is none."""
    return bool(case.params.get("cuda_only")) and not device.startswith("cuda")


def complete_unpadded(where: str, params: Params) -> None:
    """Check that ``unpadded``, if it is set, is a number of the tokens."""
    if not 0 <= params.get("unpadded", 0) <= params["tokens"]:
        raise CaseError(f"{where}: unpadded is {params['unpadded']}; it must be 0 to tokens")


def knows_padding(case: Case, contract: Contract) -> bool:
    """A case with padding rows belongs to the contracts that know padding rows."""
    has_rules = contract.knows(case.kind)
    return has_rules and (contract.padding_known.value or "unpadded" not in case.params)
