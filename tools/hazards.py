"""What racecheck's logs say of this project's kernels: ``python tools/hazards.py LOG...``.

Triton hands work to the warp groups of ``warp_specialize`` through words in shared memory.
Racecheck reports hazards on them: the barrier between the write and the read is a ``BAR.SYNC`` that
every warp of the block takes part in, but each kind of warp at another place of the program. (Read
off the code that Triton 3.6 makes of ``overlapped.py``: the offsets reported were such writes and
reads.) They are blamed on the kernel's ``def`` or on its ``warp_specialize`` call, where no
statement of ours touches shared memory, and only there are they set aside, with their number.
Anything else is printed and exits 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "megamoe/backends/triton"
_ACCESS = re.compile(r"(?:between|and) (?:Read|Write) access at .* in (\S+):(\d+)")


def races(log: str) -> Iterator[list[str]]:
    """The lines of each report: the one access, and those that it races with."""
    found: list[str] = []
    for line in log.splitlines():
        if "Race reported between" in line:
            if found:
                yield found
            found = [line]
        elif found and _ACCESS.search(line):
            found.append(line)
    if found:
        yield found


def handed_over(race: list[str], kernels: Path = KERNELS) -> bool:
    """Whether every access is blamed on a kernel's ``def`` or its ``warp_specialize`` call."""
    for line in race:
        access = _ACCESS.search(line)
        if access is None:
            return False
        path, number = kernels / Path(access[1]).name, int(access[2])
        lines = path.read_text().splitlines() if path.is_file() else []
        if not 0 < number <= len(lines):
            return False
        at = lines[number - 1].strip()
        if not at.startswith(("def ", "gl.warp_specialize(")):
            return False
    return True


def main(paths: list[str]) -> int:
    """Print what is left and the number set aside; 1 where anything is left."""
    found = [race for path in paths for race in races(Path(path).read_text())]
    left = [race for race in found if not handed_over(race)]
    for race in left:
        print("\n".join(race), file=sys.stderr)
    print(
        f"racecheck: {len(found) - len(left)} reports on Triton's hand-over to warp groups set "
        f"aside (tools/hazards.py says why), {len(left)} others"
    )
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
