"""The oracle: the exact result of every stage, and the set of correct results.

NumPy in, NumPy out; bfloat16 as uint16 bits, E4M3 and UE8M0 as uint8. It imports no backend and
none of the module under test: it shares :mod:`megamoe.spec.formats` with them and nothing else.
"""

from megamoe.oracle.envelope import Envelope
from megamoe.oracle.eplb import eplb
from megamoe.oracle.kernel_layout import layout
from megamoe.oracle.reference import ForwardGolden, combine_interval, forward
from megamoe.oracle.staging import staging

__all__ = [
    "Envelope",
    "ForwardGolden",
    "combine_interval",
    "eplb",
    "forward",
    "layout",
    "staging",
]
