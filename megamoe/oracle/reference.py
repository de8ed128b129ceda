"""The oracle's forward: the exact point, and the envelope of every accumulator class around it.

Works expert by expert and in chunks of output channels, so that memory stays small at real model
shapes. The reference point is the infinitely precise sum rounded once at each rounding point of
the contract, with the correctly rounded silu.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle import fp8_block, nvfp4, w4a8_token, w4a16
from megamoe.oracle.combine import Combine
from megamoe.oracle.envelope import Envelope, Tensors
from megamoe.oracle.envelope_builder import EnvelopeBuilder
from megamoe.oracle.linear import Rows
from megamoe.oracle.mlp import Layer, Weights, linear
from megamoe.oracle.staging import quantize
from megamoe.spec.accumulators import accumulator, classes_of
from megamoe.spec.contract import Contract
from megamoe.spec.formats import GROUP, U8, U16, bf16_round
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

MAX_ROWS = 64


@dataclass(frozen=True)
class ForwardGolden:
    """Oracle result of one forward case: ``T`` tokens, ``K`` slots, ``H``, ``I``."""

    y: U16
    """(T, H) bfloat16 bits of the reference point."""
    codes: U8
    """(T, K, I) E4M3 codes of the requantised activations; zeros in slots with id -1."""
    sf: U8
    """(T, K, I/32) UE8M0 bytes."""
    envelopes: Mapping[str, Envelope] = field(default_factory=dict)
    """The envelopes by accumulator class; empty for a zero-freedom golden from the store."""
    why: tuple[str, ...] = ()
    """Reasons why the case leaves freedom; empty if and only if it was proven to leave none."""
    only_y: bool = False
    """Whether ``y`` is the only stage: ``codes`` and ``sf`` are empty then."""

    @property
    def zero_freedom(self) -> bool:
        """Every class allows exactly one result: this one."""
        return not self.why

    def to_tensors(self) -> Tensors:
        """Flat tensors for the store; a zero-freedom golden needs no envelope."""
        out: Tensors = {"y": self.y}
        if not self.only_y:
            out |= {"l2_acts": self.codes, "l2_acts_sf": self.sf}
        if not self.zero_freedom:
            for name, envelope in self.envelopes.items():
                for part, tensor in envelope.to_tensors(self.codes, self.sf).items():
                    if not self.only_y or part in ("y_lo", "y_hi"):
                        out[f"{name}.{part}"] = tensor
        return out

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, npt.NDArray[Any]], contract: Contract
    ) -> ForwardGolden:
        """The inverse of :meth:`to_tensors`."""
        y, codes, sf = tensors["y"], tensors["l2_acts"], tensors["l2_acts_sf"]
        parts: dict[str, Tensors] = {}
        for key, tensor in tensors.items():
            name, dot, part = key.rpartition(".")
            if dot:
                parts.setdefault(name, {})[part] = tensor
        envelopes = {
            name: Envelope.from_tensors(part, codes, sf, contract) for name, part in parts.items()
        }
        return cls(y, codes, sf, envelopes, ("stored with an envelope",) if envelopes else ())


def forward(
    problem: Problem, classes: Iterable[str] | None = None, *, contract: Contract,
    any_silu: bool = False, trace: Tensors | None = None,
) -> ForwardGolden:  # fmt: skip
    """Reference point and envelopes of ``problem`` (CPU tensors) under ``contract``.

    ``any_silu`` widens silu to the fast form's error even where ``fast_math`` is off: a
    zero-freedom proof must hold for both. ``trace`` receives what no golden keeps: ``gate_up``
    ``(T, K, 2I)``, linear 1's exact sums as float64, rounded to odd where that cannot hold them,
    and ``slot_rows`` ``(T, K, H)``, linear 2's bfloat16 bits; zeros in slots with id -1. For NVFP4
    it also gets ``x``, ``x_sf`` and ``x_scale``, the staged rows as :func:`nvfp4.staged` has them.
    ``ValueError`` for an unknown class.
    """
    all_classes = classes_of(problem.weight_format)
    names = list(all_classes if classes is None else classes)
    for name in names:
        if accumulator(name).name not in all_classes:
            raise ValueError(
                f"class {name} is none of {problem.weight_format}; known: {', '.join(all_classes)}"
            )
    if problem.only_y:
        return _only_y(problem, names, contract, any_silu, trace)
    view = _Arrays.of(problem)
    layer = Layer(
        problem.act, [accumulator(name) for name in names], contract, any_silu, trace is not None
    )
    ids = view.topk_ids
    tokens, slots = ids.shape
    hidden_size, intermediate = view.w2.shape[1], view.w2.shape[2] * 2
    groups = intermediate // GROUP
    x, x_sf = quantize(view.hidden, contract)
    live = ids >= 0

    codes = np.zeros((tokens, slots, intermediate), np.uint8)
    sf = np.zeros((tokens, slots, groups), np.uint8)
    rows_out = np.zeros((tokens, slots, hidden_size), np.uint16)
    sums = np.zeros((tokens, slots, 2 * intermediate) if trace is not None else 0)
    parts = {
        name: EnvelopeBuilder.empty(tokens, slots, hidden_size, intermediate) for name in names
    }

    leaves: set[str] = set()
    for expert in np.unique(ids[live]):
        for at in _pieces(*np.nonzero(ids == expert)):
            weight = view.topk_weights[at][:, None]
            result = layer.mlp(x[at[0]], x_sf[at[0]], weight, view.expert(expert))
            codes[at], sf[at], rows_out[at] = result.codes, result.sf, result.row
            if trace is not None:
                sums[at] = result.sums
            for name, part in parts.items():
                part.take(at, result.acts[name], *result.ends[name])
                leaves |= {name} if result.leaves_fp32[name] else set()

    shared: dict[str, tuple[U16, U16]] | None = None
    if view.shared is not None:
        shared = _shared(layer, x, x_sf, view.shared, hidden_size, leaves)
    if trace is not None:
        trace |= {"gate_up": sums, "slot_rows": rows_out}
        if shared is not None:
            trace["shared_row"] = shared[""][0]
    combine = view.combine(problem, contract)
    y = combine.point(rows_out, None if shared is None else shared[""][0])
    envelopes = {
        name: part.envelope(combine, None if shared is None else shared[name])
        for name, part in parts.items()
    }
    golden = ForwardGolden(y, codes, sf, envelopes)
    return replace(golden, why=_why(golden, leaves, all_classes))


def _why(
    golden: ForwardGolden, leaves: Collection[str], all_classes: Collection[str]
) -> tuple[str, ...]:
    """The places that leave freedom, a line each; ``leaves``: classes in which a sum may leave
    fp32."""
    why = [
        f"{name}: a sum may leave fp32 although the exact one does not" for name in sorted(leaves)
    ]
    why += [
        envelope.freedom(name) for name, envelope in golden.envelopes.items()
        if not envelope.is_point(golden.y, golden.codes, golden.sf)
    ]  # fmt: skip
    if set(golden.envelopes) != set(all_classes):
        why.append("not every accumulator class was examined")
    return tuple(why)


def _only_y(
    problem: Problem, names: list[str], contract: Contract, any_silu: bool, trace: Tensors | None
) -> ForwardGolden:
    """The golden of a problem whose stages are not judged: y, and its envelope under each class."""
    output = _OF_FORMAT[problem.weight_format](
        problem, [accumulator(n) for n in names], contract, any_silu, trace
    )
    none = np.zeros((*problem.topk_ids.shape, 0), np.uint8)
    key, at = none.astype(np.int16), np.zeros(0, np.uint32)
    acts = np.zeros((0, GROUP), np.float32)
    envelopes = {
        name: Envelope(*ends, none, none, key, key, at, acts, acts, contract)
        for name, ends in output.ends.items()
    }
    golden = ForwardGolden(output.y, none, none, envelopes, only_y=True)
    return replace(golden, why=_why(golden, (), classes_of(problem.weight_format)))


_OF_FORMAT: Final = {
    "nvfp4": nvfp4.forward, "fp8-block": fp8_block.forward, "w4a16": w4a16.forward,
    "w4a8-token": w4a8_token.forward,
}  # fmt: skip


def combine_interval(
    problem: Problem, codes: U8, sf: U8, class_name: str, contract: Contract
) -> tuple[U16, U16]:
    """Staged judgement of ``y``: linear 2 and the combine from the codes of a backend.

    ``codes`` ``(T, K, I)`` and ``sf`` ``(T, K, I/32)`` uint8. Returns lowest and highest ``y``
    ``(T, H)`` bfloat16 bits for the class. The codes of a shared expert are no stage; its rows are
    intervals of the class, computed from the inputs.
    """
    accumulator_class = accumulator(class_name)
    view = _Arrays.of(problem)
    ids = view.topk_ids
    shape = (*ids.shape, view.w2.shape[1])
    low, high = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
    for expert in np.unique(ids[ids >= 0]):
        for at in _pieces(*np.nonzero(ids == expert)):
            out = linear(
                Rows.of(codes[at], sf[at]), view.w2[expert], view.w2_sf[expert], [accumulator_class]
            )
            low[at], high[at] = (bf16_round(end) for end in out[accumulator_class.name])
    shared = None
    if view.shared is not None:
        layer = Layer(problem.act, [accumulator_class], contract)
        rows = quantize(view.hidden, contract)
        shared = _shared(layer, *rows, view.shared, shape[-1], set())[class_name]
    return view.combine(problem, contract).ends(low, high, shared)


def _pieces(
    token_at: npt.NDArray[np.intp], slot_at: npt.NDArray[np.intp]
) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """Some slots at a time, so that memory stays small."""
    for start in range(0, len(token_at), MAX_ROWS):
        yield token_at[start : start + MAX_ROWS], slot_at[start : start + MAX_ROWS]


def _shared(
    layer: Layer, x: U8, x_sf: U8, weights: Weights, hidden_size: int, leaves: set[str]
) -> dict[str, tuple[U16, U16]]:
    """Rows ``(T, H)`` of the shared expert as ends: by class, and under "" the reference twice.

    Adds to ``leaves`` the classes in which a sum may leave fp32.
    """
    names = ["", *(a.name for a in layer.classes)]
    shape = 2, len(x), hidden_size
    out = {name: np.zeros(shape, np.uint16) for name in names}
    one = np.ones((1, 1), np.float32)
    for start in range(0, len(x), MAX_ROWS):
        part = slice(start, start + MAX_ROWS)
        result = layer.mlp(x[part], x_sf[part], one, weights)
        out[""][:, part] = result.row
        leaves |= {name for name, may_leave in result.leaves_fp32.items() if may_leave}
        for name, ends in result.ends.items():
            out[name][:, part] = ends
    return {name: (low, high) for name, (low, high) in out.items()}


@dataclass(frozen=True)
class _Arrays:
    """A problem's tensors as NumPy arrays, without copies."""

    hidden: U16
    topk_ids: npt.NDArray[np.int64]
    topk_weights: npt.NDArray[np.float32]
    w13: U8
    w13_sf: U8
    w2: U8
    w2_sf: U8
    shared: Weights | None
    output: U16 | None

    @classmethod
    def of(cls, problem: Problem) -> _Arrays:
        shared = tuple(tensor.numpy() for tensor in problem.shared_weights)
        output = problem.shared_output
        return cls(
            bits(problem.hidden_states),
            problem.topk_ids.numpy(),
            problem.topk_weights.numpy(),
            problem.w13_weight.numpy(),
            problem.w13_weight_scale.numpy(),
            problem.w2_weight.numpy(),
            problem.w2_weight_scale.numpy(),
            (shared[0], shared[1], shared[2], shared[3]) if shared else None,
            None if output is None else bits(output),
        )

    def expert(self, expert: int) -> Weights:
        """The weights of one expert."""
        return self.w13[expert], self.w13_sf[expert], self.w2[expert], self.w2_sf[expert]

    def combine(self, problem: Problem, contract: Contract) -> Combine:
        """The combine of its slot rows."""
        return Combine(
            self.topk_ids >= 0, self.topk_weights, contract, problem.combine_dtype, self.output
        )
