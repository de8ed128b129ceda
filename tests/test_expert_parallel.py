"""Expert parallelism over threads: rows, counts, bytes and errors; the bits of one rank."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.backends.eager import EagerBackend
from megamoe.backends.eager_combine import combine
from megamoe.bench import scale
from megamoe.layer import expert_parallel, moves
from megamoe.layer.deep_gemm_experts import DeepGemmMegaMoEExperts, MegaMoEActivation
from megamoe.layer.expert_parallel import STAGES, ExpertParallel, RankError
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.rebalance import placement_of
from megamoe.spec.contract import NEWEST
from megamoe.spec.features import Activation
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import WEIGHTS
from tests.helpers import thread_ranks

EXPERTS, TOP_K, SIZE = 8, 3, 128


@pytest.fixture(autouse=True)
def threads_for_ranks(monkeypatch):
    for module in (expert_parallel, moves):
        monkeypatch.setattr(module, "all_to_all", thread_ranks.all_to_all)


def problem(seed: int, tokens: int, masked: float = 0.2) -> Problem:
    """Random bytes of moderate scales."""
    rng = np.random.default_rng(seed)

    def codes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high, shape, dtype=np.uint8))

    ids = rng.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :TOP_K]
    ids = np.where(rng.random(ids.shape) < masked, -1, ids).astype(np.int64)
    return Problem(
        torch.from_numpy(rng.standard_normal((tokens, SIZE))).bfloat16(),
        torch.from_numpy(ids),
        torch.from_numpy(rng.random(ids.shape, dtype=np.float32)),
        codes(EXPERTS, 2 * SIZE, SIZE // 2),
        codes(EXPERTS, 2 * SIZE, SIZE // 32, low=118, high=124),
        codes(EXPERTS, SIZE, SIZE // 2),
        codes(EXPERTS, SIZE, SIZE // 32, low=118, high=124),
        10.0, True, max(1, tokens),
    )  # fmt: skip


def rank_of(p: Problem, ends: list[int], rank: int, ranks: int) -> Problem:
    """The tokens ``[ends[rank], ends[rank + 1])`` and an equal share of the experts."""
    local = EXPERTS // ranks
    mine = slice(rank * local, (rank + 1) * local)
    weights = {name: getattr(p, name)[mine] for name in WEIGHTS}
    rows = torch.arange(ends[rank], ends[rank + 1])
    return replace(p.at_rows(rows), **weights)


def ends_of(tokens: int, cuts: list[int]) -> list[int]:
    return [0, *sorted(cut % (tokens + 1) for cut in cuts), tokens]


def over(p: Problem, ends: list[int], ranks: int, *, static: bool = False, backend=None, of=None):
    """y of all tokens, and the spans of every rank."""
    spans = {}

    def call(group):
        mine = rank_of(p, ends, group.rank(), ranks)
        span = (of or ExpertParallel)(backend or EagerBackend(), group, static=static)
        span.stats = torch.zeros(EXPERTS // ranks, dtype=torch.int32)
        spans[group.rank()] = span
        return span.forward(mine)

    parts = thread_ranks.over_ranks(ranks, call)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return torch.cat(parts), [spans[r] for r in range(ranks)]


def bits(y: torch.Tensor) -> list[int]:
    return y.view(torch.int16).flatten().tolist()


@given(
    st.integers(0, 1 << 16), st.integers(0, 9), st.sampled_from([1, 2, 4, 8]),
    st.lists(st.integers(0, 99), min_size=7, max_size=7), st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_split_over_any_ranks_gives_the_bits_of_one(seed, tokens, ranks, cuts, masked):
    """Ranks without tokens, tokens without live slots, experts that nobody names."""
    p = problem(seed, tokens, masked)
    ends = ends_of(tokens, cuts[: ranks - 1])
    expected = bits(EagerBackend().forward(p)["y"])
    y, spans = over(p, ends, ranks)
    assert bits(y) == expected
    assert bits(over(p, ends, ranks, static=True)[0]) == expected
    counts = torch.bincount(p.topk_ids[p.topk_ids >= 0], minlength=EXPERTS)
    assert torch.cat([span.stats for span in spans]).tolist() == counts.tolist()
    shape = SimpleNamespace(num_experts=EXPERTS, hidden_size=SIZE, top_k=TOP_K)
    ids = [p.topk_ids[ends[r] : ends[r + 1]] for r in range(ranks)]
    assert [span.traffic for span in spans] == scale.traffic(shape, ids, ranks)


def edited(old: str, new: str) -> type[ExpertParallel]:
    """``ExpertParallel`` of an edited source, over threads."""
    source = Path(expert_parallel.__file__).read_text()
    assert source.count(old) == 1, old
    space: dict = {"__name__": "builtins"}
    exec(compile(source.replace(old, new), "edited", "exec"), space)
    space["all_to_all"] = thread_ranks.all_to_all
    return space["ExpertParallel"]


FAULTS = {
    "rows in the opposite order of owners": ("sort(stable=True)", "sort(descending=True)"),
    "global ids in place of local ones":
        ("(ids.flatten()[sending] % local)", "ids.flatten()[sending].clamp_max(local - 1)"),
    "the neighbour's experts": ("(live, ids // local,", "(live, (ids // local + 1) % ranks,"),
    "weights of slot 0": ("batch.routing.flatten()[sending]", "batch.routing[token, 0]"),
    "rows into the next slot": ("slots[sending] =", "slots[(sending + 1) % len(slots)] ="),
    "the row of status before the rows": ("in (count, 1)", "in (1, count)"),
    "a masked slot is sent": ("live = (ids >= 0)", "live = (ids >= -1)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_planted_fault_moves_bits_or_stops(fault):
    """So the comparison with one rank can fail."""
    p = problem(5, 9)
    expected = bits(EagerBackend().forward(p)["y"])
    of = edited(*FAULTS.get(fault, ("REFUSAL: Final = -1", "REFUSAL: Final = -2")))
    try:
        actual = bits(over(p, [0, 2, 9], 2, of=of)[0])
    except Exception:
        actual = []
    assert (actual == expected) == (fault == "none")


class Waits(TorchDispatchMode):
    """Names of the operators for whose result the host would wait if the tensors were on a GPU.

    ``lift_fresh`` begins a tensor of the host's numbers, whose copy to a GPU waits too. An index of
    bools is a ``nonzero``.
    """

    names = ("nonzero", "bincount", "_local_scalar_dense", "masked_select", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        index = [t for t in args[1] if t is not None] if name in ("index", "index_put_") else []
        if name in self.names or any(t.dtype in (torch.bool, torch.uint8) for t in index):
            self.log.append(name)
        return func(*args, **(kwargs or {}))


def test_a_forward_waits_for_the_device_twice(monkeypatch):
    """For the counts of the header, and for the word of each owner on its rows; docs/performance.md
    has the number. ``tolist`` is no operator: on a GPU it is a copy, and a wait."""
    p, local = problem(6, 9), threading.local()
    plain = torch.Tensor.tolist

    def tolist(tensor):
        local.log.append(f"tolist in {local.stage}")
        return plain(tensor)

    class Rows(EagerBackend):
        def slot_rows(self, x, x_sf, experts, routing, weights, act):
            return x.new_zeros(len(x), SIZE, dtype=torch.bfloat16)

    # On a CPU the combine looks for slots that it need not add.
    monkeypatch.setattr(expert_parallel, "combine", lambda slots, *_: slots[:, 0])
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def call(group):
        span = ExpertParallel(Rows(), group)
        span.stats = torch.zeros(EXPERTS // 2, dtype=torch.int32)
        span.at = lambda stage: setattr(local, "stage", stage)
        mine = rank_of(p, [0, 2, 9], group.rank(), 2)
        with Waits() as waits:
            local.log, local.stage = waits.log, "stage"
            span.forward(mine)
        return waits.log

    for log in thread_ranks.over_ranks(2, call):
        assert log == ["tolist in header", "tolist in return"]


# --- errors -------------------------------------------------------------------------------------


def module(group, p: Problem, ranks: int, most: int, backend=None) -> DeepseekV4MegaMoEExperts:
    """The module with its own part of the weights."""
    local = EXPERTS // ranks
    experts = DeepseekV4MegaMoEExperts(
        most, group=group, num_experts=EXPERTS, num_local_experts=local,
        experts_start_idx=local * group.rank(), top_k=TOP_K, hidden_size=SIZE,
        intermediate_size=SIZE, prefix="layers.3.experts",
        backend=backend or EagerBackend(),
    )  # fmt: skip
    for name in WEIGHTS:
        mine = getattr(p, name)[local * group.rank() : local * (group.rank() + 1)]
        getattr(experts, name).data = mine.clone()
    experts.finalize_weights(without_loader=True)
    return experts


def test_overflow_on_one_rank_is_an_error_on_all_and_the_next_call_is_right():
    p, ranks = problem(3, 12), 4
    ends = [0, 3, 6, 9, 12]

    def call(group):
        rank = group.rank()
        layer = module(group, p, ranks, 3)

        def forward(tokens: slice):
            y = layer(
                p.hidden_states[tokens], p.topk_weights[tokens], p.topk_ids[tokens],
                activation_clamp=10.0,
            )  # fmt: skip
            return y.clone()

        with pytest.raises((ValueError, RankError)) as error:
            forward(slice(0, 4) if rank == 2 else slice(ends[rank], ends[rank + 1]))
        return error.value, forward(slice(ends[rank], ends[rank + 1]))

    results = thread_ranks.over_ranks(ranks, call)
    for rank, (error, _) in enumerate(results):
        if rank == 2:
            assert type(error) is ValueError and "3" in str(error) and "4" in str(error)
        else:
            message = f"rank {rank} of 4: rank 2 failed in stage; its own error says why"
            assert type(error) is RankError and str(error) == message
    assert bits(torch.cat([y for _, y in results])) == bits(EagerBackend().forward(p)["y"])


class AnyId(EagerBackend):
    """Its staging leaves ids as they are."""

    ignores_foreign_ids = True

    def prepare(self, *arguments):
        self.ids = arguments[2].flatten().tolist()
        super().prepare(*arguments)


def test_ids_of_no_expert_stay_as_they_are_if_the_backend_lets_them_and_have_no_effect():
    p = problem(7, 9)
    ids = torch.where(p.topk_ids < 0, torch.tensor([EXPERTS, -7, 1 << 40]), p.topk_ids)
    expected = bits(EagerBackend().forward(p)["y"])

    def call(group):
        backend, rows = AnyId(), slice(4 * group.at, 4 + 5 * group.at)
        layer = module(group, p, 2, 9, backend)
        arguments = p.hidden_states[rows], p.topk_weights[rows], ids[rows]
        return layer(*arguments, activation_clamp=10.0), backend.ids

    results = thread_ranks.over_ranks(2, call)
    assert bits(torch.cat([y for y, _ in results])) == expected
    assert [i for _, local_ids in results for i in local_ids] == ids.flatten().tolist()


class FailsOnce(EagerBackend):
    """The rank that holds expert 0 cannot compute."""

    def slot_rows(self, x, x_sf, experts, routing, weights, act):
        if self.broken:
            raise MemoryError("no room for the rows")
        return super().slot_rows(x, x_sf, experts, routing, weights, act)


def test_an_owner_that_fails_is_named_by_all_others():
    p = problem(4, 6, masked=0.0)

    def call(group):
        backend = FailsOnce()
        backend.broken = group.rank() == 1
        span = ExpertParallel(backend, group)
        stages = []
        span.at = stages.append
        try:
            span.forward(rank_of(p, [0, 2, 4, 5, 6], group.rank(), 4))
        except Exception as error:
            return error, stages
        return None, stages

    results = thread_ranks.over_ranks(4, call)
    assert type(results[1][0]) is MemoryError
    for rank in (0, 2, 3):
        assert str(results[rank][0]) == (
            f"rank {rank} of 4: rank 1 failed in experts; its own error says why"
        )
    assert all(stages == list(STAGES[1:5]) for _, stages in results), (
        "nobody left before the return"
    )


def test_a_group_that_breaks_names_rank_and_stage(monkeypatch):
    p = problem(4, 2)

    def broken(rows, out, into, group):
        if out is None:
            return thread_ranks.all_to_all(rows, out, into, group)
        raise RuntimeError("Connection closed by peer\n[127.0.0.1]:2")

    monkeypatch.setattr(expert_parallel, "all_to_all", broken)
    for rank, error in enumerate(
        thread_ranks.over_ranks(
            2, lambda g: ExpertParallel(EagerBackend(), g).forward(rank_of(p, [0, 1, 2], g.at, 2))
        )
    ):
        assert str(error) == (
            f"rank {rank} of 2 lost the others in dispatch: Connection closed by peer [127.0.0.1]:2"
        )


def test_a_backend_without_rows_is_refused():
    with pytest.raises(NotImplementedError, match="backend mine cannot run over several ranks"):
        ExpertParallel(SimpleNamespace(name="mine", accumulator="fp32"), None)


def test_ranks_that_do_not_share_the_experts_evenly_are_refused():
    p = problem(1, 2)
    group = thread_ranks.Group(thread_ranks.World(2), 0)
    with pytest.raises(ValueError, match="an equal share of the 8 experts on each rank"):
        DeepseekV4MegaMoEExperts(
            4, group=group, num_experts=EXPERTS, num_local_experts=3, experts_start_idx=0,
            top_k=TOP_K, hidden_size=SIZE, intermediate_size=SIZE, prefix="x",
            backend=EagerBackend(),
        ).to(p.topk_ids.device)  # fmt: skip


# --- the newer face -----------------------------------------------------------------------------


def load_experts(group, p: Problem, ranks: int, newer: bool, backend, activation=None):
    """Either face, with the checkpoint of ``p`` loaded tensor by tensor."""
    local = EXPERTS // ranks
    face, more = DeepseekV4MegaMoEExperts, {}
    if newer:
        face, more = (
            DeepGemmMegaMoEExperts,
            {"activation": activation or MegaMoEActivation(clamp=10.0)},
        )
    experts = face(
        16, group=group, num_experts=EXPERTS, num_local_experts=local,
        experts_start_idx=local * group.rank(), top_k=TOP_K, hidden_size=SIZE,
        intermediate_size=SIZE, prefix="experts", backend=backend, **more,
    )  # fmt: skip
    for name in WEIGHTS:
        for expert, tensor in enumerate(getattr(p, name)):
            parts = {"w2": tensor}
            if name.startswith("w13"):
                parts = {"w1": tensor[:SIZE], "w3": tensor[SIZE:]}
            for shard, part in parts.items():
                experts.weight_loader(getattr(experts, name), part, name, shard, expert)
    if not newer:
        experts.finalize_weights()
    return experts


def faces(p: Problem, ends: list[int], backend, rounds: int = 1, activation=None):
    """y of all tokens by the older face, and by the newer one after the same calls."""
    ranks = len(ends) - 1

    def call(group):
        mine = slice(ends[group.at], ends[group.at + 1])
        arguments = p.hidden_states[mine], p.topk_weights[mine], p.topk_ids[mine]
        out = []
        for newer in (False, True):
            layer = load_experts(group, p, ranks, newer, backend(), activation)
            options = {} if newer else {"activation_clamp": 10.0}
            out.append([layer(*arguments, **options).clone() for _ in range(rounds)][-1])
        return out

    parts = thread_ranks.over_ranks(ranks, call)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    return [torch.cat([part[i] for part in parts]) for i in (0, 1)]


@pytest.mark.parametrize("ends", [[0, 5, 12], [0, 0, 3, 12, 12]], ids=["two ranks", "some empty"])
@pytest.mark.parametrize("kind", ["slot_rows", "run", "forward_group"])
def test_both_faces_give_the_bits_of_one_rank_over_ranks(kind, ends):
    p = problem(11, 12)
    backend = {"slot_rows": EagerBackend, "run": ByRun, "forward_group": Exchanges}[kind]
    older, newer = faces(p, ends, backend, rounds=2)
    assert bits(newer) == bits(older) == bits(EagerBackend().forward(p)["y"])


def test_an_activation_of_the_newer_face_is_computed_over_ranks():
    p = replace(problem(12, 9), activation_clamp=None, activation="situ", activation_alpha=4.0,
                activation_beta=25.0)  # fmt: skip
    act = MegaMoEActivation("situ", alpha=4.0, beta=25.0)
    plain, newer = faces(p, [0, 4, 9], EagerBackend, activation=act)
    assert bits(newer) == bits(EagerBackend().forward(p)["y"]) != bits(plain)


def test_overflow_on_the_newer_face_is_an_error_on_all_ranks():
    p = problem(3, 40)

    def call(group):
        layer = load_experts(group, p, 2, True, EagerBackend())
        rows = slice(0, 17) if group.at else slice(17, 20)
        with pytest.raises((ValueError, RankError)) as error:
            layer(p.hidden_states[rows], p.topk_weights[rows], p.topk_ids[rows])
        return str(error.value)

    other, own = thread_ranks.over_ranks(2, call)
    assert own == "MegaMoE got 17 tokens, but the symmetric buffer was sized for 16."
    assert other == "rank 0 of 2: rank 1 failed in stage; its own error says why"


class Exchanges:
    """A kernel that spans the ranks itself: every rank computes all tokens' slots of its experts.

    The rows of other ranks are zeros, and the sum over ranks of each slot is its row.
    """

    name, accumulator, contracts = "exchanges", "fp32-ordered", ("2026-11",)

    def forward_group(self, p, group):
        ranks, eager = group.size(), EagerBackend()
        same = {"out": [len(p.topk_ids)] * ranks, "group": group}
        size = torch.tensor([len(p.topk_ids)] * ranks)
        into = thread_ranks.all_to_all(size, None, None, group).tolist()

        def gathered(rows):
            return thread_ranks.all_to_all(rows.repeat(ranks, 1), into=into, **same)

        ids = gathered(p.topk_ids) - group.rank() * p.num_experts
        whole = replace(
            p, hidden_states=gathered(p.hidden_states), topk_weights=gathered(p.topk_weights),
            topk_ids=torch.where((ids >= 0) & (ids < p.num_experts), ids, -1),
        )  # fmt: skip
        rows = torch.stack([eager.forward(one_slot(whole, k))["y"] for k in range(TOP_K)], 1)
        back = thread_ranks.all_to_all(rows, into, [len(p.topk_ids)] * ranks, group)
        slots = back.view(ranks, len(p.topk_ids), TOP_K, SIZE).float().sum(0).bfloat16()
        return combine(slots, p.topk_ids >= 0, p.topk_weights, NEWEST)


def one_slot(p: Problem, k: int) -> Problem:
    return replace(p, topk_ids=p.topk_ids[:, k : k + 1], topk_weights=p.topk_weights[:, k : k + 1])


# --- run, and weights that move -----------------------------------------------------------------


class ByRun:
    """``eager`` behind the ``run`` face of a kernel: it reads the staged buffer."""

    name, accumulator, contracts = "by-run", "fp32-ordered", ("2026-11",)

    def pack_weights(self, *weights):
        return weights

    def run(self, y, weights, buffer, num_tokens, *, activation_clamp, fast_math):
        rows = EagerBackend().slot_rows(
            buffer.x[:num_tokens].view(torch.uint8), buffer.x_sf[:num_tokens],
            buffer.topk_idx[:num_tokens, 0], buffer.topk_weights[:num_tokens, 0], weights,
            Activation("swiglu", activation_clamp, 1.0, 0.0, fast_math),
        )  # fmt: skip
        y.copy_(rows)


@pytest.mark.parametrize("static", [False, True])
def test_a_backend_with_run_computes_rows_of_one_slot(static):
    """More rows than the first buffer holds: it grows."""
    p = problem(9, 200, masked=0.1)
    y, _ = over(p, [0, 30, 200], 2, static=static, backend=ByRun())
    assert bits(y) == bits(EagerBackend().forward(p)["y"])


def test_weights_move_over_ranks_as_in_one_process():
    old = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    new = torch.tensor([3, 3, 0, 2, 1, 1, 0, 2])
    placement_of(new[None], 4)
    whole = [torch.arange(8).repeat_interleave(3).view(8, 3) % 4, torch.rand(4, 5).repeat(2, 1)]
    alone = [t.clone() for t in whole]
    moves.move_expert_weights(alone, old, new)

    def call(group):
        mine = [t[2 * group.at : 2 * group.at + 2].clone() for t in whole]
        moves.move_over_ranks(mine, old, new, group)
        return mine

    parts = thread_ranks.over_ranks(4, call)
    for i, tensor in enumerate(alone):
        assert torch.equal(torch.cat([part[i] for part in parts]), tensor)
