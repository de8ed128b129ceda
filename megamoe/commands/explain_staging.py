"""``megamoe explain`` of a case of kind ``staging``: the staged tensor, the cause, the group."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from megamoe.cases import Case
from megamoe.cases.recipes import twins
from megamoe.commands.shared import (
    among_others,
    backend_of,
    contract_of,
    further_options,
    read_output,
)
from megamoe.commands.work import Work
from megamoe.explain.staged import NAMES, Batch, StagedOutput, explain_staging, group
from megamoe.explain.words import explanation
from megamoe.golden import regenerate
from megamoe.judge import BadOutput, tensor_bits
from megamoe.kinds import staging
from megamoe.printable import quantity
from megamoe.spec.contract import Contract
from megamoe.spec.contract import contract as find_contract
from megamoe.spec.forms import bits
from megamoe.spec.tensors import TENSORS
from megamoe.worker.exchange import Caller, NoOutput
from megamoe.worker.serve import POISON

Plain = dict[str, Any]
_VALUES: Final = ("x", "x_sf")
_UNITS: Final = {
    "x": "codes", "x_sf": "scale bytes", "topk_idx": "ids", "topk_weights": "weights",
}  # fmt: skip


def run(a: argparse.Namespace, case: Case) -> tuple[Plain, list[str]]:
    """What is said of ``case``, for machines and in lines."""
    inputs = regenerate(case)
    tokens = len(inputs["topk_ids"])
    if not tokens:
        raise ValueError(
            f"{case.id} has no tokens: nothing is staged; `megamoe check --case {case.id} "
            "--backend B` says whether a row beyond the batch is written"
        )
    if a.stage not in (None, *_VALUES):
        raise ValueError(f"--stage {a.stage}: staging has x and x_sf; {a.stage} is a stage of a "
                         "forward")  # fmt: skip
    output, revision = _output(a, case, inputs)
    contract = find_contract(revision)
    if revision not in case.revisions:
        raise ValueError(f"contract {revision} does not know {case.id}, which is of "
                         f"{', '.join(case.revisions)}; ask for one with --contract")  # fmt: skip
    right, batch = _right(case, inputs, contract), _batch(case, inputs)
    for name, value, most in (
        ("token", a.token, tokens),
        ("channel", a.channel, batch.hidden_size),
    ):
        if value is not None and not 0 <= value < most:
            raise ValueError(f"--{name} {value} is not there; {case.id} has {most}, from 0 on")
    if output is None:
        about = group(batch, right, a.token or 0, a.channel or 0, None)
        return {"case": case.id, "group": about}, [f"{case.id}, contract {revision}", *_group(
            about, a.full)]  # fmt: skip
    with Work("trying known mistakes of staging"):
        diagnosis = explain_staging(batch, right, output, contract)
    if a.token is not None or a.channel is not None or a.stage is not None:
        token, channel = _element(a, diagnosis, output, right)
        diagnosis["group"] = group(batch, right, token, channel, output)
        diagnosis["worst"] = None
    diagnosis = {"case": case.id, **diagnosis}
    lines = _lines(diagnosis, a.full)
    if a.backend and lines[0].startswith("PASS"):
        lines.append(f"  {among_others(case.id, a.backend, further_options(a))}")
    return diagnosis, lines


def _output(
    a: argparse.Namespace, case: Case, inputs: Mapping[str, Any]
) -> tuple[StagedOutput | None, str]:
    """What the backend or the file holds, None where neither is named; and the contract."""
    if a.backend:
        with backend_of(a, "prepare") as (worker, settings), Work("the backend stages"):
            try:
                with Caller(worker, settings.timeout) as call:
                    blank = staging.ask(call, case, inputs).blank
            except NoOutput as error:
                raise ValueError(f"{case.id}: {error.why}") from error
            return _of_tensors(blank, inputs), worker.identity.contract
    revision = contract_of(a).revision
    if not a.actual:
        return None, revision
    tensors = read_output(a.actual)
    lacking = [name for name in NAMES if name not in tensors]
    if lacking:
        raise ValueError(f"{a.actual}: has no tensor {lacking[0]}; staging of {case.id} has "
                         f"{', '.join(NAMES)}")  # fmt: skip
    sizes = {"K": case.params["top_k"], "H": case.params["hidden"]}
    try:
        for name in NAMES:
            shape = TENSORS[name].sizes({**sizes, "T": len(inputs["topk_ids"])})
            tensor_bits(name, tensors[name], shape, TENSORS[name].dtypes)
    except BadOutput as error:
        raise ValueError(f"{a.actual}: {error}") from error
    return _of_tensors(tensors, inputs), revision


def _of_tensors(tensors: Mapping[str, Any], inputs: Mapping[str, Any]) -> StagedOutput:
    tokens = len(inputs["topk_ids"])
    return StagedOutput(
        {name: bits(tensors[name][:tokens]) for name in NAMES},
        {name: bits(tensors[name][tokens:]) for name in NAMES},
        POISON,
    )


def _batch(case: Case, inputs: Mapping[str, Any]) -> Batch:
    padding = inputs["is_padding"].numpy() if "is_padding" in inputs else None
    return Batch(bits(inputs["hidden_states"]), inputs["topk_ids"].numpy(),
                 inputs["topk_weights"].numpy(), case.params["experts"], padding)  # fmt: skip


def _right(case: Case, inputs: Mapping[str, Any], contract: Contract) -> Mapping[str, Any]:
    """The staged bits of all tokens, by the oracle."""
    tensors = staging.golden(case, inputs, None, contract).tensors
    source = np.arange(len(inputs["topk_ids"]))
    if "distinct" in case.params:
        source = twins(case.seed, case.params["distinct"], source)
    return {name: tensors[name][source] for name in NAMES}


def _element(
    a: argparse.Namespace, diagnosis: Plain, output: StagedOutput, right: Mapping[str, Any]
) -> tuple[int, int]:
    """Token and channel that are asked for; what is not, is the first wrong one of the stage."""
    name = a.stage or "x"
    tensor = TENSORS[name]
    wrong = tensor.elements(output.tensors[name]) != tensor.elements(right[name])
    token = a.token if a.token is not None else int(np.argmax(wrong.any(axis=1)))
    if a.channel is not None:
        return token, a.channel
    return token, int(np.argmax(wrong[token])) * tensor.channels


# --- lines --------------------------------------------------------------------------------------


def _lines(diagnosis: Plain, full: bool) -> list[str]:
    wrong = [s["stage"] for s in diagnosis["stages"] if s["outside"]]
    fine = [s["stage"] for s in diagnosis["stages"] if not s["outside"]]
    if not wrong and not diagnosis["beyond"]:
        return [f"PASS {diagnosis['case']}: every staged tensor has the right bits "
                f"({', '.join(fine)}); nothing to explain"]  # fmt: skip
    counts = ", ".join(f"{s['stage']} {s['outside']} of {s['of']} {_UNITS[s['stage']]}"
                       for s in diagnosis["stages"] if s["outside"])  # fmt: skip
    of = f"{diagnosis['case']}: of all {quantity(diagnosis['tokens'], 'token')}"
    lines = [f"{of}, outside are {counts}" if wrong else f"{of}, every row has the right bits"]
    if wrong and fine:
        lines[0] += f"; right: {', '.join(fine)}"
    for cause in diagnosis["explanations"]:
        lines += explanation(cause)
    lines += diagnosis["beyond"]
    if diagnosis["worst"]:
        lines.append(diagnosis["worst"])
    if diagnosis["group"]:
        lines += _group(diagnosis["group"], full)
    return lines


def _group(g: Plain, full: bool) -> list[str]:
    """The group of 32 values in lines."""
    first, at = g["first"], g["channel"] - g["first"]
    byte, actual = g["byte"], g["shown_byte"]
    scale = "" if actual is None else f", got {_byte(actual)}"
    code = "" if g["shown_codes"] is None else f", got {g['shown_codes'][at]}"
    lines = [
        f"  group {g['group']} of token {g['token']}, channels {first} to {first + 31}: amax "
        f"{g['amax']:.7g} of channel {g['set_by']}; amax / 448 = {g['amax_over_448']:.7g}",
        f"  scale byte {_byte(byte)} expected{scale}",
        f"  channel {g['channel']}: hidden {g['hidden_values'][at]:.7g} ({g['hidden'][at]}), code "
        f"{g['codes'][at]} expected{code}",
    ]
    if full:
        lines += [
            f"    {first + k:>5}  {g['hidden'][k]}  {value:>13.7g}  {g['codes'][k]}"
            + ("" if g["shown_codes"] is None else f"  {g['shown_codes'][k]}")
            for k, value in enumerate(g["hidden_values"])
        ]
    return lines


def _byte(byte: int) -> str:
    return f"{byte} (2^{byte - 127})"
