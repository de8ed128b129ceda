"""The command line: what it prints, where, and with which exit code."""

import importlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from megamoe import predict
from megamoe.bench.floor import DEFAULT_SHARES, SHARES
from megamoe.bench.peers import PEERS
from megamoe.cases import load_cases, load_entries
from megamoe.commands.main import VERBS, main, whole_parser
from megamoe.commands.parser import UsageError, verbs_of
from megamoe.commands.parsers import names
from megamoe.coverage.dimensions import dimensions
from megamoe.spec.contract import NEWEST
from megamoe.suite import reds
from tests.helpers.reports import whole

pytestmark = pytest.mark.usefixtures("warm")
CASES = """
[defaults]
breaks = "something | with a bar"

[[case]]
kind = "staging"
name = "small"
tier = "quick"
hidden = 128
experts = 2
top_k = 2
tokens = 2

[[case]]
kind = "forward"
name = "tiny"
hidden = 128
intermediate = 128
experts = 4
top_k = 2
family = "envelope"
tokens = 3
rows = [0, 2]
[case.routing]
pool = 2

[[case]]
kind = "errors"
name = "over"
action = "over-capacity"
raises = "ValueError"
message = "x"
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases/all.toml").write_text(CASES)
    monkeypatch.setenv("MEGAMOE_GOLDEN", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """The goldens of these cases, recorded once."""
    folder = tmp_path_factory.mktemp("goldens")
    (folder / "cases").mkdir()
    (folder / "cases/all.toml").write_text(CASES)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)
        assert main(["golden", "record", "-j", "1", "--golden", str(folder)]) == 0
        assert main(["golden", "bless", "--golden", str(folder)]) == 0
    return folder


@pytest.fixture
def blessed(root, goldens, capsys):
    shutil.copytree(goldens, root, dirs_exist_ok=True)
    capsys.readouterr()
    return root


def test_record_diff_bless_verify(root, capsys):
    assert main(["golden", "record", "-j", "1"]) == 0
    assert f"3 candidates in {root}/candidates" in capsys.readouterr().out
    assert main(["golden", "diff"]) == 0
    out = capsys.readouterr().out
    assert "forward/tiny" in out and "3 changes; `megamoe golden bless` makes them" in out
    assert main(["golden", "bless"]) == 0
    assert f"3 goldens blessed; commit {root}" in capsys.readouterr().out
    assert main(["golden", "verify", "-j", "1"]) == 0
    assert "3 of 3 goldens are what the oracle computes" in capsys.readouterr().out
    assert main(["golden", "record", "-j", "1", "--case", "tiny"]) == 0
    assert main(["golden", "diff"]) == 0
    assert capsys.readouterr().out.endswith("no changes\n")


def test_verify_exits_1_and_names_the_case(blessed, capsys):
    (blessed / "tensors/forward/tiny.safetensors").write_bytes(b"damaged")
    text = (blessed / "cases/all.toml").read_text().replace('"small"', '"other"')
    (blessed / "cases/all.toml").write_text(text)
    assert main(["golden", "verify", "-j", "1"]) == 1
    output = capsys.readouterr()
    assert "1 of 3 goldens is what the oracle computes" in output.out
    lines = output.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("megamoe: error: case ") for line in lines)
    assert "forward/tiny.safetensors is damaged" in output.err
    assert "case staging/other: not in the manifest" in output.err
    assert "case staging/small: in the manifest, but in no case file" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chekc"], "unknown verb 'chekc'; did you mean check? See `megamoe --help`"),
        (["zzz"], "unknown verb 'zzz'; known: init, check,"),
        ([], "name a verb: init, check,"),
        (["contract"], "name a verb: list, show, diff, detect; see `megamoe contract --help`"),
        (["contract", "shwo"], "unknown verb 'shwo'; did you mean show?"),
        (["contract", "show", "2026-12"], "unknown revision or build '2026-12'; did you mean 20"),
        (["check", "--bakend", "x"], "unknown option --bakend; did you mean --backend? See `mega"),
        (["check", "-Z", "--backend", "eager"], "unknown option -Z; see `megamoe check --help`"),
        (["golden", "record", "--cas=x"], "unknown option --cas; did you mean --case?"),
        (["capture", "--ou", "x", "x.py"], "unknown option --ou; did you mean --out?"),
        (["check"], "--backend is missing: a name, or path/to/file.py:OBJECT"),
        (["show", "-x"], "unknown option -x; see `megamoe show --help`"),
        (["test"], "unknown verb 'test'; did you mean check?"),
        (
            ["check", "--backend", "k:kernel"],
            "no Python file at {here}/k; did you mean k.py:Kernel?",
        ),
        (
            ["check", "--backend", "cases:K"],
            "/cases is a folder without __init__.py, so no package; n",
        ),
        (["check", "--backend", "p"], "name its class: --backend p:Kernel"),
        (["check", "--backend", "p:"], "name its class: --backend p:Kernel"),
        (
            ["check", "--backend", "."],
            "name a file in it, as --backend k.py:Kernel or --backend tw",
        ),
        (["check", "--backend", "k"], "unknown backend 'k'; did you mean k.py:Kernel?"),
        (["check", "--backend", "empt.py:K"], "did you mean empty.py?"),
        (["check", "--backend", "x"], "unknown backend 'x'; known: eager"),
        (["check", "--backend", "k.py"], "backend k.py: name its class: --backend k.py:Kernel"),
        (
            ["check", "--backend", "two.py"],
            "name a class: --backend two.py:A or --backend two.py:B",
        ),
        (
            ["check", "--backend", "two"],
            "'two': name a class: --backend two.py:A or --backend two.",
        ),
        (
            ["check", "--backend", "empty.py:"],
            "say which object, as empty.py:CLASS; its text shows no class wit",
        ),
        (["check", "--backend", "egaer"], "unknown backend 'egaer'; did you mean eager? Known: "),
        (["check", "--backend", "no.py:X"], "no Python file at"),
        (["check", "--backend", "eager", "--contract", "2026-1"], "did you mean 2026-11? Known: "),
        (["check", "--backend", "eager", "--python", "nopython"], "--python nopython: no program"),
        (["check", "--backend", "eager", "--failed", "no.json"], "no.json: no such file"),
        (["check", "--backend", "eager", "--case", "x"], "unknown case: nothing matches 'x'"),
        (["check", "--backend", "eager", "--shard", "3/2"], "shard '3/2': write I/N with"),
        (
            ["check", "--backend", "eager", "--backend", "k.py:K"],
            "--backend stands twice, with eager and with k.py:K; to compare two backends: `megamoe "
            "ab this this --left-backend eager --right-backend k.py:K`",
        ),
        (["check", "--backend", "eager", "--device", "cpu", "--device", "cuda"], "stands twice, "),
        (
            ["check", "--kind", "forward", "--kind", "ep"],
            "with forward and with ep; for several kinds: --case 'forward/*,ep/*' --tier quick",
        ),
        (["check", "--kind", "forward,ep"], "for several: --case 'forward/*,ep/*' --tier quick"),
        (["check", "--kind", "forward,epp"], "'forward,epp' is not known"),
        (["check", "--backend", "eager", "-n", "0"], "'0' is not a number from 1 on"),
        (["check", "--backend", "eager", "--timeout", "-1"], "'-1' is not a number of seconds"),
        (["check", "--backend", "eager", "--timeout", "nan"], "'nan' is not a number of seconds"),
        (["check", "--backend", "eager", "--json", "."], ". is a directory; name a file"),
        (["check", "--backend", "eager", "--kind", "x"], "'x' is not known; known: staging"),
        (["check", "--backend", "eager", "--kind", "remap"], "did you mean eplb? Known: staging,"),
        (["check", "--backend", "eager", "--kind", "epbl"], "did you mean eplb?"),
        (["replay"], "name FILE.safetensors, as in `megamoe replay reduced-CASE.safetensors --ba"),
        (["replay", "tiny"], "`megamoe check --backend B --case tiny` judges the case"),
        (["replay", "k.py:K"], "`megamoe replay FILE.safetensors --backend k.py:K`"),
        (
            ["check", "--backend", "eager", "--case", "a/r.safetensors"],
            "`megamoe replay a/r.safetensors --backend B` judges it",
        ),
        (["oracle", "--case", "x", "--out", "y"], "nothing has the id or name 'x'; `megamoe list"),
        (["show", "staging/smal"], "did you mean staging/small? `megamoe list` shows all"),
        (["show", "tinny"], "nothing matches 'tinny'; did you mean tiny?"),
        (["explain", "forward/tinny"], "did you mean forward/tiny?"),
        (["explain", "errors/over"], "errors/over is of kind errors, which explain does not take"),
        (["reduce", "small", "--backend", "eager"], "`megamoe explain staging/small --backend B`"),
        (["reduce", "no.safetensors", "--backend", "eager"], "no.safetensors: no such file"),
        (["oracle", "--case", "errors/over", "--out", "y"], "is a wrong call: it has no tensors"),
        (["golden", "diff", "--golden", "nowhere"], "is not a directory; set MEGAMOE_GOLDEN"),
        (["merge", "none.json"], "none.json: no such file; `megamoe check --json FILE` writes one"),
        (["report", "manifst.json"], "no such file; did you mean manifest.json?"),
        (["report", "x.safetensors"], "x.safetensors is the name of a stored problem, and a repo"),
        (
            ["check", "--backend", "eager", "--failed", "x.safetensors"],
            "a report is needed here; `megamoe replay x.safetensors --backend B` judges a backend",
        ),
        (
            ["check", "--backend", "x.safetensors"],
            "a stored problem is no backend; `megamoe replay x.safetensors --backend B` judges",
        ),
        (["list", "*tnny*"], "nothing matches '*tnny*'; did you mean '*tiny*'? `megamoe list`"),
        (["list", "*qqqq*"], "nothing matches '*qqqq*'; `megamoe list` shows all"),
        (["explain", "p2"], "has the id or name 'p2'; did you mean the file p2.safetensors?"),
        (["explain", "r.json", "--backend", "eager"], "`megamoe report r.json` shows its cases"),
        (["show", "no.safetensors"], "no.safetensors: no such file"),
        (["show", "p2.safetensors"], "p2.safetensors is no stored problem"),
        (["ab", "p2.safetensors", "this"], "`megamoe replay p2.safetensors --backend B` judges ea"),
        (["ab"], "name LEFT and RIGHT, as in `megamoe ab HEAD~1 this --backend FILE.py:CLASS`"),
        (
            ["ab", "k.py:A", "b.py:B"],
            "`megamoe ab this this --left-backend k.py:A --right-backend b.py:B`",
        ),
        (["ab", "this", "k.py"], "this --left-backend k.py:Kernel --right-backend FILE.py:CLASS`"),
        (["report", "no/x.json"], "no/x.json: no such file, and no folder no"),
        (
            ["check", "k.py:K"],
            "k.py:K is no case; a backend stands after --backend: `megamoe check --backend k.py:K`",
        ),
        (["check", "k.py", "-n", "1"], "`megamoe check --backend k.py:Kernel`"),
        (
            ["check", "eager"],
            "eager is no case; a backend stands after --backend: `megamoe check -",
        ),
        (["reduce", "k.py:K"], "`megamoe reduce CASE --backend k.py:K`"),
        (["reduce", "tiny", "p:K"], "`megamoe reduce tiny --backend p:K`"),
        (["explain", "tiny", "eager"], "`megamoe explain tiny --backend eager`"),
        (["replay", "r.safetensors", "k.py:K"], "k.py:K is no stored problem; a backend stands af"),
        (["replay", "r.safetensors", "k.py"], "`megamoe replay r.safetensors --backend k.py:Kern"),
        (["replay", "r.safetensors", "eager"], "`megamoe replay r.safetensors --backend eager`"),
        (["fuzz", "k.py:K"], "k.py:K is unexpected; a backend stands after --backend: `megamoe fu"),
        (["ab", "eager", "this"], "it is a backend: write `megamoe ab this this --left-backend ea"),
        (["init"], "name DIR, as in `megamoe init my-kernel`"),
        (["merge"], "name REPORT, as in `megamoe merge shard-1.json shard-2.json`"),
        (["report"], "name RESULT.json, as in `megamoe report out.json -o report.html`"),
        (["capture"], "name SCRIPT.py, as in `megamoe capture engine.py`"),
        (["merge", "."], ". is a directory; name a file"),
        (["report", "nothing"], "nothing is empty; `megamoe check --json FILE` writes one"),
        (["bench", "--from", "."], ". is a directory; name a file"),
        (["kernels", "--results", "nothing"], "nothing is empty"),
        (["confirm", "--from", "nothing"], "nothing is empty"),
        (["capture", "."], ". is a directory; name a file"),
        (["replay", "p"], "p is a directory; name a file"),
        (["replay", "nothing"], "nothing is empty; `megamoe reduce`, `megamoe fuzz` and `megamoe"),
        (["explain", "tiny", "--actual", "nothing"], "nothing is empty"),
        (["oracle"], "--case and --out are missing; see `megamoe oracle --help`"),
        (
            ["explain", "-k", "tiny"],
            "unknown option -k; the case stands without an option: `megamoe",
        ),
        (
            ["golden", "record", "tiny"],
            "unexpected 'tiny'; cases stand after --case; see `megamoe golden record --help`",
        ),
        (["contract", "list", "x"], "unexpected 'x'; see `megamoe contract list --help`"),
        (["show"], "name a case: its id, its name or a pattern"),
        (["list", "ti"], "nothing matches 'ti'; did you mean tiny?"),
        (
            ["check", "--backend", "eager", "n"],
            "to mean the 2 cases with n in their ids, write '*n*' ",
        ),
        (["explain", "n"], "2 cases have n in their ids: `megamoe list '*n*'` shows them"),
        (["coverage", "--dimension", "nibble"], "did you mean one of w13-nibbles, w2-nibbles, "),
        (["coverage", "--dimension", "x"], "unknown dimension 'x'; known: x-codes, "),
        (
            ["replay", "cases/all.toml"],
            "is no stored problem, since it is no safetensors file; `meg",
        ),
        (["replay", "no.safetensors"], "no.safetensors: no such file; `megamoe reduce`, `meg"),
        (
            ["check", "--backend", "eager", "--json", "no/x.json"],
            "no/x.json: there is no folder no; ",
        ),
        (
            ["check", "--backend", "eager", "--junit", "no/x"],
            "no/x: there is no folder no; create it",
        ),
        (["coverage", "--page", "no/x.html"], "no/x.html: there is no folder no; create it first"),
        (["bench", "--plot", "no/x.svg"], "no/x.svg: there is no folder no; create it first"),
        (["bisect", "--archive", "no/x.tar.gz"], "no/x.tar.gz: there is no folder no; create it"),
        (["explain", "tiny", "--json", "no/x"], "no/x: there is no folder no; create it first"),
        (["capture", "--out", "no/x", "cases/all.toml"], "no/x: there is no folder no; create it"),
        (["help", "chekc"], "unknown verb 'chekc'; did you mean check?"),
    ],
)
def test_misuse_is_one_line_and_exit_2(blessed, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(blessed)
    (blessed / "k.py").write_text("class Other: ...\nclass Kernel:\n  forward = print\n")
    (blessed / "empty.py").write_text("not Python")
    (blessed / "nothing").touch()
    (blessed / "p").mkdir()
    (blessed / "p" / "__init__.py").write_text("from .part import Kernel, other")
    (blessed / "p" / "part.py").write_text("class Kernel:\n  def forward(self, p): ...")
    (blessed / "two.py").write_text("class A:\n  def prepare(self): ...\nclass B(A): ...")
    (blessed / "p2.safetensors").write_text("no safetensors")
    (blessed / "r.json").write_text("{}")
    assert main(arguments) == 2
    output = capsys.readouterr()
    message = message.format(here=blessed)
    assert output.err.startswith("megamoe: error: ") and message in output.err
    assert output.err.count("\n") == 1 and output.out == "" and "?;" not in output.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_no_cuda_device(blessed, capsys):
    assert main(["check", "--backend", "eager", "--device", "cuda"]) == 2
    assert "torch finds no CUDA device; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: None,
            "has no manifest.json; restore golden/ from version control, or name another",
        ),
        (lambda m: {**m, "schema": 9}, "manifest.json has schema 9"),
        (lambda m: {**m, "contract": "1999-01"}, "the goldens are of contract 1999-01"),
    ],
)
def test_check_with_a_manifest_that_does_not_match(blessed, change, message, capsys):
    path = blessed / "manifest.json"
    manifest = change(json.loads(path.read_text()))
    path.unlink()
    if manifest:
        path.write_text(json.dumps(manifest))
    assert main(["check", "--backend", "eager"]) == 2
    assert message in capsys.readouterr().err


def test_nothing_selected_is_not_a_pass(blessed, capsys):
    assert main(["check", "--backend", "eager", "--kind", "eplb"]) == 2
    assert "NOTHING JUDGED: 0 of 0 cases" in capsys.readouterr().out


def test_bless_refuses_in_ci(root, capsys, monkeypatch):
    assert main(["golden", "record", "-j", "1", "--case", "small"]) == 0
    monkeypatch.setenv("CI", "1")
    assert main(["golden", "bless"]) == 2
    assert "bless refuses to run where CI is set" in capsys.readouterr().err
    assert not (root / "manifest.json").exists()


def test_help_of_a_verb(capsys):
    for words, same in (
        (["help"], ["--help"]),
        (["help", "golden", "diff"], ["golden", "diff", "-h"]),
    ):
        results = []
        for line in (words, same):
            with pytest.raises(SystemExit) as end:
                main(line)
            results.append((end.value.code, capsys.readouterr()))
        assert results[0] == results[1] and results[0][0] == 0


@pytest.mark.parametrize(
    "words",
    [["t*", "s*"], ["--json", "t*", "s*"], ["t*", "--json", "s*"], ["t*", "-k", "s*", "--json"],
     ["--kind", "forward", "t*"], ["-k", "tiny"]],
)  # fmt: skip
def test_a_pattern_needs_no_option(root, words, capsys):
    assert main(["list", *words]) == 0
    out = capsys.readouterr().out
    expected = {"forward/tiny", "staging/small"} if "s*" in words else {"forward/tiny"}
    assert {
        name for name in ("staging/small", "forward/tiny", "errors/over") if name in out
    } == expected


def test_list_for_other_programs(root, capsys):
    assert main(["list", "--tier", "quick"]) == 0
    assert capsys.readouterr().out == "staging/small\tquick\tsomething | with a bar\n"
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_oracle_writes_inputs_and_every_stage(root, capsys):
    out = root / "out.safetensors"
    assert main(["oracle", "--case", "forward/tiny", "--out", str(out)]) == 0
    assert "oracle.y" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("input.hidden_states").shape == (3, 128)
        assert file.get_tensor("input.experts").tolist() == [0, 1]  # two of four are used
        assert file.get_tensor("input.w13_weight").shape == (2, 256, 64)
        sums, rows = (file.get_tensor(f"oracle.{name}") for name in ("gate_up", "slot_rows"))
        assert (sums.shape[2:], sums.dtype) == ((256,), torch.float64)
        assert (rows.shape[2:], rows.dtype) == ((128,), torch.uint16)
        assert file.get_tensor("oracle.y").dtype == torch.uint16
        assert file.get_tensor("oracle.y").shape == (2, 128)  # rows = [0, 2]
        assert json.loads(file.metadata()["case"])["id"] == "forward/tiny"
    expected = ("x", "x_sf", "topk_idx", "l2_acts", "l2_acts_sf", "y", "fp32.y_lo", "exact.y_hi")
    assert {f"oracle.{name}" for name in expected} <= names


def test_oracle_writes_staging_with_its_dtypes(root):
    out = root / "out.safetensors"
    assert main(["oracle", "--case", "staging/small", "--out", str(out)]) == 0
    with safe_open(out, "pt") as file:
        weights = file.get_tensor("oracle.topk_weights")
        assert torch.equal(weights, file.get_tensor("input.topk_weights"))


def report(path, ids, status="pass"):
    path.write_text(json.dumps(whole(ids, status)))
    return str(path)


def test_merge(blessed, capsys):
    one = report(blessed / "1.json", ["staging/small"])
    two = report(blessed / "2.json", ["forward/tiny", "errors/over"])
    out, junit = blessed / "all.json", blessed / "all.xml"
    assert main(["merge", one, two, "--json", str(out), "--junit", str(junit)]) == 0
    assert "each of 3 cases stands once in 2 reports" in capsys.readouterr().out
    assert json.loads(out.read_text())["counts"]["pass"] == 3 and junit.read_bytes()
    assert main(["merge", one]) == 2
    output = capsys.readouterr().err
    assert output.startswith("megamoe: error: 2 cases lost: errors/over, forward/tiny")
    assert main(["merge", one, one, two]) == 2
    assert "1 case judged twice: staging/small" in capsys.readouterr().err
    red = report(blessed / "3.json", ["staging/small"], "fail")
    assert main(["merge", red, two]) == 1
    output = capsys.readouterr().out
    assert "RED: 1 of 3 judged cases did not pass" in output
    assert output.splitlines()[-1].startswith("next: megamoe explain staging/small --backend ")
    (blessed / "4.json").write_text("[]")
    assert main(["merge", str(blessed / "4.json")]) == 2
    assert "is no report of `megamoe check --json`" in capsys.readouterr().err


def test_durations_are_blessed_from_reports(blessed, capsys):
    one = report(blessed / "1.json", ["staging/small"])
    assert main(["golden", "bless", "--durations", one]) == 0
    assert "1 duration taken" in capsys.readouterr().out
    assert json.loads((blessed / "durations.json").read_text()) == {"staging/small": 1.5}


def test_a_stopped_run(monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("megamoe.commands.listing.load_entries", stop)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "megamoe: stopped\n"


# --- what a verb imports --------------------------------------------------------------------------


_EARLY = ("early", "early_backend", "early_places", "main", "parser", "parsers")


def test_a_verb_imports_its_own_module_and_not_the_others(tmp_path):
    """``worker`` copies a file; torch, which takes seconds, is nothing to it."""
    code = (
        "import gc, sys\n"
        "from megamoe.commands.main import main\n"
        f"code = main(['worker', '--out', {str(tmp_path / 'worker.py')!r}])\n"
        "verbs = {n for n in sys.modules if n.startswith('megamoe.commands.')}\n"
        "print(code, gc.isenabled(), 'torch' in sys.modules, *sorted(verbs))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines()[-1].split() == [
        "0", "True", "False",
        *(f"megamoe.commands.{n}" for n in _EARLY),
        *(f"megamoe.commands.parsers.{n}" for n in ("names", "worker")), "megamoe.commands.worker",
    ]  # fmt: skip


HEAVY = {"torch", "numpy", "rich", "safetensors", "pytest", "jinja2"}


LIGHT = [
    *([verb, "--help"] for verb in VERBS),
    ["--help"], ["--version"], ["list"], ["list", "--json"], ["show", "eplb/*"],
    ["completion", "bash"], ["chekc"], ["check", "--bakend", "x"], ["check", "--backend", "x"],
    ["check", "--backend", "no.py:X"], ["explain", "x"], ["help", "check"],
    ["coverage", "--dimension", "x"], ["check", "k.py:K"], ["replay", "README.md"],
    ["fuzz", "--backend", "eager", "--out", "x"], ["confirm"],
]  # fmt: skip


def test_what_needs_no_tensor_imports_no_heavy_module():
    """Help, completion, lists and mistakes. One process: what one imports, all have imported."""
    code = (
        "import contextlib, io, json, sys\n"
        "from megamoe.commands.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    output = io.StringIO()\n"
        "    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main(words)\n"
        "    heavy = {n.partition('.')[0] for n in sys.modules} & {*sys.argv[2:]}\n"
        "    print(json.dumps([words, len(output.getvalue()), sorted(heavy)]))\n"
    )
    command = [sys.executable, "-c", code, json.dumps(LIGHT), *HEAVY]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert [words for words, _, _ in rows] == LIGHT
    assert [(words, heavy) for words, _, heavy in rows if heavy] == []
    assert all(size for _, size, _ in rows)


def test_merge_imports_no_torch():
    code = "import sys, megamoe.commands.merge as m; print(m.__name__, 'torch' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == "megamoe.commands.merge False\n"


def test_the_parsers_names_are_those_of_the_rooms():
    """``parsers/names.py`` repeats them, so that no parser imports torch."""
    assert tuple(sorted(predict.MODELS)) == names.MODELS and predict.SM100.name == names.MODEL
    assert tuple(sorted(SHARES)) == names.SHARES
    assert names.DEFAULT_SHARES == DEFAULT_SHARES
    assert tuple(sorted(PEERS)) == names.PEERS and names.PICTURES == reds.PICTURES
    assert tuple(d.name for d in dimensions(NEWEST)) == names.DIMENSIONS


def test_every_verb_has_the_function_that_its_parser_names():
    waiting = [whole_parser()]
    functions = set()
    while waiting:
        parser = waiting.pop()
        waiting += verbs_of(parser).values()
        run = parser.get_default("run")
        if run:
            module, _, function = run.partition(".")
            assert callable(
                getattr(importlib.import_module(f"megamoe.commands.{module}"), function)
            )
            functions.add(run)
    assert len(functions) > len(VERBS)


def test_a_name_of_several_kinds_needs_the_id(root, capsys):
    more = CASES.replace('name = "over"', 'name = "small"')
    (root / "cases/all.toml").write_text(more)
    assert main(["oracle", "--case", "small", "--out", "x"]) == 2
    assert "'small' is the name of 2: staging/small, errors/small;" in capsys.readouterr().err


def test_an_option_of_the_script_is_not_one_of_capture(root, capsys, monkeypatch):
    """Words after the script are its own, whatever they look like."""
    monkeypatch.chdir(root)
    assert main(["capture", "--calls", "1", "no.py", "--whatever"]) == 2
    assert "no.py: no such file" in capsys.readouterr().err


def test_the_list_of_entries_is_the_list_of_cases():
    entries, cases = load_entries(), load_cases()
    assert [(e.id, e.name, e.kind, e.tier, e.breaks) for e in entries] == [
        (c.id, c.name, c.kind, c.tier, c.breaks) for c in cases
    ]


def test_the_help_says_of_a_verb_what_its_module_says():
    texts = {}

    class Parser:
        def add_parser(self, name, help=None, **more):
            texts.setdefault(name, help)
            return Parser()

        def add_subparsers(self, **more):
            return Parser()

        def __getattr__(self, name):
            return lambda *arguments, **more: Parser()

    commands = Parser()

    def command(parent, name, text, run):
        if parent is commands:
            texts[name] = text
        return Parser()

    for module, _ in VERBS.values():
        importlib.import_module(f"megamoe.commands.parsers.{module}").add(commands, command)
    assert {verb: text for verb, (_, text) in VERBS.items()}.items() <= texts.items()


def test_every_verb_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^ +{verb} +\w", output, re.MULTILINE), verb
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        assert f"usage: megamoe {verb} " in capsys.readouterr().out


def test_the_values_of_an_option_with_several_are_no_words_of_their_own():
    """``--only`` takes files: they are not taken for a backend in the place of a case."""
    line = ["bisect", "--good", "a", "--bad", "b", "--only", "kernel.py", "other.py", "--backend"]
    parsed = whole_parser().parse_args([*line, "kernel.py:K"])
    assert parsed.only == ["kernel.py", "other.py"] and parsed.backend == "kernel.py:K"
    with pytest.raises(UsageError, match=r"kernel\.py is unexpected; a backend stands after"):
        whole_parser().parse_args(["bisect", "kernel.py", "--only", "a"])
