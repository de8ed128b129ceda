"""The golden of a case, from the oracle: tensors of every kind, and their generator."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

import megamoe
from megamoe.cases import Case, kind_of
from megamoe.cases.kind import OracleGolden
from megamoe.cases.stored import inputs_of, is_stored
from megamoe.golden.places import GoldenError
from megamoe.spec.contract import CONTRACTS, Contract
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

Array = npt.NDArray[Any]

SOURCES: Final = (
    "cases/block_weights.py", "cases/counter.py", "cases/directed.py", "cases/forms.py",
    "cases/recipes.py", "cases/streams.py", "cases/sweep.py", "cases/weights.py",
    "spec/accumulators.py", "spec/clauses.py", "spec/contract.py", "spec/dialects.py",
    "spec/formats.py", "spec/features.py", "spec/problem.py",
)  # fmt: skip
"""Besides the oracle and the kinds: the modules that decide the bits of a golden."""


def regenerate(case: Case) -> dict[str, Any]:
    """The inputs of ``case`` by name; of a forward or property case the problem's fields."""
    return inputs_of(case) if is_stored(case) else kind_of(case.kind).inputs(case)


def digest_of(inputs: Mapping[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and bytes of regenerated inputs, in the order of names.

    The weights are those of experts that an id names: the others are zero pages, never read.
    """
    digest = hashlib.sha256()
    experts = None
    if "topk_ids" in inputs and "w13_weight" in inputs:
        ids = inputs["topk_ids"].numpy()
        experts = np.unique(ids[(ids >= 0) & (ids < inputs["w13_weight"].shape[0])])
    for name in sorted(inputs):
        value = inputs[name]
        if not isinstance(value, torch.Tensor):
            digest.update(f"{name}={value!r};".encode())
            continue
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        array = bits(value)
        parts = array[experts] if experts is not None and name.startswith("w") else (array,)
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def rows_of(problem: Problem, rows: Sequence[int] | None) -> Problem:
    """The problem of some tokens only: a token's output depends on that token alone."""
    if rows is None:
        return problem
    at = torch.tensor(list(rows), dtype=torch.long)
    return problem.at_rows(at)


def make(
    case: Case, inputs: Mapping[str, Any] | None = None, classes: Sequence[str] | None = None,
    contract: Contract | None = None,
) -> OracleGolden:  # fmt: skip
    """Tensors of the golden of ``case`` (rows ``case.rows`` only), by name.

    ``inputs`` are the inputs where they are at hand. ``classes``: the accumulator classes whose
    envelopes are wanted of a forward; with fewer than all of them there is no proof of zero
    freedom. ``contract``: by default the case's first. Raises :class:`GoldenError` where a case
    that is declared zero-freedom leaves freedom.
    """
    contract = contract or CONTRACTS[case.revisions[0]]
    inputs = regenerate(case) if inputs is None else inputs
    return kind_of(case.kind).golden(case, inputs, classes, contract)


@cache
def generator() -> dict[str, Any]:
    """The generator of goldens here: versions, and digests of the sources that decide the bits."""
    package = Path(megamoe.__file__).parent
    decisive = [package / name for name in SOURCES]
    for folder in ("kinds", "oracle"):
        decisive += sorted((package / folder).rglob("*.py"))
    # One that is missing must not pass for one that decides nothing.
    lacking = [path for path in decisive if not path.is_file()]
    if lacking:
        raise GoldenError(
            f"{lacking[0].relative_to(package)} is missing from the package {package}, and decides "
            "the bits of goldens; install megamoe again, or restore it"
        )
    sources = {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in decisive
    }
    return {
        "megamoe": megamoe.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "sources": sources,
    }
