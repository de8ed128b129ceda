"""Case files: what they may say, and the one line that a wrong one gets."""

from pathlib import Path

import pytest

from megamoe.cases import CaseError, load_cases, load_file, select

GOOD = """
[defaults]
kind = "forward"
family = "envelope"
breaks = "the sum"
hidden = 128
intermediate = 128
experts = 2
top_k = 1
[defaults.routing]
kind = "random"
scaling = 1.5

[[case]]
name = "edge-t{tokens}"
[case.matrix]
tokens = [1, 7]

[[case]]
name = "flat"
tier = "quick"
tokens = 400
seed = 5
[case.routing]
kind = "same"
"""


def write(tmp_path: Path, text: str, name: str = "a.toml") -> Path:
    folder = tmp_path / "cases"
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_and_matrix_make_full_cases(tmp_path):
    cases = load_file(write(tmp_path, GOOD))
    assert [c.id for c in cases] == ["forward/edge-t1", "forward/edge-t7", "forward/flat"]
    flat = cases[2]
    assert flat.seed == 5 and flat.tier == "quick" and flat.breaks == "the sum"
    assert flat.params["routing_recipe"] == {"kind": "same", "scaling": 1.5}
    assert flat.params["capacity"] == 768 and cases[0].params["capacity"] == 384
    assert flat.params["clamp"] == "none" and flat.params["fast_math"] is True
    assert cases[0].seed != cases[1].seed


def test_a_dotted_matrix_key_reaches_into_a_table(tmp_path):
    text = GOOD.replace("tokens = [1, 7]", '"tokens" = [1]\n"routing.kind" = ["same", "random"]')
    text = text.replace("edge-t{tokens}", "edge-{routing_kind}")
    cases = load_file(write(tmp_path, text))
    assert [c.params["routing_recipe"]["kind"] for c in cases[:2]] == ["same", "random"]
    assert [c.name for c in cases[:2]] == ["edge-same", "edge-random"]


def test_the_values_of_a_matrix_key_of_several_names_go_together(tmp_path):
    text = GOOD.replace("tokens = [1, 7]", '"tokens,routing.kind" = [[1, "same"], [7, "random"]]')
    text = text.replace("edge-t{tokens}", "edge-{routing_kind}-t{tokens}")
    cases = load_file(write(tmp_path, text))
    assert [c.name for c in cases[:2]] == ["edge-same-t1", "edge-random-t7"]
    assert [c.params["routing_recipe"]["kind"] for c in cases[:2]] == ["same", "random"]
    assert [c.params["tokens"] for c in cases[:2]] == [1, 7]


def test_a_model_gives_the_sizes(tmp_path):
    text = """
[[case]]
kind = "forward"
name = "v4"
breaks = "x"
family = "envelope"
model = "deepseek-v4-flash"
ep = 8
tokens = 1
[case.hidden]
kind = "bell"
"""
    (case,) = load_file(write(tmp_path, text))
    p = case.params
    assert (p["hidden"], p["intermediate"], p["experts"], p["top_k"]) == (4096, 2048, 32, 6)
    assert p["clamp"] == 10.0 and p["hidden_recipe"] == {"kind": "bell"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 5", "sede = 5", "a.toml: case flat: unknown key 'sede'; known: activation"),
        ("seed = 5", "seed = -1", "a.toml: case flat: seed is -1; it must be an integer"),
        ("tokens = 400", "", "a.toml: case flat: key 'tokens' is missing"),
        ("tokens = 400", "tokens = 4.5", "a.toml: case flat: tokens is 4.5; it must be int"),
        ("tokens = 400", "tokens = true", "a.toml: case flat: tokens is True; it must be int"),
        ("tokens = 400", "tokens = -1", "tokens is -1; it must not be negative"),
        ("tokens = 400", "tokens = 4\nrows = [4]", "case flat: rows must be ascending, each below"),
        ("tokens = 400", "tokens = 4\ncapacity = 3", "capacity 3 is below tokens 4"),
        ("tokens = 400", "tokens = 4\nclamp = 'no'", "clamp is 'no'; a number or 'none'"),
        ("tokens = 400", "tokens = 4\nactivation = 'gelu'", "activation is 'gelu'; known: swiglu"),
        ("tokens = 400", "tokens = 4\nactivation = 'situ'", "situ takes no clamp, and alpha and"),
        ("tokens = 400", "tokens = 4\nclamp = 'none'\nactivation = 'swiglustep'", "takes a clamp"),
        ("tokens = 400", "tokens = 4\ncombine_dtype = 'fp4'", "must be one of bf16, fp8"),
        ("tokens = 400", "tokens = 4\nshared_recipe = { size = 64 }", "must be a multiple of 128"),
        ("tokens = 400", "tokens = 4\nmodel = 'x'", "unknown model 'x'; known: deepseek-v4-flash"),
        ("tokens = 400", "tokens = 4\nmodel = 'kimi-k3'", "hidden follows from model; drop one"),
        ("tokens = 400", "tokens = 4\nep = 8", "ep needs a model"),
        ("hidden = 128", "hidden = 130", "hidden is 130; it must be a multiple of 128"),
        ("top_k = 1", "top_k = 0", "top_k is 0; it must be at least 1"),
        ('name = "flat"', 'name = "Flat"', "give it a name of a-z"),
        ('name = "flat"', 'name = "edge-t1"', "a.toml: case forward/edge-t1 is already in a.toml"),
        ('kind = "forward"', 'kind = "foward"', "kind is 'foward'; known: staging, eplb"),
        ('breaks = "the sum"', "", "`breaks` is missing"),
        ('tier = "quick"', 'tier = "slow"', "tier is 'slow'; known: quick, full"),
        ('family = "envelope"', 'family = "loose"', "family is 'loose'; known: zero-freedom"),
        ("edge-t{tokens}", "edge-t{token}", "the name does not fit the matrix"),
        ("tokens = [1, 7]", "tokens = []", "matrix holds non-empty lists only"),
        ("tokens = [1, 7]", '"tokens,seed" = [[1]]', "tokens,seed has [1]; give it a list of 2"),
        ("tokens = [1, 7]", '"tokens,seed" = [1]', "tokens,seed has 1; give it a list of 2 values"),
        ("[defaults]", "[default]", "unknown table 'default'; known: defaults, case"),
        ("[defaults]", "[defaults", "a.toml: cannot be read as TOML"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, old, new, message):
    assert old in GOOD
    write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(CaseError) as error:
        load_cases(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_id_may_not_stand_in_two_files(tmp_path):
    write(tmp_path, GOOD, "a.toml")
    write(tmp_path, GOOD, "b.toml")
    with pytest.raises(CaseError, match=r"b.toml: case forward/edge-t1 is already in a.toml"):
        load_cases(tmp_path)


def test_no_case_directory(tmp_path):
    with pytest.raises(CaseError, match=r"no case files: .* set MEGAMOE_GOLDEN"):
        load_cases(tmp_path / "nowhere")


def test_select(tmp_path):
    write(tmp_path, GOOD)
    cases = load_cases(tmp_path)
    assert len(select(cases)) == 3
    assert [c.name for c in select(cases, tier="quick")] == ["flat"]
    assert [c.name for c in select(cases, glob="edge-*")] == ["edge-t1", "edge-t7"]
    assert [c.name for c in select(cases, glob="forward/flat")] == ["flat"]
    assert [c.name for c in select(cases, glob="flat,edge-t7")] == ["edge-t7", "flat"]
    with pytest.raises(CaseError, match="nothing matches 'x'"):
        select(cases, glob="flat,x")
    assert select(cases, kind="eplb") == []
    with pytest.raises(CaseError, match="nothing matches 'x\\*'"):
        select(cases, glob="x*")
    with pytest.raises(CaseError, match="unknown kind 'y'"):
        select(cases, kind="y")
    with pytest.raises(CaseError, match="unknown tier 'z'"):
        select(cases, tier="z")


def test_the_definition_covers_what_decides_the_golden(tmp_path):
    (before,) = (c for c in load_file(write(tmp_path, GOOD)) if c.name == "flat")
    for old, new, same in (
        ("tokens = 400", "tokens = 401", False),
        ("seed = 5", "seed = 6", False),
        ('breaks = "the sum"', 'breaks = "other words"', True),
        ('tier = "quick"', 'tier = "full"', True),
    ):
        cases = load_file(write(tmp_path, GOOD.replace(old, new)))
        (after,) = (c for c in cases if c.name == "flat")
        assert (after.definition() == before.definition()) is same
