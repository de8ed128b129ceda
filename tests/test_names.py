"""tools/names.py finds names that are a participle, and this tree has none."""

import pytest

from tools import names


@pytest.mark.parametrize(
    "line",
    ["found = 1", "def f(given): ...", "def made(): ...", "class Shown: ...", "self._said = 1",
     "for seen in (): ...", "with a as got: ..."],
)  # fmt: skip
def test_each_form_of_a_binding_is_read(line, tmp_path, capsys):
    (tmp_path / "one.py").write_text(line)
    assert names.main([str(tmp_path)]) == 1
    assert "one.py:1: " in capsys.readouterr().out


def test_a_use_an_adjective_and_a_noun_are_no_findings(tmp_path, capsys):
    (tmp_path / "one.py").write_text("match = found(made.given, said=1)\nstored_bits = 1\n")
    assert names.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


def test_the_project_has_no_such_name(capsys):
    assert names.main([]) == 0, capsys.readouterr().out
