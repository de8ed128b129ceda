"""The reports of racecheck on this project's kernels: ``python tools/hazards.py LOG...``.

Triton hands work to the warp groups of ``warp_specialize`` through words in shared memory.
Racecheck reports hazards on them: the barrier between the write and the read is a ``BAR.SYNC`` that
every warp of the block takes part in, but each kind of warp at another place of the program. (Read
off the code that Triton 3.6 makes of ``overlapped.py``: the offsets reported were such writes and
reads.) They are blamed on the kernel's own ``def`` or on a ``warp_specialize`` call, where no
statement of ours touches shared memory, and only there are they set aside, with their number.
Anything else is printed and exits 1: another race, another error, a report that the summary counts
and this does not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "megamoe/backends/triton/kernels"
_RACE = "Race reported between"
_ACCESS = re.compile(r"(?:between|and) (?:Read|Write) access at (\w+)\+\S+ in (\S+):(\d+)")
_SUMMARY = re.compile(r"SUMMARY: (\d+) (?:hazards? displayed|errors?\b)")


def reports(log: str) -> Iterator[list[str]]:
    """The lines of each error or warning: of a race, the one access and those it races with."""
    found: list[str] = []
    for line in log.splitlines():
        if re.match(r"=+ (Error|Warning)\b", line):
            if found:
                yield found
            found = [line]
        elif found and _ACCESS.search(line):
            found.append(line)
    if found:
        yield found


def uncounted(log: str) -> list[str]:
    """A complaint where the summaries tell of more or fewer than :func:`reports` finds."""
    found, told = len(list(reports(log))), sum(map(int, _SUMMARY.findall(log)))
    if found == told:
        return []
    return [f"racecheck's summary tells of {told} reports, the log has {found}"]


def handed_over(report: list[str], kernels: Path = KERNELS) -> bool:
    """Whether it is a race all on a kernel's own ``def`` or on ``warp_specialize`` calls."""
    if _RACE not in report[0]:
        return False
    for line in report:
        access = _ACCESS.search(line)
        if access is None:
            return False
        path, number = kernels / Path(access[2]).name, int(access[3])
        lines = path.read_text().splitlines() if path.is_file() else []
        if not 0 < number <= len(lines):
            return False
        if not lines[number - 1].strip().startswith((f"def {access[1]}(", "gl.warp_specialize(")):
            return False
    return True


def main(paths: list[str]) -> int:
    """Print the remaining reports and the number set aside; returns 1 if any remain."""
    logs = [Path(path).read_text() for path in paths]
    found = [report for log in logs for report in reports(log)]
    left = [report for report in found if not handed_over(report)]
    left += [complaint for log in logs if (complaint := uncounted(log))]
    for report in left:
        print("\n".join(report), file=sys.stderr)
    aside = sum(handed_over(report) for report in found)
    print(
        f"racecheck: {aside} reports on Triton's hand-over to warp groups set aside "
        f"(tools/hazards.py says why), {len(left)} others"
    )
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
