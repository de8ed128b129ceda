"""The choice of the contract for a backend, with the reason.

A contract that the user asks for counts, if the backend computes it. Under ``auto`` the backend's
own contract counts. If it names several or none, the headers of the kernel that its process has
loaded decide; otherwise the newest contract counts. The worker reports its loaded packages and
their folders. Their files are read here, and nothing is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megamoe.spec import builds
from megamoe.spec.contract import CONTRACTS, NEWEST, contract
from megamoe.spec.dialects import DIALECTS

AUTO: Final = "auto"


class NoChoice(ValueError):
    """The backend names no contract that can be judged, or lacks the one that the user asks for;
    one line."""


@dataclass(frozen=True)
class Choice:
    """A revision to judge under."""

    revision: str
    why: str = ""
    """The reason for the choice; empty if the user asked for the contract."""


def choose(ready: Mapping[str, Any], request: str = AUTO) -> Choice:
    """The choice from a worker's first answer: its ``contracts``, and its ``packages`` if it has
    any.

    Raises :class:`NoChoice` if the backend does not compute the contract that the user asks for.
    """
    if request != AUTO:
        contract(request)  # ValueError for one that is not known
    contracts = ready.get("contracts")
    names = None if contracts is None else _revisions(contracts)
    if request != AUTO:
        if names is not None and request not in names:
            raise NoChoice(
                f"it computes contract {', '.join(names)}, not {request}; ask for one of these "
                "with --contract"
            )
        return Choice(request)
    if names is not None and len(names) == 1:
        return Choice(names[0], "the backend says so")
    return _of_several(names, _Kernels.of(ready.get("packages")))


def needs_restart(ready: Mapping[str, Any], request: str, choice: Choice) -> bool:
    """Whether the backend must be created again, for the chosen contract.

    That is so if its factory takes ``contract``, got none, and has another default. A backend that
    names a single contract needs no second start.
    """
    default, contracts = ready.get("default"), ready.get("contracts")
    return (
        request == AUTO
        and contracts != [choice.revision]
        and default not in (None, choice.revision)
    )


def _revisions(contracts: Any) -> list[str]:
    """The backend's ``contracts`` in the order of the revisions."""
    names = [name for name in CONTRACTS if name in contracts] if isinstance(contracts, list) else []
    if not names:
        raise NoChoice(
            f"`contracts` is {str(contracts)[:80]}; name revisions of {', '.join(CONTRACTS)}"
        )
    return names


def _age(name: str) -> tuple[bool, bool, int]:
    """A key that rises with the revision: dialects count as the oldest, then ``sgl``."""
    return name not in DIALECTS, name != "sgl", list(CONTRACTS).index(name)


def _of_several(names: list[str] | None, kernels: _Kernels) -> Choice:
    """Among those that the backend names; None: among all."""
    fitting = {r: text for r, text in kernels.revisions.items() if names is None or r in names}
    if len(fitting) == 1:
        ((revision, text),) = fitting.items()
        return Choice(revision, f"detected: {text}")
    if names is None:
        newest, why = NEWEST.revision, "the newest: the backend names none"
    else:
        newest = max(names, key=_age)
        why = f"the newest of those that the backend names: {', '.join(names)}"
    if fitting:
        why += f"; its packages differ ({'; '.join(fitting.values())}), so name one with --contract"
    elif kernels.revisions:
        why += f", of which its kernel follows none: {'; '.join(kernels.revisions.values())}"
    elif kernels.unknown:
        why += f", and of what it has loaded nothing is known: {'; '.join(kernels.unknown)}"
    elif names is None:
        why += " and has loaded no known kernel"
    return Choice(newest, why)


@dataclass(frozen=True)
class _Kernels:
    """The kernels that a worker has loaded."""

    revisions: Mapping[str, str]
    """Revision -> the packages and builds that follow it."""
    unknown: tuple[str, ...] = ()
    """A line for each package with unknown headers."""

    @classmethod
    def of(cls, packages: Any) -> _Kernels:
        """``packages``: module -> its folder, as the worker says."""
        revisions: dict[str, str] = {}
        unknown: list[str] = []
        folders = packages if isinstance(packages, Mapping) else {}
        for name, folder in builds.kernels(
            {str(k): Path(str(v)) for k, v in folders.items()}
        ).items():
            try:
                detection = builds.detect(folder)
            except (OSError, ValueError):
                unknown.append(f"{name} has no headers in {folder} that can be read from here")
                continue
            if not detection.same_bits:
                unknown.append(f"{name} is {detection.description}")
                continue
            build = detection.builds[0]
            if build.revision not in CONTRACTS:
                unknown.append(f"{name} is {build.name} of {build.revision}, not written down yet")
                continue
            text = f"{name} is {build.name}{_but(build)}"
            before = revisions.get(build.revision)
            revisions[build.revision] = f"{before}, {text}" if before else text
        return cls(revisions, tuple(unknown))


def _but(build: builds.Build) -> str:
    """The clauses of the build that differ from the revision."""
    differs = ", ".join(f"{clause} {value}" for clause, value in build.differs.items())
    return f", which differs from {build.revision} in {differs}" if differs else ""
