"""``megamoe reduce``: what is left is small, fails the same way, and is a file that says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamoe.backends.eager import EagerBackend
from megamoe.backends.simulate import problem
from megamoe.cases.stored import StoredProblem, load, to_bytes
from megamoe.commands import main as cli
from megamoe.commands.reduce import causes_of, default_names, further_causes, token_need
from megamoe.golden import rows_of
from megamoe.judge import Verdict
from megamoe.reduce import Failure, ReduceError, Reduction, reduce, steps
from megamoe.reduce.core import minimal
from megamoe.suite.at_hand import judge
from tests.helpers.local import Local

pytestmark = pytest.mark.usefixtures("warm")


class OneExpert(EagerBackend):
    """Wrong by 2% in some channels of every token that expert 37, or the last, serves."""

    name = "one-expert"

    def forward(self, problem):
        out = super().forward(problem)
        hit = (problem.topk_ids == min(37, problem.num_experts - 1)).any(1)
        y = out["y"].clone()
        y[hit, 200:] = (y[hit, 200:].float() * 1.02).bfloat16()
        return {**out, "y": y}


class NeedsCompany(EagerBackend):
    """The second row of an expert gets the scale of the first, doubled, in the last group."""

    name = "needs-company"

    def forward(self, problem):
        out = super().forward(problem)
        sf = out["l2_acts_sf"].clone()
        for expert in problem.topk_ids.unique().tolist():
            token, slot = (problem.topk_ids == expert).nonzero(as_tuple=True)
            sf[token[1:], slot[1:], -1] += 1
        return {**out, "l2_acts_sf": sf}


class Raises(EagerBackend):
    """Does not take two slots of one token at one expert."""

    name = "raises"

    def forward(self, problem):
        ids = problem.topk_ids.sort(dim=1).values
        if (ids[:, 1:] == ids[:, :-1]).any():
            raise IndexError(f"duplicate in {len(ids)} tokens")
        return super().forward(problem)


class LosesSlots(EagerBackend):
    """y alone, without the slots that ``lose`` masks in ids (T, K)."""

    name = "loses-slots"

    def forward(self, problem):
        ids = problem.topk_ids.clone()
        self.lose(ids)
        return {"y": super().forward(replace(problem, topk_ids=ids))["y"]}


class LosesRows(LosesSlots):
    """Without the rows of an expert beyond the fourth."""

    def lose(self, ids):
        for expert in ids[ids >= 0].unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            ids[token[4:], slot[4:]] = -1


class LosesASlot(LosesSlots):
    """Without the last slot."""

    def lose(self, ids):
        ids[:, -1] = -1


class Flaky(EagerBackend):
    """Wrong once."""

    name = "flaky"
    calls = 0

    def forward(self, problem):
        out = super().forward(problem)
        Flaky.calls += 1
        return {**out, "y": out["y"] * 2} if Flaky.calls == 1 else out


@pytest.fixture(scope="module")
def many():
    """64 tokens, 48 experts, top-6."""
    recipe = {"w13_scale": [119, 2]}
    return problem(
        7, tokens=64, experts=48, top_k=6, hidden=512, intermediate=384, weights_recipe=recipe
    )


def doubled_y(folder):
    """The ``--backend`` of a kernel in a file whose ``y`` is twice what it should be."""
    file = folder / "bad.py"
    file.write_text(
        "from megamoe.backends.eager import EagerBackend\n"
        "class Bad(EagerBackend):\n"
        "    name = 'bad'\n"
        "    def forward(self, p):\n"
        "        out = super().forward(p)\n"
        "        return {**out, 'y': out['y'] * 2}\n"
    )
    return f"{file}:Bad"


def size(p):
    return p.num_tokens, p.top_k, p.num_experts, p.hidden_size, p.intermediate_size


def test_an_experts_fault_is_left_with_one_token_and_one_expert(many):
    r = reduce(Local(OneExpert()), many)
    # Channel 200 is in the second block of 128, so H cannot be smaller.
    assert size(r.problem) == (1, 1, 1, 256, 128)
    assert Failure.of(judge(r.problem, Local(OneExpert()))[0]) == r.failure
    assert str(r.failure) == "fail at y"


def test_a_fault_that_needs_two_tokens_keeps_two(many):
    r = reduce(Local(NeedsCompany()), many)
    assert size(r.problem) == (2, 1, 1, 128, 128)
    assert r.failure.where == "l2_acts_sf"
    assert r.problem.hidden_states.any()  # not a failure of nothing but zeros


def test_what_raises_is_followed_by_its_type():
    p = problem(3, tokens=5, top_k=3, experts=4, hidden=256, routing_recipe={"kind": "random"})
    p.topk_ids[3] = torch.tensor([2, 0, 2])
    r = reduce(Local(Raises()), p)
    assert r.failure == Failure("error", "IndexError", False, False)
    assert size(r.problem) == (1, 2, 1, 128, 128)


def test_a_right_backend_and_a_flaky_one_are_refused(many):
    small = problem(3)
    with pytest.raises(ReduceError, match="does not fail this"):
        reduce(Local(EagerBackend()), small)
    with pytest.raises(ReduceError, match="not again on the same input"):
        reduce(Local(Flaky()), small)


def test_minimal_ends_where_none_can_go():
    attempts = []

    def fails(part):
        attempts.append(part)
        if {3, 11} <= set(part):
            fails.best = part
            return True
        return False

    minimal(range(16), fails, lambda: False)
    assert fails.best == [3, 11]
    assert len(attempts) < 60


def test_the_command_writes_the_file_and_how_to_see_it(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "given.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(to_bytes(StoredProblem(problem(3, tokens=6, hidden=384))))
    spec = doubled_y(tmp_path)
    assert cli.main(["reduce", str(source), "--backend", spec, "--out", str(out)]) == 0
    again = f"megamoe replay {out} --backend {spec}"
    output = capsys.readouterr().out
    assert f"FAIL {out} (given.safetensors, reduced): y: " in output
    assert output.rstrip().endswith(f"reproduce: {again}")
    read = output.partition(f" of {source}:\n")[2].splitlines()
    assert read[0].startswith("  cause: ")
    about = load(out).about
    causes = about["causes"]
    assert about["every_cause"][: len(causes)] == causes and about["causes_read_from"]
    assert "128 wrong values of 128 elements of y of token " in causes[-1]
    assert read[: len(causes)] == causes
    assert ", 1 token, 1 expert used, after " in output
    before = out.read_bytes()
    assert cli.main(["reduce", str(source), "--backend", spec, "--out", str(out)]) == 2
    assert "the file exists already; name another" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert cli.main(["reduce", str(source), "--after", "--backend", spec]) == 2
    assert f"--after: {source} holds one call and no case; name a" in capsys.readouterr().err
    assert cli.main(again.split()[1:]) == 1
    assert cli.main(["replay", str(out), "--backend", "eager"]) == 0
    assert f"PASS {out} (given.safetensors, reduced): eager, " in capsys.readouterr().out
    assert load(out).about["failure"] == "fail at y"
    assert size(load(out).problem) == (1, 1, 1, 128, 128)
    monkeypatch.chdir(tmp_path)  # without --out
    Path("reduced-out.safetensors").write_text("of an earlier run")
    assert cli.main(["reduce", out.name, "--backend", spec]) == 0
    output = capsys.readouterr().out
    assert "\nunchanged: reduced-out.safetensors, from earlier runs\n" in output
    assert "FAIL reduced-out-2.safetensors (given.safetensors, reduced): y: " in output
    assert load(Path("reduced-out-2.safetensors")).about["reduced_from"] == "out.safetensors"
    assert Path("reduced-out.safetensors").read_text() == "of an earlier run"


def test_the_file_is_tried_in_a_fresh_process(tmp_path, capsys):
    """The tries before it may have left something behind: `replay` would not show the failure."""
    source, out = tmp_path / "given.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(to_bytes(StoredProblem(problem(3, tokens=2, top_k=1, hidden=128))))
    (tmp_path / "k.py").write_text(
        "from megamoe.backends.eager import EagerBackend\n"
        "class Stale(EagerBackend):\n"
        "    calls = 0\n"
        "    def forward(self, p):\n"
        "        self.calls += 1\n"
        "        out = super().forward(p)\n"
        "        is_right = (self.calls, p.num_tokens) == (1, 1)\n"
        "        return out if is_right else {**out, 'y': out['y'] * 2}\n"
    )
    spec = f"{tmp_path}/k.py:Stale"
    assert cli.main(["reduce", str(source), "--backend", spec, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"{out} is written, but does not fail in the same way in a fresh process; " in message


def test_misuse_is_one_line(tmp_path, capsys):
    for arguments, says in (
        (["--backend", "eager"], "name CASE, as in `megamoe reduce forward/"),
        ([], "name CASE and --backend, as in `megamoe reduce forward/"),
        (["nothing-like-it", "--backend", "eager"], "unknown case"),
        (["eplb/identity-map-*,staging/*t8", "--backend", "eager"], "one case is needed here"),
        (
            ["clamp-1?-bell-*", "--backend", "eager"],
            "'clamp-1?-bell-*' matches 1 case: forward/clamp-10-bell-misapplied",
        ),
        (["forward/clamp-*", "--backend", "eager"], "-flips-codes and 12 more"),
        (["staging/ids-widened-from-int32", "--backend", "eager"], "kind staging"),
        (["x.safetensors", "--backend", "eager"], "no such file"),
        (["bell-h256-i128-drifts", "--backend", "eager", "--out", "a.txt"], "ends in .safetensors"),
        (["bell-h256-i128-drifts", "--backend", "eager", "--seconds", "0"], "--seconds"),
    ):
        assert cli.main(["reduce", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_a_property_whose_forward_is_right_has_a_law_to_look_at(capsys):
    case = "property/masked-slots-broken-by-rounding"
    assert cli.main(["reduce", case, "--backend", "eager"]) == 2
    message = capsys.readouterr().err
    assert f"the forward of {case} is right" in message
    assert (
        "law masked-slots compares it with further calls (NaN weights in masked slots; a" in message
    )
    assert f"`megamoe check --backend eager --case {case}`" in message
    assert cli.main(["explain", case, "--backend", "eager"]) == 2
    out, err = capsys.readouterr()
    assert "PASS" not in out and "nothing to explain; law masked-slots compares it with" in err


@pytest.mark.parametrize("reason", ["the backend ended its process", "no result within"])
def test_the_values_of_a_crash_or_a_hang_are_tried_as_zeros_once(many, reason):
    attempts = []
    failure = Failure("error", reason, False, False)
    steps.values(SimpleNamespace(problem=many, failure=failure, take=attempts.append))
    assert [int(p.hidden_states.any()) + int(p.w2_weight.any()) + int(p.w13_weight.any())
            for p in attempts] == [3, 3, 2, 2, 2]  # fmt: skip


class Hangs(Local):
    """A session whose backend gives no result where expert 2 has a token."""

    def __init__(self):
        super().__init__(EagerBackend())
        self.seconds = []

    def ask(self, request, seconds):
        reply = super().ask(request, seconds)
        self.seconds.append(seconds)
        path = next(path for path in request["inputs"] if "topk_ids" in request["inputs"][path])
        if 2 not in self.service.files[path]["topk_ids"]:
            return reply
        place = f"k.py, line {len(self.seconds)} in f"  # each time in another line
        why = f"no result within {seconds:g} s, its process was ended, last seen in {place}"
        return {"broken": f"{why}; give it more with --timeout"}


def test_a_hang_is_reduced_with_little_time_for_each_try():
    session, messages = Hangs(), []
    p = problem(3, tokens=5, top_k=2, experts=4, hidden=256, intermediate=128)
    r = reduce(session, p, seconds=100.0, log=messages.append, timeout=120.0)
    assert r.failure.is_hang and size(r.problem) == (1, 1, 3, 128, 128), "expert 2 stays"
    first, *tries = session.seconds
    assert first == 25.0, "a quarter of --seconds: the file takes as much again"
    assert tries and max(tries) < 10.0 and min(tries) >= 2.0
    why = "no result within 25 s, its process was ended, last seen in k.py, line 1 in f; give it"
    assert messages[0].startswith(f"fails: error: {why}")
    assert messages[1].startswith(
        "to keep to --seconds 100: the whole problem and the file have 25 s "
    )


@pytest.mark.parametrize("name", ["l2_acts", "l2_acts_sf"])
def test_an_error_is_followed_by_all_its_words_but_numbers(name):
    reasons = [f"case a/b: {name} has shape ({n}, 2), expected (3, 2)" for n in (4, 5)]
    first, other = (Failure.of(Verdict("a/b", "forward", "error", why)) for why in reasons)
    assert first == other and first.where == f"{name} has shape"
    assert str(first) == f"error: {name} has shape (4, 2), expected (3, 2)"


def test_ctrl_c_leaves_the_smallest_problem_so_far(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "given.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(to_bytes(StoredProblem(problem(3, tokens=6, hidden=384))))

    def interrupt(r):
        raise KeyboardInterrupt

    arguments = ["reduce", str(source), "--backend", doubled_y(tmp_path), "--out", str(out)]
    monkeypatch.setattr(steps, "tokens", interrupt)
    assert cli.main(arguments) == 130 and not out.exists()
    monkeypatch.undo()
    monkeypatch.setattr(steps, "values", interrupt)
    assert cli.main(arguments) == 130
    assert f"stopped: {out}, " in capsys.readouterr().out
    assert size(load(out).problem)[0] == 1


class TwoFaults(EagerBackend):
    """y is always wrong, and tokens of expert 37 have a wrong scale before that."""

    name = "two-faults"

    def forward(self, problem):
        out = super().forward(problem)
        sf = out["l2_acts_sf"].clone()
        sf[problem.topk_ids == 37] += 1
        return {**out, "l2_acts_sf": sf, "y": out["y"] * 2}


def test_it_does_not_slide_to_a_later_fault(many):
    r = reduce(Local(TwoFaults()), many)
    assert r.failure.where == "l2_acts_sf"
    # Renumbering would have lost it, so expert 37 keeps its place; those after it are gone.
    assert r.problem.topk_ids.tolist() == [[37]] and r.problem.num_experts == 38


def test_blocks_of_i_and_h_are_taken_from_every_tensor_that_has_them(many):
    r = Reduction(None, many, Failure("fail", "y", False, False), None)
    r.take = lambda p, always=False: setattr(r, "problem", p) or p.hidden_size == 512
    r.verdict = SimpleNamespace(worst=SimpleNamespace(stage="l2_acts", channel=300))
    steps.intermediate(r)
    p, rows = r.problem, torch.arange(256, 384)
    assert torch.equal(p.w13_weight, many.w13_weight[:, torch.cat([rows, rows + 384])])
    assert torch.equal(p.w2_weight, many.w2_weight[:, :, 128:192])
    assert torch.equal(p.w2_weight_scale, many.w2_weight_scale[:, :, 8:12])
    r.verdict = SimpleNamespace(worst=SimpleNamespace(stage="y", channel=130))
    r.take = lambda p, always=False: setattr(r, "problem", p) or True
    steps.hidden(r)
    assert torch.equal(r.problem.hidden_states, many.hidden_states[:, 128:256])
    assert torch.equal(r.problem.w13_weight_scale, p.w13_weight_scale[:, :, 4:8])
    assert torch.equal(r.problem.w2_weight, p.w2_weight[:, 128:256])


def test_the_default_name_is_that_of_the_case_and_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["reduced-t9.safetensors", "reduced-t9-2.safetensors", "reduced-t9-3.safetensors"]
    for n, name in enumerate(names):
        assert [*map(str, default_names("t9"))] == names[: n + 1]
        (tmp_path / name).write_text("")
    assert [*map(str, default_names("t7"))] == ["reduced-t7.safetensors"]
    assert [*map(str, default_names("reduced-t7"))] == ["reduced-t7.safetensors"], "of reduce"


def test_the_causes_are_those_of_all_values_of_the_worst_token(many):
    p = rows_of(many, [5])
    verdict = judge(p, Local(LosesASlot()))[0]
    causes = causes_of(Local(LosesASlot()), p, verdict, 60.0)
    assert causes.names == {f"slot 5 (expert {int(p.topk_ids[0, 5])}) is lost"}
    assert causes.lines[0].startswith("  cause: combine: slot 5 (expert ")
    assert causes.lines[1].startswith("    explains all ") and len(causes.lines) == 2
    assert causes_of(Local(LosesASlot()), p, replace(verdict, worst=None), 60.0).lines == []


def test_a_failure_of_many_tokens_says_how_many_it_needs():
    r = reduce(Local(LosesRows()), problem(3, tokens=9, experts=1, top_k=1))
    assert r.problem.num_tokens == 5 and r.with_a_token_fewer() == "pass"
    assert token_need(5, "pass") == "it needs 5 tokens: 4 tokens pass"
    assert not token_need(5, "fail")
    one = reduce(Local(LosesASlot()), problem(3, tokens=2))
    assert one.problem.num_tokens == 1 and one.with_a_token_fewer() == ""


def test_up_to_six_further_causes_are_named():
    six = [f"cause {n}" for n in range(6)]
    says = "further causes fit r.safetensors, which has fewer values to tell them apart"
    assert further_causes({*six}, "r.safetensors") == f"6 {says}: {'; '.join(six)}"
    assert further_causes({*six, "cause 6"}, "r.safetensors") == f"7 {says}"
    assert further_causes(["a"], "r").startswith("1 further cause fits r, ")
    assert further_causes([], "r") == ""


def test_the_rule_of_the_batch_stands_before_what_one_token_shows():
    p = problem(3, tokens=24, top_k=2, experts=4, hidden=128, intermediate=128)
    lines = causes_of(Local(LosesRows()), p, judge(p, Local(LosesRows()))[0], 60.0).lines
    assert lines[0].startswith("  cause: rows 4 and later of each expert are dropped: ")
    assert lines[1].startswith("    explains exactly the ")
    assert lines[2].startswith("  seen at token ")
