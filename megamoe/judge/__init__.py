"""The judge: outputs against goldens. It knows tensors and forms, and no kernel."""

from megamoe.callable_room import make_callable
from megamoe.judge.cause import Cause, cause_of, causes
from megamoe.judge.elements import Place, bitwise, interval, place_of
from megamoe.judge.judgements import GoldenLacks, judge_forward
from megamoe.judge.outputs import BadOutput, checked, forward_bits
from megamoe.judge.picture import picture
from megamoe.judge.verdict import BAD, JUDGED, STATUSES, Finding, Verdict, Worst, of_findings

__all__ = [
    "BAD",
    "JUDGED",
    "STATUSES",
    "BadOutput",
    "Cause",
    "Finding",
    "GoldenLacks",
    "Place",
    "Verdict",
    "Worst",
    "bitwise",
    "cause_of",
    "causes",
    "checked",
    "forward_bits",
    "interval",
    "judge_forward",
    "of_findings",
    "picture",
    "place_of",
]

make_callable(__name__)  # megamoe.judge(...), see docs/api.md
