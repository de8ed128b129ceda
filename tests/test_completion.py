"""``megamoe completion``: what each shell would offer."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from megamoe.cases import KINDS, load_entries
from megamoe.commands.main import VERBS, main, whole_parser
from megamoe.commands.parsers.completion import SHELLS
from megamoe.spec.contract import CONTRACTS, REVISIONS
from megamoe.worker.known import available


@pytest.fixture(scope="module")
def scripts():
    """Shell to script, made once."""
    import contextlib
    import io

    out = {}
    for shell in SHELLS:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert main(["completion", shell]) == 0
        out[shell] = output.getvalue()
    return out


def offers(script, tmp_path, *words):
    """What bash offers for the last of ``words``."""
    array = " ".join(f"'{word}'" for word in words)
    ask = f"{script}\nCOMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _megamoe\n"
    ask += 'printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "--norc", "-c", ask]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert process.stderr == ""
    return set(process.stdout.removesuffix("\n").split("\n"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_offers_what_the_parser_takes(scripts, tmp_path):
    (tmp_path / "kernel.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder").mkdir()
    bash = scripts["bash"]

    def of(*words):
        return offers(bash, tmp_path, "megamoe", *words)

    assert of("") >= {*VERBS, "--version"}
    assert of("ch") == {"check"}
    assert of("check", "--ba") == {"--backend"}
    assert of("check", "--kind", "") == {*KINDS}
    assert of("check", "--backend", "eager", "--tier", "q") == {"quick"}
    assert of("check", "--backend", "k") == {"kernel.py"}
    assert of("check", "--backend", "") == {*available(), "kernel.py", "folder"}  # no notes.txt
    assert of("check", "--contract", "2026-1") == {r for r in REVISIONS if r.startswith("2026-1")}
    assert of("contract", "diff", "sg") == {c for c in CONTRACTS if c.startswith("sg")}
    assert of("check", "-n", "") == of("check", "--timeout", "") == {""}  # a number
    assert of("check", "--json", "n") == {"notes.txt"}
    assert of("show", "") == {f"{kind}/" for kind in KINDS}
    eplb = {entry.id for entry in load_entries() if entry.kind == "eplb"}
    assert (
        of("show", "eplb/") == of("check", "--case", "eplb/") == of("list", "-k", "eplb/") == eplb
    )
    assert of("show", "--js") == {"--json"}
    assert of("explain", "") == {f"{kind}/" for kind in KINDS} | {
        "folder",
        "kernel.py",
        "notes.txt",
    }
    assert of("golden", "re") == {"record", "record-bits"}
    assert {"--case", "-j"} <= of("golden", "record", "-") and "--kind" not in of("golden", "-")
    assert of("completion", "") >= {*SHELLS}
    assert of("list", "check", "--backe") == {""}  # an option of check, and this is list


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_takes_its_script(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script is not tried")
    process = subprocess.run([shell, "-n"], input=scripts[shell], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_fish_knows_each_verb_and_each_flag(scripts):
    flags = set()
    for action in whole_parser()._subparsers._group_actions[0].choices.values():
        flags |= {flag for a in action._actions for flag in a.option_strings}
    for verb in VERBS:
        assert re.search(rf" -a {verb} -d ", scripts["fish"]), verb
    for flag in flags:
        kind = "l" if flag.startswith("--") else "s"
        assert re.search(rf" -{kind} {re.escape(flag.lstrip('-'))}\b", scripts["fish"]), flag


def test_zsh_takes_the_script_of_bash(scripts):
    head, rest = scripts["zsh"].split("\n", 1)
    assert "bashcompinit" in head and rest == scripts["bash"]
