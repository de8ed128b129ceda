"""``megamoe confirm``: ask the chip at hand what the models assume; read what another one said."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

from megamoe import confirm, golden
from megamoe.commands import bits
from megamoe.commands.shared import progress, root_of
from megamoe.confirm import ConfirmError, cases
from megamoe.confirm.gpu import Chip, Device
from megamoe.confirm.words import COLUMNS, INSTRUCTIONS, ROWS, Request, words_entry
from megamoe.console import Console
from megamoe.environment import slug, versions
from megamoe.golden.documents import read_recording
from megamoe.predict import model, tables
from megamoe.printable import quantity
from megamoe.suite.settings import Settings
from megamoe.worker.choice import AUTO

SEED = 20
STEPS = 4
"""Steps of the chain that computes a word."""


def run(a: argparse.Namespace) -> int:
    """Write a file, or say what is in one."""
    return _read(a) if a.source else _ask(a)


def _ask(a: argparse.Namespace) -> int:
    chip = Chip.at_hand()
    data: dict[str, Any] = {
        "gpu": chip.name, "model": a.model, "instructions": {}, "silu": {}, "cases": {},
        "machine_class": slug(f"{chip.name}-sm{chip.capability.replace('.', '')}"),
        "lacks": {"tcgen05 words": "this version has no program for them"},
    }  # fmt: skip
    with Device(chip) as device:
        data["silu"] = {name: tables.pack(name, t) for name, t in device.silu().items()}
        for name, instruction in INSTRUCTIONS.items():
            tiles = -(-a.outputs // (ROWS * COLUMNS))
            request = Request(instruction, SEED, tiles, STEPS)
            try:
                data["instructions"][name] = words_entry(request, device.words(request))
            except ConfirmError as error:
                data["lacks"][name] = str(error)
        toolchain = device.toolchain
    here = versions()
    data["provenance"] = {
        "gpu": chip.name, "capability": chip.capability, "driver": chip.driver,
        "toolchain": f"nvcc: {toolchain}", "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"megamoe confirm --out FILE --model {a.model} --outputs {a.outputs}"
                   + (f" --backend {a.backend}" if a.backend else ""),
        **{name: str(here[name]) for name in ("torch", "triton") if here.get(name)},
    }  # fmt: skip
    if a.backend:
        settings = Settings(
            a.backend, "cuda", "forward", "full", a.case, a.contract or AUTO, golden=a.golden
        )
        with progress("asking", None, Console(stderr=True)) as on_result:
            identity, answers = cases.ask(settings, model(a.model).accumulator, a.j, on_result)
        data |= {"cases": answers, "contract": identity.contract, "backend": identity.name}
        try:
            with progress("recording", None, Console(stderr=True)) as on_result:
                data["recorded"] = cases.record(settings, a.j, on_result)
        except golden.GoldenError as error:
            data["lacks"]["recorded bits"] = str(error)
    else:
        data["lacks"]["cases"] = "no --backend was given"
    confirm.write_answers(Path(a.out), data)
    parts = (("instructions", "instruction"), ("silu", "silu table"), ("cases", "case"))
    counts = ", ".join(quantity(len(data[key]), noun) for key, noun in parts)
    print(f"{a.out}: {counts} of {chip.name}")
    return 0


def _read(a: argparse.Namespace) -> int:
    answers = confirm.read_answers(Path(a.source))
    print(f"{answers['gpu']}, {answers['provenance'].get('date', 'no date')}, model "
          f"{answers['model']}")  # fmt: skip
    findings = confirm.statements(answers, root_of(a))
    for each in findings:
        print(each.line())
    if a.write:
        print(_save_tables(answers))
        if "recorded" in answers:
            print(_candidate(answers["recorded"], root_of(a)))
    return 1 if any(each.state == "refuted" for each in findings) else 0


def _candidate(document: dict[str, Any], root: Path) -> str:
    """Write its recorded bits where ``golden bless-bits`` takes them; what was written."""
    out = root / bits.CANDIDATES
    golden.write_atomically(out / ".gitignore", b"*\n")
    try:
        path = golden.recorded.write(out, document)
    except KeyError as lacking:
        raise ConfirmError(f"the recorded bits have no {lacking}; confirm again") from None
    try:
        read_recording(path, slug)
    except golden.GoldenError:
        path.unlink()  # a candidate that nothing can read helps nobody
        raise
    return f"wrote {path}; make it a recorded golden with `megamoe golden bless-bits`"


def _save_tables(answers: dict[str, Any]) -> str:
    """Write its silu tables beside the others; what was written, in a line."""
    if not answers["silu"]:
        raise ConfirmError("the file has no silu tables; there is nothing to write")
    path = tables.folder() / f"{slug(answers['machine_class'])}.json"
    data = {"schema": tables.SCHEMA, "gpu": answers["gpu"], "provenance": answers["provenance"],
            "tables": answers["silu"]}  # fmt: skip
    tables.read(json.dumps(data), path.name)
    golden.write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())
    return f"wrote {path}; predict again with `megamoe golden predict`"
