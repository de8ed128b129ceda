"""What several verbs do: choose cases, run a backend, show progress, write what was found."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file

from megamoe.cases import Case, CaseError, load_cases, select
from megamoe.cases.checkpoint import differences
from megamoe.cases.laws import calls_of
from megamoe.cases.pattern import one_of
from megamoe.cases.stored import StoredProblem, used_experts
from megamoe.compare import ab, disk
from megamoe.compare.sides import Options
from megamoe.console import Console
from megamoe.judge import Verdict, picture
from megamoe.printable import quantity
from megamoe.spec.contract import NEWEST, Contract, contract
from megamoe.suite import results
from megamoe.suite.next_command import FORWARDS, OUTLIVES
from megamoe.suite.settings import Settings
from megamoe.worker.choice import AUTO
from megamoe.worker.client import Worker

# --- cases ------------------------------------------------------------------------------------


def root_of(a: argparse.Namespace) -> Path:
    """The directory golden/ that is asked for."""
    return Settings(golden=a.golden).root


def forward_case(root: Path, name: str, verb: str) -> Case:
    """The forward or property case of this id or name. :class:`CaseError` for any other, with the
    command that goes on with it; ``verb`` is the one that asks."""
    case = any_case(root, name)
    if case.kind in FORWARDS:
        return case
    raise CaseError(_refusal(case, verb))


def any_case(root: Path, name: str) -> Case:
    """The case of this id or name; of a name that several kinds have, the forward."""
    cases = load_cases(root)
    forward = [c for c in cases if c.kind in FORWARDS]
    return one_of(forward if any(name in (c.id, c.name) for c in forward) else cases, name)


_CHECK: Final = "`megamoe check --backend B --case {id}` shows "
INSTEAD: Final[Mapping[str, str]] = {
    "staging": "it is one call of prepare, and small already; `megamoe explain {id} --backend B` "
    "names the cause",
    "eplb": _CHECK + "the first wrong id and each wrong count of the load, `megamoe show {id}` the "
    "sizes and what breaks",
    "layout": _CHECK
    + "the wrong bytes by expert, row and channel, `megamoe show {id}` what breaks",
    "errors": _CHECK + "the error that was expected and the one that was raised",
    "ep": "`megamoe check --backend B --ep N --case {id}` shows the first wrong rank, token and "
    "channel, and with --ep 1 whether the fault is between ranks; a fault without ranks shows in "
    "forward/* too, which {verb} takes",
}
"""The command that shows the difference, by kind of a case that has no ``y`` to explain."""


def case_without_ranks(root: Path, name: str, verb: str) -> Case:
    """The case of this id or name; :class:`CaseError` for one that needs a group of ranks, which
    ``verb`` does not start."""
    case = any_case(root, name)
    if case.kind == "ep":
        raise CaseError(_refusal(case, verb))
    return case


def _refusal(case: Case, verb: str) -> str:
    instead = INSTEAD[case.kind].format(id=case.id, verb=verb)
    return f"{case.id} is of kind {case.kind}, which {verb} does not take: {instead}"


def contract_of(a: argparse.Namespace) -> Contract:
    """The contract that is asked for; the newest where no backend has a say."""
    return NEWEST if a.contract in (None, AUTO) else contract(a.contract)


# --- a problem at hand ------------------------------------------------------------------------


REASONS: Final = {
    "forward": ", and a stored problem is a forward",
    "prepare": ": the callable that a staging case judges",
}


@contextmanager
def backend_of(a: argparse.Namespace, needs: str = "forward") -> Iterator[tuple[Worker, Settings]]:
    """The worker of the backend that the options name, which must have the callable ``needs``."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    with Worker(settings.launch()) as worker:
        if not worker.identity.provides(needs):
            raise ValueError(f"backend {a.backend} has no {needs}{REASONS[needs]}")
        print(worker.identity.contract_line, file=sys.stderr)
        yield worker, settings


def read_output(file: str) -> dict[str, torch.Tensor]:
    """The tensors of ``--actual``. ``ValueError`` for a file that cannot be read, and for a stored
    problem without an output."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file}: cannot be read as safetensors: {error}; write the output with "
            "safetensors.torch.save_file"
        ) from error
    if any(name.startswith("input.") for name in tensors) and "observed.y" not in tensors:
        raise ValueError(
            f"{file} is a stored problem without an output; `megamoe explain {file} --backend B` "
            "explains the output of a backend for it"
        )
    return tensors


def replay_command(
    file: str, backend: str | None, device: str | None, contract: str | None = None
) -> str:
    """The command that judges the stored problem in ``file`` again. ``contract``: the option of the
    command that wrote it."""
    options = f" --backend {shlex.quote(backend)}" if backend else ""
    options += f" --device {device}" if device not in (None, "cpu") else ""
    options += f" --contract {contract}" if contract not in (None, AUTO) else ""
    return f"megamoe replay {shlex.quote(file)}{options}"


def among_others(name: str, backend: str, options: str = "") -> str:
    """What to do with a case that passes alone and that ``check`` called red. ``options``: further
    ones of the command."""
    command = f"megamoe reduce {name} --after --backend {shlex.quote(backend)}{options}"
    return f"if `check` called it red among others, {OUTLIVES}: `{command}` finds the case before"


def further_options(a: argparse.Namespace) -> str:
    """Options besides ``--backend`` that another command needs to ask the same."""
    return Settings.read(lambda name: getattr(a, name, None)).again()


def passes_now(subject: str, again: str, name: str, backend: str, options: str = "") -> str:
    """What to do with a problem that may have been red before. ``again``: the command that judges
    it. ``name``: of its case; empty for a file."""
    advice = f"{subject} may be mended: `{again}` judges it"
    return f"{advice}; {among_others(name, backend, options)}" if name else advice


def of_a_law(case: Case, backend: str | None, verb: str) -> str:
    """What to do with a property whose forward is right. ``verb``: the one that was asked."""
    law = case.params["law"]
    check = f"megamoe check --backend {shlex.quote(backend or 'B')} --case {case.id}"
    return (
        f"the forward of {case.id} is right, so there is nothing to {verb}; law {law} compares it "
        f"with further calls ({calls_of(law)}), which `{check}` makes"
    )


def picture_of(verdict: Verdict, title: str, backend: str, again: str) -> str:
    """The judge's picture, with the title and the command that are right here."""
    lines = picture(verdict, backend).splitlines()
    lines[0] = lines[0].replace(verdict.case_id, title, 1)
    return "\n".join([*lines[:-1], f"alone:  {again}"])


LINE_SECONDS: Final = 10.0
"""Between two lines of progress where no terminal shows a bar."""
MAX_TENSORS: Final = 8
"""Of those whose bytes are not the checkpoint's, without ``--verbose``."""


def weights_differ(
    path: Path, record: StoredProblem, folder: Path, is_whole: bool = False
) -> Verdict | None:
    """Compare a recorded call's weights with a checkpoint's, and print the first tensors that
    differ, or all of them.

    None where every byte is the same; else the verdict of the file. ``ValueError`` where the two
    cannot be compared.
    """
    diff = differences(record, folder)
    if not diff:
        count = len(used_experts(record.problem))
        print(f"{path}: the weights of its {quantity(count, 'expert')} are those of {folder}")
        return None
    print(f"FAIL {path}: other bytes than in {folder}: {quantity(len(diff), 'tensor')}")
    view = diff if is_whole else diff[:MAX_TENSORS]
    for one in view:
        print(f"  {one.line()}")
    if len(diff) > len(view):
        print(f"  and {len(diff) - len(view)} more; --verbose names all")
    reason = (
        f"{quantity(len(diff), 'tensor')} with other bytes than the checkpoint's; {diff[0].line()}"
    )
    return Verdict(path.stem, "forward", "fail", reason, how=("checkpoint",))


# --- two sides --------------------------------------------------------------------------------


def comparison_cases(a: argparse.Namespace) -> tuple[Path, list[Case]]:
    """The directory golden/, and the cases that ``ab`` or ``bisect`` is asked for."""
    settings = Settings(case=a.case, tier=a.tier, golden=a.golden)
    root = settings.root
    return root, select(load_cases(root), a.kind, settings.chosen_tier, a.case)


def side_options(a: argparse.Namespace) -> Options:
    """How each side of ``ab`` or ``bisect`` is built."""
    return Options(a.python, a.build, a.path, tuple(a.extra), a.shell, a.build_timeout)


def note_repository(repositories: Sequence[Path | None], notes: Console) -> None:
    """Say of which checkout the revisions are, and what of it they do not show; nothing where
    there is no revision."""
    for repo in repositories[:1]:
        for line in filter(None, [f"revisions of {repo}", ab.describe(repo)]):
            notes.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def write_comparison(path: str, report: dict[str, Any]) -> None:
    """Write the result of ``ab`` or ``bisect``; a full disk is said in one line."""
    content = (json.dumps(report, indent=1) + "\n").encode()
    try:
        results.write(path, content)
    except OSError as error:
        raise disk.cause_of(error) from error


# --- what is said -----------------------------------------------------------------------------


@contextmanager
def progress(
    what: str, total: int | None, console: Console
) -> Iterator[Callable[[Case, str], None]]:
    """A bar while cases are worked through, and on no terminal a line now and then; gives what is
    called after each."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        count, last = 0, time.monotonic()

        def on_result(case: Case, error: str) -> None:
            nonlocal count, last
            count += 1
            bar.update(task, advance=1, description=f"{what} {case.id}")
            if not console.is_terminal and time.monotonic() - last > LINE_SECONDS:
                last = time.monotonic()
                of = "" if total is None else f"{count} of "
                cases = quantity(count if total is None else total, "case")
                console.print(f"{what}: {of}{cases}", highlight=False, soft_wrap=True)

        yield on_result
