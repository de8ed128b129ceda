"""The failure that must stay the same while a problem is made smaller."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from megamoe.judge import CRASH, HANG, Verdict, symptom_of


@dataclass(frozen=True)
class Failure:
    """The failure that must stay the same: the status of a verdict, and its first wrong output."""

    status: str
    where: str
    """The first stage outside, or the exception."""
    nan: bool
    zero: bool
    """NaN on one side; nothing but zero was right. A small number must not become either."""
    reason: str = field(default="", compare=False)
    """The whole reason of an error."""

    @property
    def is_hang(self) -> bool:
        """Whether no result came in time."""
        return self.where == HANG

    @property
    def is_crash(self) -> bool:
        """Whether the process ended in the call."""
        return self.where.startswith(CRASH)

    @classmethod
    def of(cls, verdict: Verdict) -> Failure | None:
        """The failure of a verdict; None if the verdict is good."""
        if verdict.status == "fail":
            first = verdict.findings[0]
            stage = first.stage if first.outside else f"{first.stage} statistic"
            if first.stage == "inputs":
                stage = first.text.partition(";")[0].removeprefix("the backend ")
            worst = first.worst
            zero = worst is not None and all(int(b, 16) == 0 for b in worst.expected_bits)
            return cls("fail", stage, worst is not None and worst.ulps is None, zero)
        if verdict.status == "error":
            reason = verdict.reason.removeprefix(f"case {verdict.case_id}: ")
            match = re.search(r"the backend raised (\w+)", reason)
            # Of a hang the line where it was seen may be another one each time.
            text = HANG if reason.startswith(HANG) else ""
            text = text or symptom_of(verdict.case_id, "error", reason).partition(" (")[0]
            return cls("error", match[1] if match else text, False, False, reason)
        return None

    def __str__(self) -> str:
        if self.status == "error":
            return f"error: {self.reason or self.where}"
        more = " with NaN" if self.nan else " where zero is right" if self.zero else ""
        at = "" if self.where.startswith("wrote") else "at "
        return f"{self.status} {at}{self.where}{more}"
