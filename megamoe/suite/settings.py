"""What a run of the suite is asked to do, and which cases that means."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from megamoe.cases import Case, golden_root, load_cases, select, shards
from megamoe.judge import BAD
from megamoe.printable import quantity
from megamoe.spec.contract import contract
from megamoe.suite.shard_report import read_report
from megamoe.worker.choice import AUTO
from megamoe.worker.session import START_SECONDS, Launch
from megamoe.worker.team import Ranks

OTHERS: Final = (
    "PYTHON", "CACHE", "REVISION", "DRIVER", "NIXOS_DRIVER", "CHROMIUM", "REQUIRE_CHROMIUM",
    "REQUIRE_NIX", "STUB_PYTHON", "LINGER", "VLLM_WHEEL", "SGLANG_WHEEL",
    "TORCH_FAST_ACCUM",
)  # fmt: skip
"""Variables MEGAMOE_NAME that other parts of the project read."""


class SettingsError(ValueError):
    """A setting that means nothing; one line."""


@dataclass(frozen=True)
class Settings:
    """Options of the suite; the names are those of ``megamoe check``."""

    backend: str = "eager"
    device: str = "cpu"
    kind: str | None = None
    tier: str | None = None
    """None: full where ``case`` is given, else quick."""
    case: str | None = None
    """A pattern of :mod:`megamoe.cases.pattern`."""
    contract: str = AUTO
    """The revision to judge under; auto: see :mod:`megamoe.worker.choice`."""
    shard: str | None = None
    """I/N."""
    timeout: float = 120.0
    """Seconds that the backend may take for the calls of one case."""
    golden: str | None = None
    """The directory golden/; None: :func:`megamoe.cases.golden_root`."""
    interpreter: str | None = None
    """``--python``: the Python that runs the backend; None: this one."""
    load_timeout: float = START_SECONDS
    """Seconds until the backend is loaded."""
    failed: str | None = None
    """A report of an earlier run: only the cases that failed there."""
    ep: int | None = None
    """``--ep``: ranks to start on this machine; only cases of kind ep are judged then."""

    @classmethod
    def read(cls, option: Callable[[str], Any]) -> Settings:
        """From ``option(name)``, which may give None, then from MEGAMOE_NAME, then defaults.

        Raises :class:`SettingsError` for a variable MEGAMOE_... that nothing reads: a misspelt one
        would change the run without a word.
        """
        names = {f"MEGAMOE_{name.upper()}" for name in (*cls.__dataclass_fields__, *OTHERS)}
        unknown = sorted(n for n in os.environ if n.startswith("MEGAMOE_") and n not in names)
        if unknown:
            raise SettingsError(
                f"the environment has {unknown[0]}, which nothing reads; unset it (known: "
                f"{', '.join(sorted(names))})"
            )
        values: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = option(name)
            if value is None:
                value = os.environ.get(f"MEGAMOE_{name.upper()}") or None
            if value is not None:
                values[name] = _seconds(name, value) if name.endswith("timeout") else value
        if "ep" in values:
            values["ep"] = _ranks(values["ep"])
        return cls(**values)

    @property
    def root(self) -> Path:
        return Path(self.golden) if self.golden else golden_root()

    def ranks(self) -> Ranks | None:
        """The ranks to judge over: ``--ep``, else those of ``torchrun``, else None."""
        ranks = Ranks.on_this_machine(self.ep) if self.ep else Ranks.of_torchrun(os.environ)
        if ranks is None or not self.device.startswith("cuda"):
            return ranks
        import torch  # only this asks for it

        return replace(ranks, gpus=torch.cuda.device_count())

    @property
    def chosen_tier(self) -> str:
        return self.tier or ("full" if self.case or self.failed else "quick")

    def selection(self, revision: str | None = None) -> list[Case]:
        """The cases asked for, of all shards, in the order of the case files.

        ``revision``: without those that this contract does not know.
        """
        kind = self.kind or ("ep" if self.ranks() else None)
        criteria = kind, self.chosen_tier, self.case
        every = load_cases(self.root)
        cases = select(every, *criteria, revision)
        others = [] if cases or revision is None else select(every, *criteria)
        if others:
            of = ", ".join(others[0].revisions)
            raise SettingsError(
                f"contract {revision} does not know {others[0].id}, which is of {of}; ask for one "
                "with --contract"
            )
        if self.failed:
            red = {c["id"] for c in read_report(self.failed)["cases"] if c["status"] in BAD}
            cases = [case for case in cases if case.id in red]
            if not cases:
                raise SettingsError(f"{self.failed}: none of the selected cases failed there")
        return cases

    def scope(self, cases: Sequence[Case]) -> str:
        """How many cases there are, of which tier, and why of that one."""
        quick = sum(case.tier == "quick" for case in cases)
        tier = f" of the {self.chosen_tier} tier"
        if self.tier is None and self.chosen_tier == "full":
            why = "a pattern was given" if self.case else "--failed was given"
            tier += f" ({why}; --tier quick: {quick})"
            tier = tier if quick < len(cases) else ""
        shard = f", shard {self.shard}" if self.shard else ""
        return f"{quantity(len(cases), 'case')}{tier}{shard}"

    def cases(self, revision: str | None = None) -> list[Case]:
        """The cases of this run, the longest first; the same list in every process."""
        seconds = shards.durations(self.root)
        cases = self.selection(revision)
        if self.shard:
            cases = shards.shard(cases, *shards.parse(self.shard), seconds)
        return shards.longest_first(cases, seconds)

    def launch(self, threads: int = 0) -> Launch:
        """How its worker is started. ``threads``: of torch there; 0: as torch decides."""
        python = self.interpreter or sys.executable
        if shutil.which(python) is None:
            raise SettingsError(f"--python {python}: no program; name a Python interpreter")
        if self.contract != AUTO:
            contract(self.contract)
        return Launch(
            self.backend, self.device, self.contract, (python,), threads=threads,
            seconds=self.load_timeout,
        )  # fmt: skip

    def again(self) -> str:
        """Further options for the command that runs one case alone."""
        out = f" --device {self.device}" if self.device != "cpu" else ""
        out += f" --ep {self.ep}" if self.ep else ""
        out += f" --contract {self.contract}" if self.contract != AUTO else ""
        out += f" --python {self.interpreter}" if self.interpreter else ""
        return out + (f" --golden {self.golden}" if self.golden else "")


def is_default(name: str, option: Any) -> bool:
    """Whether nobody asked for this setting, neither by its option nor by the environment."""
    return option is None and not os.environ.get(f"MEGAMOE_{name.upper()}")


def _ranks(value: Any) -> int:
    try:
        ranks = int(value)
    except ValueError:
        ranks = 0
    if ranks < 1:
        raise SettingsError(f"ep: {value!r} is not a number of ranks, 1 or more")
    return ranks


def _seconds(name: str, value: Any) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise SettingsError(f"{name}: {value!r} is not a number of seconds above 0")
    return seconds
