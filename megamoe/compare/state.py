"""The results of a bisect so far, on the disk after every step."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from megamoe.compare import disk
from megamoe.files import write_atomically

SCHEMA: Final = 1


def key(request: Mapping[str, Any]) -> str:
    """The key of a question: equal for the same question, and for no other."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class State:
    """``state.json`` in ``folder``, with the bits of steps beside it."""

    folder: Path
    request: Mapping[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    selection: list[str] | None = None
    """Cases that differ between the ends: the steps in between run only these."""
    builds: int = 0
    earlier_steps: int = 0
    """Steps that an earlier run, killed or finished, had found out."""

    @classmethod
    def open(cls, folder: Path, request: Mapping[str, Any], fresh: bool) -> State:
        """The state of this very question; another one's is refused, a damaged one too."""
        path = folder / "state.json"
        if fresh:
            for name in ("state.json", "inputs", "outputs", "logs", "tree"):
                old = folder / name
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        if not path.exists():
            return cls(folder, request)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            state = cls(folder, request, data["steps"], data["narrowed"], data["builds"])
            same = data["schema"] == SCHEMA and data["request"] == json.loads(json.dumps(request))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); start over with --fresh") from error
        if not same:
            raise ValueError(
                f"{path} is of another question; name another --state, or start over with --fresh"
            )
        state.earlier_steps = len(state.steps)
        return state

    def find(self, rev: str) -> dict[str, Any] | None:
        """The step of a revision, where it is known."""
        return next((step for step in self.steps if step["rev"] == rev), None)

    def add(self, step: dict[str, Any], is_build: bool) -> None:
        """Keep a step."""
        self.steps.append(step)
        self.builds += is_build
        self.save()

    def save(self) -> None:
        """Write it, complete or not at all. Raises :class:`megamoe.compare.disk.DiskFull`."""
        data = {
            "schema": SCHEMA, "request": self.request, "steps": self.steps,
            "narrowed": self.selection, "builds": self.builds,
        }  # fmt: skip
        try:
            write_atomically(self.folder / "state.json", json.dumps(data, indent=1).encode())
        except OSError as error:
            raise disk.cause_of(error) from error

    def outputs(self, rev: str) -> Path:
        """The folder with the bits of a step."""
        name = rev if rev.isalnum() else hashlib.sha256(rev.encode()).hexdigest()[:16]
        return self.folder / "outputs" / name

    def drop_outputs(self, *revs: str) -> None:
        """Bits that no answer will need."""
        for rev in revs:
            shutil.rmtree(self.outputs(rev), ignore_errors=True)
