"""The judge: outputs against goldens. It knows tensors and forms, and no kernel.

What compares tensors is imported when it is first asked for: verdicts and their pictures take no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megamoe.callable_room import make_callable
from megamoe.judge.picture import experts_note, picture
from megamoe.judge.symptom import (
    CRASH,
    HANG,
    IN_LAW,
    LEARNED_LIMIT,
    RAISED,
    TO_CATCH,
    Origin,
    Symptom,
    in_variant,
    origin_of,
    symptom_of,
    symptoms,
)
from megamoe.judge.verdict import (
    BAD,
    CALLS,
    JUDGED_SIDES,
    OF_MODULE,
    STATUSES,
    TWINS,
    VERDICTS,
    WORDS,
    Finding,
    Verdict,
    Worst,
    distance,
    of_findings,
)

if TYPE_CHECKING:
    from megamoe.judge.elements import Place, bitwise, interval, place_of
    from megamoe.judge.judgements import GoldenLacks, judge_forward
    from megamoe.judge.outputs import BadOutput, forward_bits, tensor_bits

__all__ = [
    "BAD",
    "CALLS",
    "CRASH",
    "HANG",
    "IN_LAW",
    "JUDGED_SIDES",
    "LEARNED_LIMIT",
    "OF_MODULE",
    "RAISED",
    "STATUSES",
    "TO_CATCH",
    "TWINS",
    "VERDICTS",
    "WORDS",
    "BadOutput",
    "Finding",
    "GoldenLacks",
    "Origin",
    "Place",
    "Symptom",
    "Verdict",
    "Worst",
    "bitwise",
    "distance",
    "experts_note",
    "forward_bits",
    "in_variant",
    "interval",
    "judge_forward",
    "of_findings",
    "origin_of",
    "picture",
    "place_of",
    "symptom_of",
    "symptoms",
    "tensor_bits",
]

_HOME = {
    "BadOutput": "outputs",
    "GoldenLacks": "judgements",
    "Place": "elements",
    "bitwise": "elements",
    "tensor_bits": "outputs",
    "forward_bits": "outputs",
    "interval": "elements",
    "judge_forward": "judgements",
    "place_of": "elements",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attribute = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = attribute  # asked for once
    return attribute


make_callable(__name__)  # megamoe.judge(...), see docs/api.md
