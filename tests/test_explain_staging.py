"""``megamoe explain`` of staging cases: the planted fault has its name, and the group is shown."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamoe.backends.eager import create
from megamoe.cases import load_cases
from megamoe.commands import main as cli
from megamoe.commands.explain_staging import _batch, _of_tensors, _right
from megamoe.explain.staged import explain_staging
from megamoe.explain.words import explanation
from megamoe.golden import regenerate
from megamoe.kinds.staging import blanks
from megamoe.spec.contract import REVISIONS
from megamoe.worker.serve import POISON
from tests.helpers.mutants import STAGING, build

WORDS = "scale-words-mispacked-h256"
REVERSED = "the four bytes of a scale word are in reverse order"
EAGER = create("cpu", "2026-06")


@cache
def case_of(name):
    return next(case for case in load_cases() if case.id == f"staging/{name}")


def staged(name, prepare=EAGER.prepare):
    """The inputs of a case, and the buffer after ``prepare``."""
    case = case_of(name)
    inputs = regenerate(case)
    buffer = blanks(case, inputs)
    for tensor in buffer.values():
        tensor.view(torch.uint8).fill_(POISON)
    after = [inputs[one] for one in ("is_padding",) if one in inputs]
    prepare(inputs["hidden_states"], inputs["topk_weights"], inputs["topk_ids"], *buffer.values(),
            *after)  # fmt: skip
    return case, inputs, buffer


def report_of(case, inputs, buffer, revision="2026-06"):
    contract = REVISIONS[revision]
    right = _right(case, inputs, contract)
    return explain_staging(_batch(case, inputs), right, _of_tensors(buffer, inputs), contract)


def names(report):
    return [
        f"{way['what']}{', ' * bool(way['where'])}{way['where']}"
        for cause in report["explanations"] for way in cause["exact"]
    ]  # fmt: skip


def test_scales_that_are_no_number_may_be_an_overflow():
    case, inputs, buffer = staged(WORDS)
    buffer["x_sf"][:, :1] = -1
    (cause,) = report_of(case, inputs, buffer)["explanations"]
    assert not cause["exact"]
    assert (
        f"{cause['differing']} of the 12 wrong scale bytes of x_sf are NaN where"
        in explanation(cause)[-1]
    )


def test_what_is_right_has_no_cause():
    report = report_of(*staged(WORDS))
    assert not report["explanations"] and not report["beyond"] and report["group"] is None
    assert [s["outside"] for s in report["stages"]] == [0, 0, 0, 0]


OF_MUTANTS = {
    "staging-floor-1e-10": ("amax-floor-1e-4-3727", "amax has a floor of 1e-10"),
    "staging-exponent-rounded-down": (WORDS, "the exponent is rounded down"),
    "staging-scales-big-endian": (WORDS, REVERSED),
    "staging-cast-toward-zero": (WORDS, "codes are rounded toward zero"),
    "staging-weights-in-bf16": (WORDS, "routing weights are rounded to bfloat16"),
    "staging-ids-masked": ("masked-ids-sign-lost-int32", "ids below 0 become 0"),
    "staging-last-token-lost": (WORDS, "scale words are not written, at token 2 only, the last"),
}


@pytest.mark.parametrize("mutant", OF_MUTANTS)
def test_a_fault_of_the_code_is_named(mutant, tmp_path):
    name, cause = OF_MUTANTS[mutant]
    backend = build(next(m for m in STAGING if m.name == mutant), tmp_path)
    report = report_of(*staged(name, backend.prepare))
    assert cause in names(report)


def _words(change):
    """A change of the scale bytes (T, H/32) of the batch."""

    def plant(buffer, tokens):
        sf = buffer["x_sf"]
        bytes_ = sf[:tokens].contiguous().view(torch.uint8).numpy()
        sf[:tokens] = torch.from_numpy(np.ascontiguousarray(change(bytes_))).view(torch.int32)

    return plant


def _columns(buffer, tokens):
    sf = buffer["x_sf"]
    sf[:tokens] = sf[:tokens].T.contiguous().view(tokens, -1)


def _columns_of_the_buffer(buffer, tokens):
    sf = buffer["x_sf"]
    sf.copy_(sf.T.contiguous().view(sf.shape))


def _ids(change):
    def plant(buffer, tokens):
        buffer["topk_idx"][:tokens] = change(buffer["topk_idx"][:tokens])

    return plant


def _weights(change):
    def plant(buffer, tokens):
        buffer["topk_weights"][:tokens] = change(buffer["topk_weights"][:tokens])

    return plant


FAULTS = {
    "bytes of a word reversed": (
        _words(lambda b: b.reshape(len(b), -1, 4)[..., ::-1].reshape(b.shape)), REVERSED
    ),
    "the scale of the group before": (
        _words(lambda b: np.roll(b, 1, 1)), "scale bytes are those of the group before"
    ),
    "words in columns": (
        _columns, "scale words stand in columns: word 0 of all rows of the batch, then word 1"
    ),
    "words in columns of the buffer": (
        _columns_of_the_buffer,
        "scale words stand in columns: word 0 of all rows of the buffer, then word 1",
    ),
    "a bias of 126": (_words(lambda b: b - 1), "scale bytes have a bias of 126"),
    "ids of the slot after": (
        _ids(lambda ids: ids.roll(-1, 0)), "ids are those of the token after"
    ),
    "ids one too large": (_ids(lambda ids: ids + 1), "ids are one too large"),
    "weights in reverse order": (
        _weights(lambda w: w.roll(1, 0)), "routing weights are those of the token before"
    ),
    "normalised weights": (
        _weights(lambda w: w / w.sum(1, keepdim=True)),
        "routing weights are normalised to a sum of 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [3, 1])
def test_a_code_in_place_of_zeros_is_named(tokens):
    """Of all tokens, and of token 0 alone: the others have right zeros, but may lack the fault."""
    case, inputs, buffer = staged("zero-groups-among-others")
    x = buffer["x"].view(torch.uint8)[:tokens]
    x[(x & 0x7F) == 0] = 0x28
    where = "" if tokens == 3 else ", at token 0 only"
    assert names(report_of(case, inputs, buffer)) == [f"zeros become 0x28 (0.25){where}"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_buffer_is_named(fault):
    plant, cause = FAULTS[fault]
    case, inputs, buffer = staged(WORDS)
    plant(buffer, len(inputs["topk_ids"]))
    assert cause in names(report_of(case, inputs, buffer))


@pytest.mark.parametrize(
    ("change", "cause"),
    [(lambda ids: ids & 0xFFFFFFFF, "-1 loses its sign: it is 4294967295"),
     (lambda ids: ids * 0, "topk_idx is zero"),
     (lambda ids: ids * 0 + 0x5A5A5A5A5A5A5A5A, "topk_idx is not written")],
)  # fmt: skip
def test_a_fault_of_masked_ids_is_named(change, cause):
    case, inputs, buffer = staged("masked-ids-sign-lost-int32")
    _ids(change)(buffer, 5)
    assert cause in names(report_of(case, inputs, buffer))


def test_rows_beyond_the_batch_are_said_with_their_content():
    case, inputs, buffer = staged(WORDS)
    buffer["x"][5:9].view(torch.uint8).zero_()
    buffer["topk_idx"][3:] = -1
    report = report_of(case, inputs, buffer)
    assert report["beyond"] == [
        "x: rows beyond the 3 tokens are written: 1024 bytes in rows 5 to 8 of 384, with zeros",
        "topk_idx: rows beyond the 3 tokens are written: 6096 bytes in rows 3 to 383 of 384, with "
        "-1 in every element",
    ]
    assert not report["explanations"], "the rows of the batch are right"


def test_a_random_byte_has_no_name():
    case, inputs, buffer = staged(WORDS)
    buffer["x_sf"].view(torch.uint8)[1, 5] ^= 0x15
    (cause,) = report_of(case, inputs, buffer)["explanations"]
    assert not cause["exact"] and not cause["partial"] and cause["differing"] == 1


def test_a_cause_of_many_tokens_says_how_many_were_compared():
    case, inputs, buffer = staged("rows-lost-or-repeated-at-t33")
    codes = buffer["x"].view(torch.uint8)
    codes[20:33] = codes[19:32].clone()
    _words(lambda b: np.concatenate([b[:20], b[19:-1]]))(buffer, 33)
    (cause,) = report_of(case, inputs, buffer)["explanations"]
    assert [way["what"] for way in cause["exact"]] == ["x is the row of the token before"]
    assert cause["exact"][0]["where"] == "at tokens 20 and later"
    assert cause["compared"].endswith("(of 16 tokens of 33)")


def test_padding_rows_that_keep_their_ids_are_named():
    name = next(c.name for c in load_cases() if c.kind == "staging" and "unpadded" in c.params
                and 0 < c.params["unpadded"] < c.params["tokens"])  # fmt: skip
    revision = case_of(name).revisions[0]
    case, inputs, buffer = staged(name)
    ids = inputs["topk_ids"]
    buffer["topk_idx"][: len(ids)] = ids.to(torch.int64)
    buffer["topk_weights"][: len(ids)] = inputs["topk_weights"]
    assert "padding rows of topk_idx are those of tokens" in names(
        report_of(case, inputs, buffer, revision)
    )


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def reversed_words(tmp_path):
    _, inputs, buffer = staged(WORDS)
    FAULTS["bytes of a word reversed"][0](buffer, len(inputs["topk_ids"]))
    path = tmp_path / "got.safetensors"
    save_file({name: tensor[:3].contiguous() for name, tensor in buffer.items()}, path)
    return ["explain", f"staging/{WORDS}", "--actual", str(path), "--contract", "2026-06"]


def test_the_command_shows_the_cause_and_the_group(reversed_words, capsys):
    assert cli.main(reversed_words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"staging/{WORDS}: of all 3 tokens, outside are x_sf 24 of 24 scale bytes; right: x, "
        "topk_idx, topk_weights"
    )
    assert lines[1] == f"cause: staging: {REVERSED}"
    assert lines[3].endswith("(0x78), got 2^5 (0x84), too large by a factor of 2^12")
    assert lines[4].startswith("  group 5 of token 1, channels 160 to 191: amax ")
    assert lines[5] == "  scale byte 120 (2^-7) expected, got 132 (2^5)"
    assert cli.main([*reversed_words, "--full", "--token", "0", "--channel", "33"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("       ") for line in lines) == 32
    assert any(line.startswith("  channel 33: hidden ") for line in lines)
    assert cli.main([*reversed_words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["group"]["byte"] == 120


def test_the_command_without_an_output_shows_the_right_group(capsys):
    assert cli.main(["explain", f"staging/{WORDS}", "--token", "1", "--channel", "160"]) == 0
    out = capsys.readouterr().out
    assert "scale byte 120 (2^-7) expected\n" in out and "got" not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([WORDS, "--token", "3"], "--token 3 is not there"),
        ([WORDS, "--stage", "y"], "staging has x and x_sf"),
        (["rows-lost-or-repeated-at-t0"], "has no tokens"),
    ],
)
def test_misuse_is_one_line(arguments, says, capsys):
    assert cli.main(["explain", f"staging/{arguments[0]}", *arguments[1:]]) == 2
    assert says in capsys.readouterr().err
