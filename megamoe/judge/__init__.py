"""The judge: outputs against goldens. It knows tensors and forms, and no kernel."""

from megamoe.callable_room import make_callable
from megamoe.judge.elements import Place, bitwise, interval, place_of
from megamoe.judge.judgements import GoldenLacks, judge_forward
from megamoe.judge.outputs import BadOutput, checked, forward_bits
from megamoe.judge.picture import picture
from megamoe.judge.symptom import Symptom, symptom_of, symptoms
from megamoe.judge.verdict import BAD, JUDGED, STATUSES, WORDS, Finding, Verdict, Worst, of_findings

__all__ = [
    "BAD",
    "JUDGED",
    "STATUSES",
    "WORDS",
    "BadOutput",
    "Finding",
    "GoldenLacks",
    "Place",
    "Symptom",
    "Verdict",
    "Worst",
    "bitwise",
    "checked",
    "forward_bits",
    "interval",
    "judge_forward",
    "of_findings",
    "picture",
    "place_of",
    "symptom_of",
    "symptoms",
]

make_callable(__name__)  # megamoe.judge(...), see docs/api.md
