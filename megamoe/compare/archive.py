"""The result of a bisect, in one file that a reader can replay without megamoe."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from megamoe.cases import Case, kind_of
from megamoe.compare import disk, rejudge, stages
from megamoe.compare.backend_file import archive, sides_of
from megamoe.compare.checkout import git
from megamoe.compare.job import Job
from megamoe.compare.probe import Prober
from megamoe.compare.processes import CannotStart, clean_environment
from megamoe.compare.running import packed, size_of
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS
from megamoe.worker import single
from megamoe.worker.choice import AUTO
from megamoe.worker.exchange import plain_of
from megamoe.worker.files import Tensors
from megamoe.worker.session import MODULES

MOST_CASES: Final = 8
MOST_BYTES: Final = 64 << 20
"""Limit of the inputs, and of the sources: larger files stay out, and the README says so."""


def write(
    target: Path, job: Job, prober: Prober, report: dict[str, Any], pair: tuple[str, str], log: str
) -> Path:
    """Write the ``.tar.gz``; ``pair`` are the good and the bad step whose bits are kept."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="megamoe-", dir=target.parent) as name:
            home = Path(name) / "bisect"
            home.mkdir()
            _fill(home, job, prober, report, pair, log)
            part = Path(name) / "part"
            with tarfile.open(part, "w:gz") as out:
                out.add(home, "bisect", filter=_plain)
            part.replace(target)
    except OSError as error:
        raise disk.cause_of(error) from error
    return target


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _fill(
    home: Path, job: Job, prober: Prober, report: dict[str, Any], pair: tuple[str, str], log: str
) -> None:  # fmt: skip
    shutil.copyfile(rejudge.__file__, home / "replay.py")
    (home / "serve.py").write_text(single.source(), encoding="utf-8")
    entries, rest = _cases(home, prober, report, pair)
    backend, copy = archive(home, job, report)
    about = {"backend": backend, "copy": copy, "device": job.test.device, "cases": entries,
             "modules": MODULES, "contract": _contract_of(prober, pair)}  # fmt: skip
    (home / "cases.json").write_text(json.dumps(about, indent=1) + "\n")
    inside = {**report, "archive": None}
    (home / "bisect.json").write_text(json.dumps(inside, indent=1) + "\n")
    if log:
        (home / "git-bisect.log").write_text(log + "\n")
    notes = [f"Left out, being too large or too many: {', '.join(rest)}."] if rest else []
    sources = job.where.good.kind == "git" and not job.where.sides
    if sources:
        notes += _sources(home, job, report)
    (home / "README.md").write_text(_readme(job, report, notes, sources, prober, pair))


def _contract_of(prober: Prober, pair: tuple[str, str]) -> str:
    """The contract for which both sides' backends were created; auto: each by its own default."""
    steps = [prober.state.find(rev) or {} for rev in pair]
    contracts = {step.get("facts", {}).get("made_for", AUTO) for step in steps}
    return contracts.pop() if len(contracts) == 1 else AUTO


def _cases(
    home: Path, prober: Prober, report: dict[str, Any], pair: tuple[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The cases that moved, the smallest first, as many as fit."""
    ids = {entry["id"] for entry in report["cases"]}
    cases = [case for case in prober.test.cases if case.id in ids]
    size = {case.id: size_of(prober.inputs.of(case)) for case in cases}
    entries: list[dict[str, Any]] = []
    rest: list[str] = []
    total = 0
    for case in sorted(cases, key=lambda c: (size[c.id], c.id)):
        total += size[case.id]
        if len(entries) >= MOST_CASES or (entries and total > MOST_BYTES):
            rest.append(case.id)
            continue
        name = f"{case.id.replace('/', '--')}.pt"
        inputs = prober.inputs.of(case)
        _save(home / "inputs" / name, packed(inputs))
        parts = asdict(kind_of(case.kind).parts)
        entry = {"id": case.id, "parts": parts, "inputs": f"inputs/{name}"}
        entry |= _call(case, inputs)
        for side, rev in zip(("good", "bad"), pair, strict=True):
            step = prober.state.find(rev)
            assert step is not None
            entry[side] = step["digests"][case.id]
            bits = stages.read_bits(prober.bits_path(rev, case.id))
            _save(home / side / name, {n: torch.from_numpy(array) for n, array in bits.items()})
        entries.append(entry)
    return entries, rest


def _save(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(exist_ok=True)
    try:
        torch.save(dict(tensors), path)
    except RuntimeError as error:  # torch says so of a full disk
        disk.require_room(path.parent)
        raise OSError(f"{path}: {error}") from error


def _call(case: Case, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The one call of a case, as JSON: for ``replay.py``, which knows nothing of kinds."""
    ask = kind_of(case.kind).ask
    assert ask is not None
    recorder: Any = _Recorder()
    ask(recorder, case, inputs)
    return {"call": "", "arguments": [], "blank": {}, "own": [], **recorder.entry}


class _Recorder:
    """In place of a :class:`megamoe.worker.exchange.Caller`: notes the call, makes none."""

    device = "cuda"  # a note takes no time, so no case is left out of it

    def __init__(self) -> None:
        self.entry: dict[str, Any] = {}

    def forward(self, problem: Problem) -> None:
        self.entry = {
            "call": "forward", "plain": plain_of(problem), "weights": list(WEIGHTS),
            "num_experts": problem.num_experts,
        }  # fmt: skip

    def call(
        self, name: str, inputs: Tensors, blank: Tensors | None = None, own: Sequence[str] = (),
        after: Tensors | None = None,
    ) -> None:  # fmt: skip
        shapes = {
            n: (str(t.dtype).removeprefix("torch."), list(t.shape))
            for n, t in (blank or {}).items()
        }
        self.entry = {
            "call": name, "arguments": [*inputs], "blank": shapes, "own": [*own],
            "after": [*(after or {})],
        }  # fmt: skip


def _sources(home: Path, job: Job, report: dict[str, Any]) -> list[str]:
    """A bundle of two commits, the last good tree and the first bad one, and the bad patch."""
    repo = job.where.good.repo
    assert repo is not None
    bad, good = report["first_bad"], report["last_good"]
    patch = git(repo, "format-patch", "--stdout", "--binary", "-1", bad)
    (home / "first-bad.patch").write_text(patch + "\n")
    with tempfile.TemporaryDirectory() as name:
        bare = Path(name)
        _git(bare, "init", "--bare", "--quiet")
        objects = git(repo, "rev-parse", "--path-format=absolute", "--git-path", "objects")
        (bare / "objects/info/alternates").write_text(objects + "\n")
        first = _git(bare, "commit-tree", f"{good}^{{tree}}", "-m", f"last good: {good}")
        then = _git(bare, "commit-tree", f"{bad}^{{tree}}", "-p", first, "-m", f"first bad: {bad}")
        for ref, commit in (("good", first), ("bad", then)):
            _git(bare, "update-ref", f"refs/heads/{ref}", commit)
        _git(bare, "symbolic-ref", "HEAD", "refs/heads/good")
        bundle = home / "two.bundle"
        _git(bare, "bundle", "create", "--quiet", str(bundle), "HEAD", "good", "bad")
    if bundle.stat().st_size > MOST_BYTES:
        size = bundle.stat().st_size >> 20
        bundle.unlink()
        return [f"The two trees are too large ({size} MiB); check them out from the repository."]
    modules = git(repo, "ls-tree", "--name-only", bad, ".gitmodules")
    return ["Submodules are not in `two.bundle`."] if modules else []


def _git(bare: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{what}": value
           for role in ("AUTHOR", "COMMITTER")
           for what, value in (("NAME", "megamoe"), ("EMAIL", "megamoe@localhost"),
                               ("DATE", "2000-01-01T00:00:00Z"))}  # fmt: skip
    process = subprocess.run(
        ["git", f"--git-dir={bare}", *arguments], env={**clean_environment(), **who},
        capture_output=True, text=True,
    )  # fmt: skip
    if process.returncode:
        disk.blame(process.stderr)
        raise CannotStart(f"git {arguments[0]}: {process.stderr.strip()}")
    return process.stdout.strip()


def _readme(
    job: Job, report: dict[str, Any], notes: Sequence[str], sources: bool, prober: Prober,
    pair: tuple[str, str],
) -> str:  # fmt: skip
    o = job.test.options
    out = io.StringIO()
    print(f"# {report['headline']}\n", file=out)
    for name, rev in zip(("good", "bad"), pair, strict=True):
        step = prober.state.find(rev)
        assert step is not None
        facts = ", ".join(f"{k} {v}" for k, v in step.get("facts", {}).items())
        print(f"- {name}: `{rev}` ({facts})", file=out)
    print(
        "\n`inputs/` holds what the backend was given, `good/` and `bad/` the bits that it\n"
        "returned (`torch.load` reads all three), `cases.json` the calls and the digests,\n"
        "`bisect.json` the whole walk. `replay.py` needs Python 3.10 and torch, and `serve.py`\n"
        "beside it, which loads the backend; it prints whose bits it sees and exits 0 for the\n"
        "good ones, 1 for the bad ones, 2 for others.\n\n## Replay\n",
        file=out,
    )
    if sources:
        print("    git clone two.bundle tree && cd tree", file=out)
        print("    git checkout good        # or: git checkout bad", file=out)
        if o.build:
            print("    export MEGAMOE_PYTHON=python", file=out)
            print(f"    {o.build}", file=out)
        print(f"    python ../replay.py --path {o.path}", file=out)
        print("\n`first-bad.patch` is what lies between, as its author wrote it.", file=out)
    else:
        for side in sides_of(job, report):
            tree = f" --path {Path('TREE') / o.path}" if side.kind == "git" else ""
            where = "with TREE, a checkout of" if tree else "in an environment with"
            print(f"    # {where} {side.text}", file=out)
            print(f"    python replay.py{tree}", file=out)
        print(
            "\nA backend of one's own may import megamoe; then that must be installed too, or its\n"
            "checkout given with `--path`.",
            file=out,
        )
    for note in notes:
        print(f"\n{note}", file=out)
    return out.getvalue()
