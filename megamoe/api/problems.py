"""What a person can put to a kernel: a case of the suite, or a problem of one's own shapes."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Final, ParamSpec

from megamoe.cases import Case, CaseError, golden_root, kind_of, load_cases, select
from megamoe.cases.forms import FORWARD
from megamoe.cases.load import case_of_params
from megamoe.cases.pattern import one_of
from megamoe.cases.recipes import forward_problem
from megamoe.golden import Store, StoredGolden, make, regenerate
from megamoe.spec.contract import CONTRACTS, NEWEST, Contract, contract
from megamoe.spec.problem import Problem
from megamoe.suggest import follow, hint

P = ParamSpec("P")
_NAME: Final = "own"
_STORED_KEYS: Final = ("family", "rows", "distinct", "cuda_only")
"""Keys of stored cases only."""
_UNCALIBRATED_KEYS: Final = ("weights", "octaves", "scaling", "log2_scale", "log2_step")
"""Keys of a routing recipe that make routing weights unlike those of the calibration."""


# --- cases of the suite -----------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedCase:
    """One case of the suite: its inputs, its golden, and what it is for."""

    case: Case
    root: Path
    """The directory ``golden/`` that it was read from."""

    @property
    def id(self) -> str:
        """``kind/name``."""
        return self.case.id

    @property
    def kind(self) -> str:
        """One of staging, eplb, forward, errors, layout and property."""
        return self.case.kind

    @property
    def breaks(self) -> str:
        """One sentence: what is broken if a kernel fails this case."""
        return self.case.breaks

    @property
    def contracts(self) -> tuple[str, ...]:
        """The contract revisions under which the case has a golden, the oldest first."""
        return tuple(self.case.revisions)

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        """The inputs by name, CPU tensors and scalars. Of a forward: the fields of the problem."""
        return regenerate(self.case)

    @cached_property
    def problem(self) -> Problem:
        """The forward call, on the CPU. ``CaseError`` for a case of another kind.

        Shapes and dtypes are those of :class:`megamoe.spec.problem.Problem`.
        """
        if not kind_of(self.kind).is_forward:
            raise CaseError(
                f"case {self.id} is of kind {self.kind} and has no problem; take its `inputs`"
            )
        return Problem(**self.inputs)

    @property
    def golden(self) -> StoredGolden:
        """The stored golden under the newest contract that knows the case."""
        return self.golden_under()

    def golden_under(self, revision: str | None = None) -> StoredGolden:
        """The stored golden under a contract revision. None: the newest that knows the case.

        ``get(name)`` gives one of ``names()`` as a NumPy array of bits. Raises ``GoldenError``
        where the case has no tensors (kind errors), or no golden under that revision.
        """
        rule = contract_for(revision, self.contracts, f"case {self.id}")
        return Store(self.root, make, rule).load(self.case)


def cases(
    pattern: str | None = None, *, kind: str | None = None, tier: str = "full",
    contract: str | None = None, golden: Path | str | None = None,
) -> list[Case]:  # fmt: skip
    """The cases of the suite, in the order of their files; each has ``id``, ``kind``, ``breaks``.

    ``pattern``: a glob over ids and names (``"forward/combine-*"``), or several with commas.
    ``tier``: ``"quick"`` or ``"full"``. ``contract``: only cases that this revision knows.
    ``golden``: another directory ``golden/``. ``CaseError`` where one of them matches nothing.
    """
    return select(load_cases(_root(golden)), kind, tier, pattern, contract)


def load_case(case_id: str, *, golden: Path | str | None = None) -> LoadedCase:
    """One case by its id (``"forward/combine-in-slot-order"``), or by its name alone.

    ``CaseError`` for one that no case has, and for a name that cases of several kinds have.
    """
    root = _root(golden)
    return LoadedCase(one_of(load_cases(root), case_id), root)


def _root(golden: Path | str | None) -> Path:
    return golden_root() if golden is None else Path(golden)


def contract_for(revision: str | None, revisions: tuple[str, ...], what: str) -> Contract:
    """The contract ``revision``; for None the newest of those that know ``what``."""
    if revision is None:
        return NEWEST if NEWEST.revision in revisions else CONTRACTS[revisions[-1]]
    rule = contract(revision)
    if revision not in revisions:
        raise ValueError(
            f"contract {revision} does not know {what}; these do: {', '.join(revisions)}"
        )
    return rule


# --- a problem of one's own -------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """How a problem was drawn."""

    case: Case
    call: str
    """The call of :func:`problem` that draws it again."""
    is_calibrated: bool
    """The statistic was calibrated on data of this kind."""


_ORIGINS: dict[int, Origin] = {}


def _refusing(draw: Callable[P, Problem]) -> Callable[P, Problem]:
    """``draw``, with a ``CaseError`` for a key that it lacks or does not know."""
    own = {n: p for n, p in inspect.signature(draw).parameters.items() if p.kind == p.KEYWORD_ONLY}
    required = [name for name, parameter in own.items() if parameter.default is parameter.empty]

    @wraps(draw)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> Problem:
        for name in keywords:
            if name not in own and name not in FORWARD.keys:
                names = sorted({*own, *FORWARD.keys} - {*_STORED_KEYS})
                text = f"problem: unknown key {name!r}{hint(name, names)}"
                raise CaseError(follow(text, f"known: {', '.join(names)}"))
        lacking = [name for name in required if name not in keywords]
        if lacking and not arguments:
            raise CaseError(f"problem: key {lacking[0]!r} is missing; give {', '.join(required)}")
        return draw(*arguments, **keywords)

    return wrapper


@_refusing
def problem(
    *, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, seed: int = 0,
    clamp: float | None = None, fast_math: bool = True,
    hidden_states: Mapping[str, Any] | None = None, weights: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None, **more: Any,
) -> Problem:  # fmt: skip
    """Draw one forward call of these sizes, on the CPU. The same arguments give the same bits.

    ``tokens`` T from 0 on; ``hidden`` H and ``intermediate`` I are multiples of 128; ``experts`` E;
    ``top_k`` K slots for each token. ``seed``: 0 to 2**64 - 1. ``clamp``: the bound of the
    activation, or None. ``fast_math``: silu by approximate exponential and reciprocal.

    ``hidden_states``, ``weights`` and ``routing`` are recipes, as in a case file: for example
    ``routing={"kind": "skewed", "mask_every": 4}``. :func:`megamoe.cases.recipes.hidden_states`,
    :func:`megamoe.cases.recipes.routing` and :func:`megamoe.cases.weights.expert_weights` list
    their keys. ``more``: any other key of a forward case (``activation``, ``capacity``,
    ``shared_recipe``, ...). Raises ``ValueError``, one line, for a size, a key or a recipe that
    means nothing.
    """
    recipes = {"hidden_recipe": hidden_states, "weights_recipe": weights, "routing_recipe": routing}
    params: dict[str, Any] = {
        "tokens": tokens, "hidden": hidden, "intermediate": intermediate, "experts": experts,
        "top_k": top_k, "clamp": "none" if clamp is None else clamp, "fast_math": fast_math,
        "family": "envelope", **{n: dict(r) for n, r in recipes.items() if r}, **more,
    }  # fmt: skip
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise CaseError(f"problem: seed is {seed!r}; it must be an integer from 0 to 2**64 - 1")
    name = f"{_NAME}-t{tokens}-h{hidden}-i{intermediate}-e{experts}-k{top_k}-seed{seed}"
    case = case_of_params("forward", name, seed, params, "problem")
    if extra := sorted({*more} & {*_STORED_KEYS}):
        raise CaseError(f"problem: {extra[0]} is a key of stored cases only; leave it out")
    try:
        sample = forward_problem(case)
    except (IndexError, KeyError, TypeError) as error:
        raise CaseError(f"problem: a recipe does not fit the sizes: {error}") from error
    sizes = f"tokens={tokens}, hidden={hidden}, intermediate={intermediate}, experts={experts}"
    call = f"megamoe.problem({sizes}, top_k={top_k}, seed={seed}"
    options = {
        "clamp": clamp, "fast_math": fast_math, "hidden_states": hidden_states,
        "weights": weights, "routing": routing, **more,
    }  # fmt: skip
    usual = {"clamp": None, "fast_math": True}
    more_text = "".join(
        f", {n}={v!r}" for n, v in options.items() if v is not None and v != usual.get(n, "")
    )
    plain = not (hidden_states or weights or sample.features)
    plain = plain and not {*(routing or {})} & {*_UNCALIBRATED_KEYS}
    _ORIGINS[id(sample)] = Origin(case, f"{call}{more_text})", plain)
    weakref.finalize(sample, _ORIGINS.pop, id(sample), None)
    return sample


def origin_of(sample: Problem) -> Origin | None:
    """How this very object was drawn; None for a problem that somebody else built."""
    return _ORIGINS.get(id(sample))
