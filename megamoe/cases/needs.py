"""What a case asks of a backend, and what of that one lacks: known before any call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from megamoe.cases.forms import LAUNCH_LAWS
from megamoe.cases.kind import ONLY_CUDA, Case, form_of, lacks_cuda, needs_cuda

if TYPE_CHECKING:
    from megamoe.worker.session import Identity

ACTIONS: Final[Mapping[str, str | None]] = {
    "over-capacity": "forward",
    "staging-hidden-size": "prepare",
    "staging-shapes": "prepare",
    "finalize-sizes": None,
    "load-weight": None,
}
"""The callables that a backend must offer, by wrong call."""
NO_RANKS: Final = "the run has no team of ranks; use --ep N, or torchrun"
NO_GROUPS: Final = "{experts} experts cannot be split over {ranks} ranks"


def lacking(case: Case, identity: Identity) -> str:
    """A sentence about the first thing that the case asks for and that the backend, the run or the
    machine lacks; empty where the case can be run.

    The inputs may ask for more, which :attr:`megamoe.cases.Kind.lacks` knows.
    """
    form, on_cuda = form_of(case.kind), identity.device.startswith("cuda")
    needs = ACTIONS.get(case.params["action"]) if case.kind == "errors" else form.needs
    if needs is not None and not identity.provides(needs):
        return f"the backend has no {needs}"
    if lacks_cuda(case, identity.device):
        return needs_cuda(ONLY_CUDA)
    if case.kind == "ep" and (lacks := _ranks_lack(case, identity)):
        return lacks
    for feature in form.features(case):
        if not identity.provides(feature):
            return f"the backend has no feature {feature}"
    law = case.params.get("law", "")
    of_run, of_cuda = LAUNCH_LAWS.get(law, (False, False))
    if case.kind == "property" and of_run and not identity.provides("run"):
        return "the backend has no run"
    return needs_cuda(f"law {law}") if of_cuda and not on_cuda else ""


def _ranks_lack(case: Case, identity: Identity) -> str:
    ranks, experts = identity.ranks, case.params["physical"]
    if not ranks:
        return NO_RANKS
    return NO_GROUPS.format(experts=experts, ranks=ranks) if experts % ranks else ""
