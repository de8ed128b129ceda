"""A bad place for a file is refused before a verb works, and a bad pair of options too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamoe.commands import main as cli

JUDGE = ["--backend", "eager"]
REDUCE = ["reduce", "forward/bell-h256-i128-drifts", *JUDGE]
REPLAY = ["replay", "here.safetensors", *JUDGE]
BISECT = ["bisect", "--over", "this", "that"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*REDUCE, "--out", "r.json"], "r.json: name a file that ends in .safetensors"),
        ([*REDUCE, "--out", "."], ". is a directory; name a file"),
        ([*REDUCE, "--out", "here.safetensors"], "the file exists already; name another"),
        (["fuzz", *JUDGE, "--out", "r"], "r: name a file that ends in .safetensors"),
        (["fuzz", *JUDGE, "--out", "here.safetensors"], "the file exists already; name another"),
        (["capture", "--out", "r", "k.py"], "r: name a file that ends in .safetensors"),
        (["worker", "--out", "w"], "w: name a file that ends in .py"),
        (["oracle", "--case", "x", "--out", "."], ". is a directory; name a file"),
        (["confirm", "--out", "no/x"], "no/x: there is no folder no; create it first"),
        (["report", "k.py", "-o", "no/x.html"], "no/x.html: there is no folder no; create it"),
        (["check", *JUDGE, "--json", "k.py/x"], "k.py/x: k.py is a file and no folder; name a"),
        (["check", *JUDGE, "--json", "/dev/full"], "/dev/full is no regular file, such as a dev"),
        (["check", *JUDGE, "--json", "a", "--junit", "./a"], "--json and --junit name the same "),
        (["merge", "k.py", "--junit", "."], ". is a directory; name a file"),
        (
            ["golden", "record-bits", *JUDGE, "--out", "k.py"],
            "error: k.py is a file; name a folder",
        ),
        (["kernels", "--report", "k.py/site"], "k.py/site: {here}/k.py is a file; name a folder"),
        ([*BISECT, "--state", "k.py"], "error: k.py is a file; name a folder"),
        ([*BISECT, "--json", "."], ". is a directory; name a file"),
        (["ab", "this", "this", "--json", "no/x"], "no/x: there is no folder no; create it first"),
        (["explain", "x", *JUDGE, "--json", "."], ". is a directory; name a file"),
        ([*REPLAY, "--json", "no/x"], "no/x: there is no folder no; create it first"),
        ([*REDUCE, "--after", "--out", "r.safetensors"], "--out: --after writes no file; leave"),
        ([*REDUCE, "--seconds", "0"], "'0' is not a number of seconds above 0"),
        (["confirm"], "give --out FILE where the GPU is, or --from FILE"),
        (["bench", "--from", "no.json"], "no.json: no such file"),
    ],
)
def test_it_is_refused_early(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_function", lambda run: pytest.fail(f"{run} was imported"))
    for name in ("k.py", "here.safetensors"):
        Path(name).touch()
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message.format(here=tmp_path) in error and error.count("\n") == 1
