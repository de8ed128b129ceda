"""What a run of the suite is asked to do, and which cases that means."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe import shards
from megamoe.cases import Case, golden_root, load_cases, select


@dataclass(frozen=True)
class Settings:
    """Options of the suite; the names are those of ``megamoe check``."""

    backend: str = "eager"
    device: str = "cpu"
    kind: str | None = None
    tier: str | None = None
    """None: full where ``case`` is given, else quick."""
    case: str | None = None
    """A glob over case ids."""
    shard: str | None = None
    """I/N."""
    timeout: float = 120.0
    """Seconds a case may take."""
    golden: str | None = None
    """The directory golden/; None: :func:`megamoe.cases.golden_root`."""

    @classmethod
    def read(cls, option: Callable[[str], Any]) -> Settings:
        """From ``option(name)``, which may give None, then from MEGAMOE_NAME, then defaults."""
        found: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = option(name)
            if value is None:
                value = os.environ.get(f"MEGAMOE_{name.upper()}") or None
            if value is not None:
                found[name] = float(value) if name == "timeout" else value
        return cls(**found)

    @property
    def root(self) -> Path:
        return Path(self.golden) if self.golden else golden_root()

    @property
    def chosen_tier(self) -> str:
        return self.tier or ("full" if self.case else "quick")

    def selection(self) -> list[Case]:
        """The cases asked for, of all shards, in the order of the case files."""
        return select(load_cases(self.root), self.kind, self.chosen_tier, self.case)

    def cases(self) -> list[Case]:
        """The cases of this run, the longest first; the same list in every process."""
        seconds = shards.durations(self.root)
        chosen = self.selection()
        if self.shard:
            chosen = shards.shard(chosen, *shards.parse(self.shard), seconds)
        return shards.longest_first(chosen, seconds)

    def again(self) -> str:
        """Further options for the command that runs one case alone."""
        out = f" --device {self.device}" if self.device != "cpu" else ""
        return out + (f" --golden {self.golden}" if self.golden else "")
