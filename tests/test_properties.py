"""Each law turns red for a forward that breaks it, and stays green for one that does not."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.cases import load_cases
from megamoe.cases.forms import LAUNCH_LAWS, LAWS
from megamoe.cases.laws import CALLS, MODES, after, calls_of
from megamoe.cases.needs import lacking
from megamoe.judge import BadOutput, Verdict, of_findings, picture
from megamoe.kinds import laws
from megamoe.kinds.property import launch_findings
from megamoe.layer import engine_laws, launch_laws
from megamoe.layer.symm_buffer import new_symm_buffer
from megamoe.report import failures
from megamoe.spec.contract import BASE
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import NVFP4_FACTORS
from megamoe.worker.exchange import BackendFailure, Caller
from megamoe.worker.session import APART, Identity
from tests.helpers.local import Local


def problem(tokens: int = 6) -> Problem:
    """Six tokens, two slots, four experts whose first weight byte tells them apart."""
    experts = torch.arange(4, dtype=torch.uint8).view(4, 1, 1)
    ids = torch.tensor([[0, 1], [2, -1], [1, 2], [0, 2], [-1, 0], [1, 0]])[:tokens]
    return Problem(
        hidden_states=torch.arange(1.0, 1 + tokens * 128).view(tokens, 128).bfloat16(),
        topk_ids=ids,
        topk_weights=torch.full((tokens, 2), 0.5),
        w13_weight=experts.expand(4, 256, 64).contiguous(),
        w13_weight_scale=torch.full((4, 256, 4), 127, dtype=torch.uint8),
        w2_weight=experts.expand(4, 128, 64).contiguous(),
        w2_weight_scale=torch.full((4, 128, 4), 127, dtype=torch.uint8),
        activation_clamp=None,
        fast_math=True,
        max_num_tokens=384,
    )


def repeated(tokens: int) -> Problem:
    """The six rows of :func:`problem` in turn."""
    base, rows = problem(6), torch.arange(tokens) % 6
    return replace(
        base,
        hidden_states=base.hidden_states[rows],
        topk_ids=base.topk_ids[rows],
        topk_weights=base.topk_weights[rows],
    )


def honest(p: Problem) -> torch.Tensor:
    """A toy layer: hidden times the live slots' weights times a number of each slot's expert."""
    live = p.topk_ids >= 0
    number = 1.0 + p.w13_weight[p.topk_ids.clamp_min(0), 0, 0].float()
    total = torch.where(live, p.topk_weights * number, 0.0).sum(1, keepdim=True)
    return torch.where(live.any(1, keepdim=True), p.hidden_states.float() * total, 0.0).bfloat16()


def counting() -> Callable[[Problem], torch.Tensor]:
    calls = iter(range(200))
    return lambda p: honest(p) + next(calls)


def keeping() -> Callable[[Problem], torch.Tensor]:
    """Keeps the first weights that it sees, whatever layer calls next."""
    weights: list[torch.Tensor] = []

    def forward(p: Problem) -> torch.Tensor:
        weights.append(p.w13_weight)
        return honest(replace(p, w13_weight=weights[0]))

    return forward


def leaking() -> Callable[[Problem], torch.Tensor]:
    """Adds a row that the call before left in its buffer."""
    buffer = [torch.zeros(128)]

    def forward(p: Problem) -> torch.Tensor:
        out = honest(p).float() + buffer[0].clamp(-1, 1)
        buffer[0] = torch.where(p.hidden_states[0].abs().float() > 1e20, 1.0, 0.0)
        return out.bfloat16()

    return forward


def y_of(forward: Callable[[Problem], torch.Tensor]) -> laws.Forward:
    """As the suite has it: bits in memory of their own."""
    return lambda p: bits(forward(p)).copy()


BROKEN: dict[str, Callable[[Problem], torch.Tensor]] = {
    "batch-invariance": lambda p: honest(p) * (2.0 if p.num_tokens == 1 else 1.0),
    "token-permutation": lambda p: honest(p) + torch.arange(p.num_tokens).unsqueeze(1) * 512,
    "replica-choice": lambda p: honest(p) * torch.where(p.topk_ids.amax(1, True) > 3, 2.0, 1.0),
    "ep-size": lambda p: honest(p) * torch.where((p.topk_ids == 0).any(1, True), 2.0, 1.0),
    "capacity": lambda p: honest(p) * (2.0 if p.max_num_tokens > 8000 else 1.0),
    "padding-rows": lambda p: honest(p) + 0 * p.hidden_states.float().sum().bfloat16(),
    "masked-slots": lambda p: honest(p) * p.topk_weights.sum(1, keepdim=True),
}


@pytest.mark.parametrize("law", laws.LAWS)
def test_a_lawful_forward_keeps_every_law(law: str) -> None:
    assert not [f.text for f in laws.findings(y_of(honest), problem(), law) if f.bad]


@pytest.mark.parametrize("law", laws.LAWS)
def test_breaking_a_law_is_found_and_named(law: str) -> None:
    stateful = {
        "repeat": counting(), "many-calls": counting(), "other-weights": keeping(),
        "stale-buffer": leaking(),
    }  # fmt: skip
    forward = stateful.get(law) or BROKEN[law]
    bad = [f for f in laws.findings(y_of(forward), problem(), law) if f.bad]
    assert bad
    assert bad[0].text.startswith(f"{law}: ")
    assert bad[0].worst is not None


def test_a_broken_law_is_shown_as_two_calls_in_the_terminal_and_in_a_report() -> None:
    """Nobody knows which of the two is right, so neither is expected."""
    forward = y_of(lambda p: honest(p) * (2.0 if p.num_tokens == 1 else 1.0))
    bad = [f for f in laws.findings(forward, problem(), "batch-invariance") if f.bad][:1]
    verdict = of_findings("property/a", "property", bad, ("law",))
    copy = Verdict.from_dict(json.loads(json.dumps(verdict.to_dict())))
    text = picture(copy, "b")
    assert "elements have other bits than the first call" in text
    finding = json.loads(json.dumps(verdict.to_dict()))["findings"][0]
    view = failures.stage(finding, [])
    assert view["wrong"] == "with other bits"
    for line in (text, view["worst"]):
        assert re.search(r"token \d+ channel \d+: first call .*, this call .* ULP apart", line)
        assert "expected" not in line


@pytest.mark.parametrize(
    ("law", "tokens", "other_path"),
    [
        ("batch-invariance", 33, lambda p: p.num_tokens == laws.PIECE),
        ("padding-rows", 6, lambda p: p.num_tokens > 100),
        ("replica-choice", 6, lambda p: p.num_experts > 16),
    ],
)
def test_a_path_for_few_or_for_many_rows_is_entered(
    law: str, tokens: int, other_path: Callable[[Problem], bool]
) -> None:
    batch = repeated(tokens)
    forward = y_of(lambda p: honest(p) * (2.0 if other_path(p) else 1.0))
    assert [f for f in laws.findings(forward, batch, law) if f.bad]


@pytest.mark.parametrize("law", laws.LAWS)
def test_no_variant_brings_more_tokens_than_its_buffer_takes(law: str) -> None:
    """A kernel would be right to refuse it."""
    for variant in laws.variants(repeated(300), law):
        assert variant.problem.num_tokens <= variant.problem.max_num_tokens


def test_an_unknown_law_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown law 'gravity'; known: repeat, "):
        list(laws.variants(problem(), "gravity"))


def test_the_doubled_batch_says_its_tokens() -> None:
    p = problem()
    *_, last = laws.variants(p, "batch-invariance")
    assert last.label == f"the batch appended to itself ({2 * p.num_tokens} tokens)"


# --- laws of the launch -----------------------------------------------------------------------


class Launched:
    """The toy layer with the ``run`` face; ``trouble`` says which mistake its ``run`` makes."""

    name, accumulator = "launched", "fp32"

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble
        self.last: tuple[torch.Tensor, ...] = ()
        self.settled: torch.Tensor | None = None

    def forward(self, p: Problem) -> torch.Tensor:
        return honest(p)

    def transform_weights(self, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return weights

    def new_symm_buffer(self, group, device, sizes):
        buffer = new_symm_buffer(group, device, sizes)
        buffer.counts = torch.zeros(4, dtype=torch.int32, device=device)
        buffer.scratch = ("counts",)
        return buffer

    def prepare(self, hidden, weights, ids, x, x_sf, topk_idx, topk_weights) -> None:
        topk_idx.copy_(ids)
        topk_weights.copy_(weights)
        self.last = (hidden, topk_idx, topk_weights)

    def run(self, y, weights, buffer, num_tokens, *, activation_clamp, fast_math) -> None:
        hidden, ids, routing = self.last
        if self.trouble == "settles the routing":
            self.settled = ids.clone() if self.settled is None else self.settled
            ids = self.settled
        out = honest(Problem(hidden, ids, routing, *weights, activation_clamp, fast_math, 384))
        if self.trouble == "adds to y":
            y.add_(out)
            return
        y.copy_(out)
        if self.trouble == "reads beyond the batch":
            y.add_(buffer.topk_weights[num_tokens, 0].bfloat16())
        if self.trouble == "adds to old scales":
            y.add_((buffer.l2_acts_sf[0, 0, 0] == 0xFF).bfloat16() * 64)
        if self.trouble == "adds to old counts":
            y.add_(buffer.counts[0].bfloat16() * 64)
        if self.trouble == "another sum":
            y.mul_(2)


def launched(backend: object, law: str = "stale-bytes", device: str = "cpu") -> list[str]:
    runner = SimpleNamespace(session=Local(backend, device))
    with Caller(runner.session, 100.0) as call:
        findings = launch_findings(runner, call, problem(), law)
    return [f.text for f in findings if f.bad]


def test_every_law_of_a_case_file_is_known_to_one_module() -> None:
    assert set(LAWS) == set(laws.LAWS) | set(LAUNCH_LAWS) and set(LAUNCH_LAWS) == set(
        launch_laws.LAWS
    )
    assert not set(laws.LAWS) & set(launch_laws.LAWS)


def test_a_clean_launch_keeps_the_law() -> None:
    assert launched(Launched()) == []


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("another sum", "stale-bytes: the run face instead of forward changes "),
        ("adds to y", "stale-bytes: the run face instead of forward changes 768 of 768 outputs"),
        ("reads beyond the batch", "stale-bytes: 0xFF in the whole buffer before a second call "),
        ("adds to old scales", "stale-bytes: 0xFF in the whole buffer before a second call "),
        ("adds to old counts", "stale-bytes: 0xFF in the whole buffer before a second call "),
    ],
)
def test_a_launch_that_reads_old_bytes_is_found(trouble: str, message: str) -> None:
    bad = launched(Launched(trouble))
    assert bad and bad[0].startswith(message)


def test_what_a_law_needs_is_said_where_it_is_missing() -> None:
    def lacks(law: str, *offers: str) -> str:
        of_law = (c for c in load_cases() if c.params.get("law") == law)
        case = next(c for c in of_law if c.kind == "property" and BASE.revision in c.revisions)
        return lacking(case, Identity("b", "fp32", ("forward", *offers)))

    for law in ("stale-bytes", "graph-replay"):
        assert lacks(law) == "the backend has no run"
    assert lacks("stale-bytes", "run") == ""
    for law in ("graph-replay", "busy-stream"):
        assert lacks(law, "run").startswith(f"law {law} needs a CUDA device")


class InModes:
    """The toy layer with one trouble: something of torch's, or of the tensors, decides its bits."""

    name, accumulator = "in-modes", "fp32"

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble

    def forward(self, p: Problem) -> torch.Tensor:
        y = honest(p)
        if self.trouble == "a product":
            return torch.mm(y.float(), torch.eye(128) * 1.004).bfloat16()
        if self.trouble == "a constant":
            return (y.float() * torch.tensor(1.004, device="cpu").float()).bfloat16()
        if self.trouble == "memory":
            return y + torch.zeros(1)[0].item()
        if self.trouble == "inference":
            return y * 2 if torch.is_inference_mode_enabled() else y
        if self.trouble == "grad":
            return y * 2 if not torch.is_grad_enabled() else y
        return y


class InTypes(InModes):
    """Its staging takes ids of int32 for others."""

    ignores_foreign_ids = True

    def prepare(self, hidden: Any, weights: Any, ids: Any, x: Any, x_sf: Any, *out: Any) -> None:
        out[0].copy_(ids if ids.dtype == torch.int64 else ids.clamp_max(0))
        out[1].copy_(weights)


@pytest.mark.parametrize("law", engine_laws.LAWS)
def test_a_layer_that_looks_at_nothing_around_it_keeps_the_law(law: str) -> None:
    assert launched(InModes(), law) == []


@pytest.mark.parametrize(
    ("backend", "law", "message"),
    [
        (InModes("a product"), "autocast", "autocast: autocast to bfloat16 changes "),
        (InModes("a constant"), "torch-defaults", "torch-defaults: a default dtype of bfloat16 ch"),
        (InModes("inference"), "grad-mode", "grad-mode: inference mode changes 768 of 768 outputs"),
        (InModes("grad"), "grad-mode", "grad-mode: inference mode changes 768 of 768 outputs"),
        (InTypes(), "engine-tensors", "engine-tensors: ids of int32 changes "),
    ],
)
def test_what_surrounds_a_call_and_decides_a_bit_is_found(
    backend: InModes, law: str, message: str
) -> None:
    bad = launched(backend, law)
    assert bad and bad[0].startswith(message)


def mode_now() -> str:
    """torch's mode around a call, by the label of its law."""
    if torch.is_autocast_enabled("cpu"):
        return f"autocast to {str(torch.get_autocast_dtype('cpu')).removeprefix('torch.')}"
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return "inference mode" if torch.is_inference_mode_enabled() else "no grad"
    if torch.get_default_device().type == "meta":
        return "a default device of meta"
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    return "none" if dtype == "float32" else f"a default dtype of {dtype}"


class KeepsOf(InModes):
    """What it makes in its first call serves all others. If that is made in the mode ``trouble``,
    it is wrong outside of that mode."""

    first = ""

    def forward(self, p: Problem) -> torch.Tensor:
        self.first = self.first or mode_now()
        return honest(p) * (1 + (self.first == self.trouble != mode_now()))


class Processes(Local):
    """Each request that asks for a process of its own gets a new :class:`KeepsOf`."""

    def ask(self, request: Any, seconds: float) -> Any:
        backend = self.service.backend
        alone = Local(KeepsOf(backend.trouble)) if request.get(APART) else super()
        return alone.ask(request, seconds)


@pytest.mark.parametrize(
    ("law", "mode"), [(law, modes[0]) for law, processes in MODES.items() for modes in processes]
)
def test_what_any_mode_leaves_behind_is_seen_by_an_ordinary_call_after_it(
    law: str, mode: str
) -> None:
    with Caller(Processes(KeepsOf(mode)), 100.0) as call:
        bad = [f.text for f in launch_findings(None, call, problem(), law) if f.bad]
    assert any(text.startswith(f"{law}: {after((mode,))} changes 768 of 768") for text in bad)


def test_every_mode_but_that_of_an_ordinary_call_is_the_first_of_a_process() -> None:
    modes = {law: {*modes} for law, modes in engine_laws._modes(torch.device("cpu")).items()}
    assert modes == {
        law: {m for some in processes for m in some} for law, processes in MODES.items()
    }
    assert [m for p in MODES.values() for some in p for m in some[1:]] == ["grad mode"]


def labels_in(function: Callable[..., object]) -> list[str]:
    """The labels of a law that needs CUDA, as its source has them."""
    labels = re.findall(r'(?:yield f?|\()"([^"]+ [^"]+)",', inspect.getsource(function))
    return [label.format(turn=turn) for label in labels for turn in ("first", "second")]


def labels_of(law: str) -> list[str]:
    """The labels of the law's own code, of a problem that has every variant."""
    if law in laws.LAWS:
        return [variant.label for variant in laws.variants(repeated(33), law)]
    if LAUNCH_LAWS[law][1]:
        return labels_in(launch_laws.LAWS[law])
    backend = Launched() if LAUNCH_LAWS[law][0] else InModes()
    factors = dict.fromkeys(NVFP4_FACTORS, torch.ones(4)) if law == "weights-in-place" else {}
    every = replace(problem(), **factors)
    return [label for label, _, _ in launch_laws.variants(backend, every, law)]


@pytest.mark.parametrize("law", LAWS)
def test_the_words_for_a_laws_calls_are_the_labels_of_its_code(law: str) -> None:
    labels, words = labels_of(law), CALLS[law]
    forms = [re.compile(re.sub(r"\bN\b", r"\\d+", re.escape(each))) for each in words]
    assert labels and [x for x in labels if not any(f.fullmatch(x) for f in forms)] == []
    unused = [w for w, f in zip(words, forms, strict=True) if not any(map(f.fullmatch, labels))]
    assert unused == []
    page = Path(__file__).parents[1] / "docs/goldens.md"
    assert f"| `{law}` | {calls_of(law)} |\n" in page.read_text(), "the table of the page"


def test_an_exception_says_in_which_mode_it_was_raised() -> None:
    with pytest.raises(
        BackendFailure, match="RuntimeError: under a default device of meta: "
    ) as error:
        launched(InModes("memory"), "torch-defaults")
    # The line of the backend: neither the one that gave the label, nor torch's own.
    assert str(error.value).endswith(" in forward); in law torch-defaults")
    assert "(test_properties.py, line " in str(error.value)


def test_an_exception_names_every_mode_that_raised_or_changed_the_output() -> None:
    class InDefaults(InModes):
        def forward(self, p: Problem) -> torch.Tensor:
            if torch.get_default_dtype() == torch.bfloat16:
                return honest(p) * 2
            return honest(p) + torch.zeros(1)[0].item()  # raises on meta

    with pytest.raises(BackendFailure) as error:
        launched(InDefaults(), "torch-defaults")
    message = str(error.value).partition("raised ")[2].partition(" (")[0]
    assert message.startswith("RuntimeError: under a default device of meta: RuntimeError: ")
    assert message.endswith("; under a default dtype of bfloat16: another output")

    class Raises(InModes):
        def forward(self, p: Problem) -> torch.Tensor:
            if torch.get_default_dtype() != torch.float32:
                raise ValueError("float32 only")
            return honest(p)

    types = "under a default dtype of float64, under a default dtype of bfloat16"
    with pytest.raises(BackendFailure, match=f"{types}: ValueError: float32 only "):
        launched(Raises(), "torch-defaults")


def test_an_exception_says_which_variant_of_a_law_raised_it() -> None:
    p = problem()

    def y_of(variant: Problem) -> Any:
        if variant.num_tokens > p.num_tokens:
            raise BackendFailure("the backend raised ValueError: too many (k.py, line 3, in f)")
        return np.zeros((variant.num_tokens, variant.hidden_size), np.uint16)

    with pytest.raises(BackendFailure, match=r"in f\); in law padding-rows: 1 padding row of NaN$"):
        laws.findings(y_of, p, "padding-rows")


def test_an_output_of_a_wrong_form_says_in_which_modes() -> None:
    class NamesNoDevice(InModes):
        def forward(self, p: Problem) -> torch.Tensor:
            y = torch.empty(p.hidden_states.shape).bfloat16()
            return y.copy_(honest(p) * (2 if torch.get_default_dtype() == torch.float64 else 1))

    with pytest.raises(BadOutput, match="y lies on torch's meta device") as error:
        launched(NamesNoDevice(), "torch-defaults")
    message = str(error.value)
    assert " (a default device of meta); torch-defaults: a default dtype of float64 ch" in message
    assert message.endswith("; in law torch-defaults")


class Queue:
    """A stream of :class:`Device`: the face of ``launch_laws.Stream`` without a GPU."""

    def __init__(self, device: Device) -> None:
        self.device, self.free = device, 0

    def add(self, step: Callable[[], object], takes: int = 0) -> None:
        """``step`` happens as soon as the stream has done what was queued before."""
        self.device.steps.append((self.free, len(self.device.steps), step))
        self.free += takes

    def after(self, other: Queue) -> None:
        self.free = max(self.free, other.free)

    def products(self, count: int) -> None:
        self.add(lambda: None, takes=count)

    def write(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self.add(lambda: to.copy_(source))

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(tensor)
        self.add(lambda: out.copy_(tensor))
        return out

    def run(self, function: Callable[[], object]) -> object:
        before, self.device.current = self.device.current, self
        try:
            return function()
        finally:
            self.device.current = before


class Device:
    """Work on streams, done when somebody waits for it, in the order in which it would start."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, Callable[[], object]]] = []
        self.here, self.side, self.idle = Queue(self), Queue(self), Queue(self)
        self.current = self.here

    def wait(self) -> None:
        for _, _, step in sorted(self.steps, key=lambda s: s[:2]):
            step()
        self.steps.clear()
        for queue in (self.here, self.side, self.idle):
            queue.free = 0


class OnAStream:
    """The toy layer as a launch: two kernels, each on the stream that ``on`` gives it."""

    name, accumulator = "on-a-stream", "fp32"

    def __init__(self, device: Device, *on: str) -> None:
        self.device, self.on = device, on
        # As an allocator does, it hands out the memory of the call before.
        self.staged = self.y = torch.full((6, 128), 7.0).bfloat16()

    def forward(self, p: Problem) -> torch.Tensor:
        staged, y = self.staged, self.y
        for where, step in zip(
            self.on,
            (
                lambda: staged.copy_(p.hidden_states),
                lambda: y.copy_(honest(replace(p, hidden_states=staged))),
            ),
            strict=True,
        ):
            getattr(self.device, where).add(step)
        return y


@pytest.mark.parametrize("first", ["current", "idle", "here", "side"])
@pytest.mark.parametrize("second", ["current", "idle", "here", "side"])
def test_only_a_launch_on_the_callers_stream_keeps_its_order(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device()
    monkeypatch.setattr(launch_laws, "streams", lambda _: (device.here, device.side))
    monkeypatch.setattr(launch_laws, "_wait", lambda _: device.wait())
    backend, base = OnAStream(device, first, second), honest(problem())
    backend.forward(problem())  # as the judge does first; its memory is the next call's
    device.wait()
    right = [
        torch.equal(y, base[order])
        for _, y, order in launch_laws.variants(backend, problem(), "busy-stream")
    ]
    assert len(right) == 2
    assert all(right) == (first == second == "current")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("law", [law for law in launch_laws.LAWS if law not in engine_laws.LAWS])
def test_a_clean_launch_keeps_every_law_on_a_gpu(law: str) -> None:
    assert launched(Launched(), law, "cuda") == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_that_keeps_the_routing_of_its_capture_is_found() -> None:
    bad = launched(Launched("settles the routing"), "graph-replay", "cuda")
    assert bad and bad[0].startswith("graph-replay: a replay with the tokens reversed changes ")
