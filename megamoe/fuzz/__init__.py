"""``megamoe fuzz``: problems beyond the stored ones, drawn by number and judged by the oracle.

``draw`` makes problem ``number`` of a seed, by integers alone; ``data`` has its values; ``rare``
names the classes that seldom occur and finds them in a problem; ``step`` judges one; ``run`` draws
and judges until something fails or the time is over; ``failure`` leaves one file.
"""

from megamoe.fuzz.draw import FuzzCase, draw
from megamoe.fuzz.run import Options, Outcome, fuzz

__all__ = ["FuzzCase", "Options", "Outcome", "draw", "fuzz"]
