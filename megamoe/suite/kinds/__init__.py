"""How a case of each kind is run and judged: one module a kind, one record for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from megamoe.cases import Case
from megamoe.judge import Verdict
from megamoe.suite.kinds import eplb, errors, forward, layout, properties, staging
from megamoe.worker.exchange import Caller, Returned


@dataclass(frozen=True)
class Kind:
    """What the suite needs to know of a kind."""

    needs: str | None
    """What a backend must offer; None where that depends on the case."""
    judge: Callable[[Any, Case], Verdict]
    """``judge(runner, case)``; what it raises, the runner puts in words."""
    ask: Callable[[Caller, Case, Mapping[str, Any]], Returned] | None = None
    """One call, of which tensors come back; None where the case has no such call."""
    judge_returned: Callable[..., Verdict] | None = None
    """``judge_returned(runner, case, golden, inputs, returned)``: the golden's verdict of that
    call. A property's law takes more calls than one, so it is no part of it."""


KINDS: Final[Mapping[str, Kind]] = {
    "staging": Kind("prepare", staging.judge, staging.ask, staging.judge_returned),
    "eplb": Kind("eplb_map", eplb.judge, eplb.ask, eplb.judge_returned),
    "forward": Kind("forward", forward.judge, forward.ask, forward.judge_returned),
    "property": Kind("forward", properties.judge, forward.ask, forward.judge_returned),
    "layout": Kind("transform_weights", layout.judge, layout.ask, layout.judge_returned),
    "errors": Kind(None, errors.judge),
}
