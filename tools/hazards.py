"""The reports of racecheck on this project's kernels: ``python tools/hazards.py LOG...``.

Triton hands work to the warp groups of ``warp_specialize`` through words in shared memory.
Racecheck reports hazards on them: the barrier between the write and the read is a ``BAR.SYNC`` that
every warp of the block takes part in, but each kind of warp at another place of the program. (Read
off the code that Triton 3.6 makes of ``overlapped.py``: the offsets reported were such writes and
reads.) They are blamed on the kernel's own ``def`` or on a ``warp_specialize`` call, where no
statement of ours touches shared memory.

It reports the sums of ``handover.py``, too. There the warps of a side meet at a named barrier, and
then one thread arrives at an mbarrier for all of them. ``probe_racecheck.cu`` does that in 40
lines: racecheck reports it, though each word that is read is the due one, and does not report the
same program where every thread arrives itself (seen on an H200, CUDA 13.0). So a race between the
load and the store of ``handover.py`` is set aside; that the meeting is in the code each time is a
test (``tests/test_triton.py``).

And it reports torch's own reductions (``at::native``), which are not ours.

All these are set aside with their number. Anything else is printed and exits 1: another race,
another error, a report that the summary counts and this does not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "megamoe/backends/triton/kernels"
_RACE = "Race reported between"
_ACCESS = re.compile(r"(?:between|and) (?:Read|Write) access at (\w+)\+\S+ in (\S+):(\d+)")
_TORCH = re.compile(r"between (?:Read|Write) access at (?:void )?at::native::")
_SUMS = {"handover.py": (".load(layout)", ".store(rounded")}
_SUMMARY = re.compile(r"SUMMARY: (\d+) (?:hazards? displayed|errors?\b)")


def reports(log: str) -> Iterator[list[str]]:
    """The lines of each error or warning: of a race, the one access and those it races with."""
    report: list[str] = []
    for line in log.splitlines():
        if re.match(r"=+ (Error|Warning)\b", line):
            if report:
                yield report
            report = [line]
        elif report and _ACCESS.search(line):
            report.append(line)
    if report:
        yield report


def count_mismatch(log: str) -> list[str]:
    """A complaint where the summaries tell of more or fewer than :func:`reports` finds."""
    count, total = len(list(reports(log))), sum(map(int, _SUMMARY.findall(log)))
    if count == total:
        return []
    return [f"racecheck's summary tells of {total} reports, the log has {count}"]


def is_handover(report: list[str], kernels: Path = KERNELS) -> bool:
    """Whether it is a race all on what is handed over: Triton's words, or sums by an mbarrier."""
    if _RACE not in report[0]:
        return False
    matches = [_ACCESS.search(line) for line in report]
    if None in matches:
        return False
    accesses = [access for access in matches if access]
    words = [_statement(access, kernels) for access in accesses]
    hand_over = [
        text.startswith((f"def {access[1]}(", "gl.warp_specialize("))
        for access, text in zip(accesses, words, strict=True)
    ]
    sums = [
        any(part in text for part in _SUMS.get(Path(access[2]).name, ()))
        for access, text in zip(accesses, words, strict=True)
    ]
    return all(hand_over) or all(sums)


def _statement(access: re.Match[str], kernels: Path) -> str:
    """The line of source that an access is blamed on; empty if there is none."""
    path, number = kernels / Path(access[2]).name, int(access[3])
    lines = path.read_text().splitlines() if path.is_file() else []
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def torch_s(report: list[str]) -> bool:
    """Whether it is a race inside of one of torch's own kernels."""
    return _RACE in report[0] and bool(_TORCH.search(report[0])) and len(report) == 1


def main(paths: list[str]) -> int:
    """Print the remaining reports and the number set aside; returns 1 if any remain."""
    logs = [Path(path).read_text() for path in paths]
    records = [report for log in logs for report in reports(log)]
    rest = [report for report in records if not (is_handover(report) or torch_s(report))]
    rest += [complaint for log in logs if (complaint := count_mismatch(log))]
    for report in rest:
        print("\n".join(report), file=sys.stderr)
    aside, theirs = sum(map(is_handover, records)), sum(map(torch_s, records))
    print(
        f"racecheck: {aside} reports on what is handed to warp groups and {theirs} in torch's own "
        f"kernels set aside (tools/hazards.py says why), {len(rest)} others"
    )
    return int(bool(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
