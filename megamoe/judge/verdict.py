"""The judge's results as plain data: a finding for a tensor, a verdict for a case. JSON-able."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

STATUSES: Final = ("pass", "fail", "error", "skip", "not-provided", "not-run")
WORDS: Final[Mapping[str, str]] = {
    "skip": "skipped", "not-provided": "not provided", "not-run": "not run",
}  # fmt: skip
"""What people read for a status whose key in JSON has another form."""
BAD: Final = ("fail", "error")
VERDICTS: Final = ("pass", *BAD)
OF_MODULE: Final = "module"
"""How a call is judged that needs nothing of the backend: megamoe's own module refuses it."""
POWER: Final = "2^"
"""The value of a scale byte begins so; of no other format."""
_WHOLE: Final = re.compile(r"-?\d{1,20}")
_BITS: Final = re.compile(r"0x[0-9a-f]{1,16}")
JUDGED_SIDES: Final = ("expected", "got")
"""Words for the two bits of an element that is compared with a golden."""
CALLS: Final = ("first call", "this call")
"""The same, where a law compares two calls of the backend: neither is known to be right."""
TWINS: Final = ("twin", "this token")
"""The same, where two tokens with the same inputs are compared."""
NAN_BYTE: Final = "NaN"
"""The value of scale byte 255. The judge compares it as a byte, so it has a distance."""


@dataclass(frozen=True)
class Worst:
    """The element that lies farthest outside; axes that the tensor lacks are None."""

    stage: str
    index: tuple[int, ...]
    """Position in the tensor, with the token's row in the case."""
    token: int | None
    slot: int | None
    expert: int | None
    channel: int | None
    expected: str
    """Value, or interval of values."""
    expected_bits: tuple[str, str]
    """Lowest and highest allowed bits, hexadecimal; the same twice where one value is right."""
    actual: str
    actual_bits: str
    ulps: int | None
    """Units in the last place outside; 0 where only the sign of a zero is wrong; None: NaN."""

    def line(self, sides: tuple[str, str] = JUDGED_SIDES) -> str:
        """One line for a terminal. ``sides``: those of the finding."""
        places = (("token", self.token), ("slot", self.slot), ("expert", self.expert),
                  ("channel", self.channel))  # fmt: skip
        where = " ".join(f"{name} {at}" for name, at in places if at is not None)
        low, high = self.expected_bits
        bits = low if low == high else f"{low}..{high}"
        far = distance(self.ulps, self.expected, high, self.actual, self.actual_bits, sides)
        return (
            f"{self.stage} at {where or list(self.index)}: {sides[0]} {self.expected} ({bits}), "
            f"{sides[1]} {self.actual} ({self.actual_bits}), {far}"
        )


def distance(
    ulps: float | None, expected: str, high: str, actual: str, actual_bits: str,
    sides: tuple[str, str] = JUDGED_SIDES,
) -> str:  # fmt: skip
    """How far an element lies outside, in words. The arguments are fields of :class:`Worst`;
    ``high`` is the second of ``expected_bits``.

    One step of a scale byte is a factor of 2, so its distance is a power of 2. Of whole numbers, as
    ids and bytes, it is the difference.
    """
    if ulps is None or NAN_BYTE in (expected, actual):
        return "NaN on one side"
    if ulps == 0:
        return "the sign of zero"
    if _is_whole(expected, high) and _is_whole(actual, actual_bits):
        far = int(actual) - int(expected)  # ulps end at a limit
        return f"too {'large' if far > 0 else 'small'} by {abs(far)}"
    if not actual.startswith(POWER):
        return f"{ulps} ULP {'outside' if sides == JUDGED_SIDES else 'apart'}"
    side = "large" if actual_bits > high else "small"  # two digits each
    return f"too {side} by a factor of {2 if ulps == 1 else f'2^{ulps}'}"


def _is_whole(text: str, bits: str) -> bool:
    """Whether a value is the number that its bits are. No float but zero is."""
    if not _WHOLE.fullmatch(text) or not _BITS.fullmatch(bits):
        return False
    value = int(bits, 16)
    return int(text) in (value, value - (1 << 4 * (len(bits) - 2)))


@dataclass(frozen=True)
class Finding:
    """One tensor against its golden."""

    stage: str
    total: int
    """Elements compared."""
    outside: int = 0
    worst: Worst | None = None
    rows: Mapping[int, int] = field(default_factory=dict)
    """Token row -> elements outside; rows without any are left out, as in the next three."""
    experts: Mapping[int, int] = field(default_factory=dict)
    """An element of a tensor without slots, such as y, counts for each expert of its token."""
    tiles: Mapping[int, int] = field(default_factory=dict)
    """128-channel tile -> elements outside."""
    grid: tuple[tuple[int, int, int], ...] = ()
    """(row, tile, elements outside), the worst :data:`GRID_LIMIT` of them."""
    shape: tuple[int, int] = (0, 0)
    """Rows and tiles of the whole tensor."""
    tokens: tuple[int, ...] = ()
    """The case's token of each row of ``grid``, rising; empty where row N is token N, and where
    rows are no tokens."""
    text: str = ""
    """A finding that is not about single elements (the statistic) in one line."""
    sides: tuple[str, str] = JUDGED_SIDES
    """Words for what is compared with what: :data:`CALLS` of a law, :data:`TWINS` of two tokens."""

    @property
    def bad(self) -> bool:
        return bool(self.outside or self.text)


@dataclass(frozen=True)
class Verdict:
    """One case, judged."""

    case_id: str
    kind: str
    status: str
    reason: str = ""
    """One line; empty for a pass."""
    worst: Worst | None = None
    findings: tuple[Finding, ...] = ()
    """The bad ones."""
    how: tuple[str, ...] = ()
    """Names of the judgements: bitwise, staged, end-to-end, statistic, law, error, recorded."""
    seconds: float = 0.0
    recorded: str = ""
    """For a forward case, the result of the comparison with recorded bits: ``matched`` or
    ``moved``; or why there was none: ``none``, ``other fingerprint``, ``other inputs``, ``other
    contract``. Empty for other kinds."""
    predicted: str = ""
    """For a forward case of a class that a model predicts: equal, inside the envelope and not the
    prediction, outside; none or other inputs where there is nothing to compare with."""
    unlike: str = ""
    """For inside and outside: the stages that differ from the prediction, and an explanation."""
    right_under: tuple[str, ...] = ()
    """For a fail, the contracts under which this same output is right."""
    by: str = ""
    """Digest of the judged backend's identity: its name, class, callables and fingerprint."""
    process: int = 0
    """The number of the worker process in the run; 0 where nothing was called."""
    calls: tuple[int, int] | None = None
    """The first and the last call of the case, among all calls of that process. What a case can
    depend on are the cases of the same process whose first call is before its last."""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}; known: {', '.join(STATUSES)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the inverse is :meth:`from_dict`."""
        out = asdict(self)
        out["id"] = out.pop("case_id")
        if self.calls is None:
            del out["process"], out["calls"]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """A verdict from a report."""
        plain = dict(data)
        plain["case_id"] = plain.pop("id")
        plain["worst"] = _worst(plain.get("worst"))
        plain["findings"] = tuple(_finding(f) for f in plain.get("findings", ()))
        plain["how"] = tuple(plain.get("how", ()))
        plain["right_under"] = tuple(plain.get("right_under", ()))
        if plain.get("calls"):
            plain["calls"] = (plain["calls"][0], plain["calls"][1])
        return cls(**plain)


def _worst(data: Mapping[str, Any] | None) -> Worst | None:
    if data is None:
        return None
    pair = data["expected_bits"]
    return Worst(**{**data, "index": tuple(data["index"]), "expected_bits": (pair[0], pair[1])})


def _finding(data: Mapping[str, Any]) -> Finding:
    plain = dict(data)
    for name in ("rows", "experts", "tiles"):  # JSON keys are strings
        plain[name] = {int(k): v for k, v in plain[name].items()}
    plain["grid"] = tuple(tuple(entry) for entry in plain["grid"])
    plain["shape"] = tuple(plain["shape"])
    plain["tokens"] = tuple(plain.get("tokens", ()))  # an older report has none
    plain["sides"] = tuple(plain.get("sides", JUDGED_SIDES))  # an older report has none
    plain["worst"] = _worst(plain["worst"])
    return Finding(**plain)


def of_findings(case_id: str, kind: str, findings: list[Finding], how: tuple[str, ...]) -> Verdict:
    """Pass if nothing is bad; otherwise a fail that leads with the first bad stage."""
    bad = tuple(f for f in findings if f.bad)
    if not bad:
        return Verdict(case_id, kind, "pass", how=how)
    parts = [f.text or f"{f.stage}: {f.outside} of {f.total} outside" for f in bad]
    worst = next((f.worst for f in bad if f.worst), None)
    return Verdict(case_id, kind, "fail", "; ".join(parts), worst, bad, how)
