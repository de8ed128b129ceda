"""Commands on a problem that is at hand: ``replay``, ``reduce``, ``capture``, ``golden import``."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamoe.cases import Case, CaseError, golden_root, kind_of, load_cases
from megamoe.cases.stored import Stored, load, to_bytes, used_experts
from megamoe.golden import Store, make, regenerate, write_atomically
from megamoe.golden.imported import import_file
from megamoe.judge import Verdict, picture
from megamoe.layer.capture import run_script
from megamoe.reduce import Failure, reduce
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import NEWEST, REVISIONS
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import judge, judge_output
from megamoe.suite.settings import Settings
from megamoe.worker.client import Worker
from megamoe.worker.session import AUTO


def add(commands: Any, command: Any) -> None:
    """The parsers of these commands."""
    r = command(commands, "replay", "judge a stored problem: a backend, or what was recorded",
                _replay)  # fmt: skip
    r.add_argument("file", metavar="FILE.safetensors")
    add_backend(r, required=False)
    r.add_argument("--accumulator", choices=sorted(ACCUMULATORS), metavar="CLASS",
                   help="of what was recorded; default: as the file says")  # fmt: skip
    r.add_argument("--json", metavar="FILE")

    r = command(commands, "reduce", "shrink a failing case to the smallest file that fails",
                _reduce)  # fmt: skip
    r.add_argument("subject", metavar="CASE", help="a forward case, or a stored problem's file")
    add_backend(r, required=True)
    r.add_argument("--out", metavar="FILE.safetensors", default="reduced.safetensors")
    r.add_argument("--seconds", type=float, default=100.0, help="to shrink (default 100)")

    r = command(commands, "capture", "run a Python script, and record its call of the experts",
                _capture)  # fmt: skip
    r.add_argument("--out", metavar="FILE.safetensors", default="captured.safetensors")
    r.add_argument("--calls", type=int, default=1, metavar="N")
    r.add_argument("--skip", type=int, default=0, metavar="N", help="calls to let pass before")
    r.add_argument("script", metavar="SCRIPT.py")
    r.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")

    acts = _acts_of(commands, "golden")
    r = command(acts, "import", "make a stored problem a case, and record its candidate", _import)
    r.add_argument("file", metavar="FILE.safetensors")
    r.add_argument("--name", help="of the case; default: the file's")
    r.add_argument("--breaks", metavar="SENTENCE", help="what is broken if it fails")


def _acts_of(commands: Any, name: str) -> Any:
    """The sub-commands of a command, to add one."""
    for action in commands.choices[name]._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action
    raise ValueError(f"{name} has no sub-commands")


def add_backend(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options that say which backend runs, and where."""
    parser.add_argument("--backend", required=required, metavar="B",
                        help="a name, or path/to/file.py:OBJECT_OR_FACTORY")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"))
    add_contract(parser)
    parser.add_argument("--python", dest="interpreter", metavar="PYTHON",
                        help="the Python that runs the backend")  # fmt: skip
    parser.add_argument("--timeout", type=float, metavar="SECONDS",
                        help="of the backend a call (default 120)")  # fmt: skip


def add_contract(parser: argparse.ArgumentParser) -> None:
    """The option that says under which contract is judged."""
    parser.add_argument("--contract", choices=(*REVISIONS, AUTO), default=AUTO, metavar="REV",
                        help="judge under this revision (default auto: the backend's, or the "
                             "newest)")  # fmt: skip


def _replay(a: argparse.Namespace) -> int:
    path = Path(a.file)
    stored = load(path)
    name = path.stem
    if a.backend:
        with backend_of(a) as (worker, settings):
            verdict, _ = judge(stored.problem, worker, name, timeout=settings.timeout)
        by = a.backend
    else:
        verdict, by = _observed(stored, path, a.accumulator, a.contract), "what was recorded"
    again = _again(a.file, a.backend, a.device)
    if verdict.status == "pass":
        print(f"PASS {path}: {by}, judged {', '.join(verdict.how)}, {verdict.seconds:.1f} s")
    else:
        print(_picture(verdict, a.backend or "", again))
    if a.json:
        write_atomically(Path(a.json), (json.dumps(verdict.to_dict(), indent=1) + "\n").encode())
    if verdict.status in ("skip", "not-provided"):
        return 2
    return 0 if verdict.status == "pass" else 1


def _observed(stored: Stored, path: Path, accumulator: str | None, revision: str) -> Verdict:
    if "y" not in stored.observed:
        raise ValueError(f"{path}: holds no output that was recorded; name a --backend")
    chosen = accumulator or stored.about.get("accumulator")
    if chosen is None:
        raise ValueError(f"{path}: does not say the accumulator class of its output; give "
                         f"--accumulator, one of {', '.join(sorted(ACCUMULATORS))}")  # fmt: skip
    contract = NEWEST if revision == AUTO else REVISIONS[revision]
    return judge_output(stored.problem, stored.observed, chosen, contract, path.stem)


def _reduce(a: argparse.Namespace) -> int:
    if not 0 < a.seconds < float("inf"):
        raise ValueError("--seconds: give a number above 0")
    out = Path(a.out)
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"--out {out}: name a file that ends in .safetensors")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: its directory does not exist")
    started = time.perf_counter()
    problem, case, about = _subject(a)
    again = _again(a.out, a.backend, a.device)
    with backend_of(a) as (worker, settings):
        golden = None
        if case is not None and case.rows is None:
            golden = Store(settings.root, make, REVISIONS[worker.identity.contract]).load(case)
        r = reduce(worker, problem, a.seconds, golden, print, settings.timeout)
        about |= {"backend": a.backend, "accumulator": worker.identity.accumulator,
                  "failure": str(r.failure)}  # fmt: skip
        content = to_bytes(Stored(r.problem, {}, about))
        write_atomically(out, content)
        # What is promised is the file: so the file is what is tried last.
        verdict, _ = judge(load(out).problem, worker, out.stem, timeout=settings.timeout)
    if Failure.of(verdict) != r.failure:
        raise ValueError(f"{out} is written, but does not fail when read back; keep it, and report "
                         "this")  # fmt: skip
    print()
    print(_picture(verdict, a.backend, again))
    experts = len(used_experts(r.problem))
    seconds = time.perf_counter() - started
    print(f"\n{out}: {len(content) / 1024:.0f} KiB, {r.problem.num_tokens} tokens, {experts} "
          f"experts used, after {r.tries} tries in {seconds:.0f} s")  # fmt: skip
    print(f"reproduce: {again}")
    return 0


def _capture(a: argparse.Namespace) -> int:
    if a.calls < 1 or a.skip < 0:
        raise ValueError("--calls: give a number from 1 on; --skip: from 0 on")
    written = run_script(Path(a.script), a.arguments, Path(a.out), a.calls, a.skip)
    for path in written:
        p = load(path).problem
        print(f"{path}: {p.num_tokens} tokens, {len(used_experts(p))} experts used, top-{p.top_k}, "
              f"H {p.hidden_size}, I {p.intermediate_size}")  # fmt: skip
    return 0


def _import(a: argparse.Namespace) -> int:
    if not a.golden:
        raise ValueError("golden import: say where with --golden DIR, a directory of your own; it "
                         "is made if it is not there")  # fmt: skip
    case = import_file(Path(a.golden), Path(a.file), a.name, a.breaks)
    root = shlex.quote(a.golden)
    print(f"{case.source}: case {case.id}; its golden is recorded as a candidate")
    print(f"next: megamoe golden bless --golden {root}")
    print(f"then: megamoe check --golden {root} --case {case.id} --backend B")
    return 0


def _subject(a: argparse.Namespace) -> tuple[Problem, Case | None, dict[str, Any]]:
    """The problem, its case where it is of one, and its origin."""
    if Path(a.subject).suffix == ".safetensors":
        stored = load(Path(a.subject))
        return stored.problem, None, {**stored.about, "reduced_from": Path(a.subject).name}
    root = Path(a.golden) if a.golden else golden_root()
    case = forward_case(root, a.subject)
    return Problem(**regenerate(case)), case, {"reduced_from": case.id}


def forward_case(root: Path, name: str) -> Case:
    """The forward or property case of this id or name. :class:`CaseError` for any other."""
    found = [c for c in load_cases(root) if name in (c.id, c.name)]
    forward = [c for c in found if kind_of(c.kind).is_forward]
    if not forward:
        what = f"is of kind {found[0].kind}" if found else "is unknown"
        raise CaseError(f"case {name!r} {what}; `megamoe list --kind forward` shows what has a y")
    return next((c for c in forward if c.id == name), forward[0])


@contextmanager
def backend_of(a: argparse.Namespace) -> Iterator[tuple[Worker, Settings]]:
    """The worker of the backend that the options name, which must have a forward."""
    settings = Settings.read(lambda name: getattr(a, name, None))
    with Worker(settings.launch()) as worker:
        if not worker.identity.provides("forward"):
            raise ValueError(
                f"backend {a.backend} has no forward, and a stored problem is a forward"
            )
        yield worker, settings


def _again(file: str, backend: str | None, device: str | None) -> str:
    options = f" --backend {shlex.quote(backend)}" if backend else ""
    options += f" --device {device}" if device not in (None, "cpu") else ""
    return f"megamoe replay {shlex.quote(file)}{options}"


def _picture(verdict: Verdict, backend: str, again: str) -> str:
    """The judge's picture, with the command that is right here."""
    lines = picture(verdict, backend).splitlines()
    return "\n".join([*lines[:-1], f"alone:  {again}"])
