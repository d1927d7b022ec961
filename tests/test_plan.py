"""The planner: live tensors never overlap, and the arena is near its lower bound. Broken planners are caught."""

import numpy as np
import pytest

from handgrad.backends import open_backend
from handgrad.core import plan as planner
from handgrad.core.dtypes import BF16, F32
from handgrad.core.op import Call
from handgrad.core.plan import ALIGN, Lifetime, aligned, place
from handgrad.core.precision import Precision
from handgrad.core.tensor import Role
from handgrad.models import gpt2
from handgrad.optim import AdamW
from handgrad.train.execution import Execution
from handgrad.train.record import record

POLICIES = ("none", "act", "act_norm", "block")
SHAPES = [  # preset, micro-batch, seq_len, dtype, dropout
    ("gpt2-124m", 4, 64, F32, 0.0),
    ("gpt2-124m", 16, 1024, BF16, 0.0),
    ("gpt2-124m", 16, 1024, BF16, 0.1),
    ("gpt2-1558m", 4, 1024, BF16, 0.0),
    ("d6", 12, 256, F32, 0.1),
    ("gpt3:c5140", 1, 2048, BF16, 0.0),
]


def lay_out(model, micro_batch, seq_len, dtype, policy, accumulates=True):
    """The plan of a run: training, evaluation and generation in one arena, with the cpu kernels' scratch."""
    precision, execution, cpu = Precision(dtype.name), Execution(micro_batch, policy), open_backend("cpu")
    return cpu.plan(*record(model, AdamW(), seq_len, precision, execution, cpu, accumulates=accumulates))


def spans(layout, index):
    """(start, end, first call, last call, name) of all activation memory of one program, derived from the list."""
    p, used, found = layout.programs[index], {}, []
    for i, c in enumerate(p.calls):
        for t in (*c.ins, *c.outs):
            if t is not None and t.role is Role.ACT:
                used.setdefault(t, []).append(i)
        nbytes = open_backend("cpu").scratch(c)
        if nbytes:
            found.append((layout.scratch[c], layout.scratch[c] + nbytes, i, i, f"scratch of {c.op}"))
    for t, at in used.items():
        last = len(p.calls) if t in p.outputs.values() else at[-1]
        found.append((layout.offset[t], layout.offset[t] + t.nbytes, at[0], last, t.name))
    if index == 0 and not p.accumulates:  # a gradient occupies memory from its first writer on
        for t in p.grads.values():
            first = next(i for i, c in enumerate(p.calls) if t in c.outs)
            found.append((layout.offset[t], layout.offset[t] + t.nbytes, first, len(p.calls), t.name))
    return found


def overlap(found):
    """The names of two spans that share bytes while both are live, or None."""
    found, alive = sorted(found, key=lambda s: s[2]), []
    for start, end, first, last, name in found:
        alive = [s for s in alive if s[3] >= first]
        for other in alive:
            if start < other[1] and other[0] < end:
                return name, other[4]
        alive.append((start, end, first, last, name))
    return None


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}-B{s[1]}-T{s[2]}-{s[3]}-p{s[4]}")
def test_live_tensors_never_overlap_and_arena_is_near_lower_bound(shape, policy, accumulates):
    preset, micro_batch, seq_len, dtype, dropout = shape
    layout = lay_out(gpt2(preset, dropout=dropout), micro_batch, seq_len, dtype, policy, accumulates)
    start, size = layout.region["activations"]
    if not accumulates:  # activations may use the gradients' memory
        size += layout.region["grads"][1]
        start = layout.region["grads"][0]
    peak = 0
    for index, p in enumerate(layout.programs):
        found = spans(layout, index)
        assert overlap(found) is None
        assert all(start <= low and high <= start + size and low % ALIGN == 0 for low, high, *_ in found)
        live = np.zeros(len(p.calls) + 2, np.int64)
        for low, high, first, last, _ in found:
            live[first] += aligned(high - low)
            live[last + 1] -= aligned(high - low)
        peak = max(peak, int(live.cumsum().max()))
    padding = 0 if accumulates else 2 * ALIGN * len(layout.programs[0].params)
    assert peak <= layout.min_activation_bytes <= peak + padding
    print(f"activations {size:,} B, lower bound {peak:,} B: {100 * (size / peak - 1):.3f} % more")
    # gradients have fixed offsets, and placing activations around them wastes some memory
    assert peak <= size <= (1.02 if accumulates else 1.04) * peak


def test_regions_and_flat_vectors_are_disjoint_and_aligned():
    layout = lay_out(gpt2("d6"), 2, 64, BF16, "none")
    at = 0
    for start, size in layout.region.values():
        assert start == at and size % ALIGN == 0
        at += size
    assert at == layout.nbytes
    p, parts = layout.programs[0], []
    for flat in ("param", "grad", "m", "v", "low"):
        for info in p.params.values():
            start, dtype = layout.part(flat, info.tensor)
            parts.append((start, start + info.tensor.size * dtype.size))
    parts.sort()
    assert all(end <= start and start % ALIGN == 0 for (_, end), (start, _) in zip(parts, parts[1:]))
    assert parts[-1][1] <= sum(layout.region[name][1] for name in ("params", "grads", "state"))
    for other in layout.programs[1:]:  # evaluation and generation read the trained weights themselves
        assert all(
            layout.offset[info.tensor] == layout.offset[p.params[name].tensor] for name, info in other.params.items()
        )


def test_place_fills_gaps():
    """The planner places large spans first; a small one reuses the memory of a large one that is no longer live."""
    a, b, c = (
        Lifetime(Call(None, (), (), {}, "", "", "", {}, F32), n * ALIGN, first, last)
        for n, first, last in ((4, 0, 1), (2, 1, 2), (4, 2, 3))
    )
    offsets, top = place([a, b, c])
    assert top == 6 * ALIGN and offsets[a.owner] == offsets[c.owner] == 0 and offsets[b.owner] == 4 * ALIGN


# planners that free one call early, or never ---------------------------------------------------------------------------

LIFETIMES = planner.lifetimes


def freed_early(p, scratch, concurrent):
    return [Lifetime(s.owner, s.nbytes, s.first, max(s.first, s.last - 1)) for s in LIFETIMES(p, scratch, concurrent)]


def never_freed(p, scratch, concurrent):
    return [Lifetime(s.owner, s.nbytes, 0, len(p.calls)) for s in LIFETIMES(p, scratch, concurrent)]


def same(a, b):
    return np.array_equal(a[0], b[0]) and all(np.array_equal(a[1][name], b[1][name]) for name in b[1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("backend", ["poisoned", "cpu"])
def test_shared_arena_matches_separate_buffers(one_pass, tiny, monkeypatch, backend, dtype, policy, dropout):
    model = tiny(dropout=dropout)
    got = one_pass(model, backend, dtype=dtype, policy=policy)
    assert all(np.isfinite(g.astype(np.float32)).all() for g in got[1].values())
    monkeypatch.setattr(planner, "lifetimes", never_freed)
    assert same(got, one_pass(model, "rounded" if backend == "poisoned" else backend, dtype=dtype, policy=policy))
    monkeypatch.setattr(planner, "lifetimes", freed_early)  # negative control
    assert not same(one_pass(model, backend, dtype=dtype, policy=policy), got)


def late_gradients(head, p):
    """Gradient spans that start one call late."""
    return [(a, b, first + 1 if first else 0, last) for a, b, first, last in SPANS(head, p)]


SPANS = planner.gradient_spans


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_activations_in_gradient_memory_change_no_result(one_pass, tiny, monkeypatch, dtype, policy):
    """Activations in gradient memory change no bit; a planner that starts gradients one call late creates overlaps."""
    model = tiny()
    apart = one_pass(model, "cpu", dtype=dtype, policy=policy, accumulates=True)
    assert same(apart, one_pass(model, "cpu", dtype=dtype, policy=policy, accumulates=False))
    assert same(
        one_pass(model, "rounded", dtype=dtype, policy=policy, accumulates=True),
        one_pass(model, "poisoned", dtype=dtype, policy=policy, accumulates=False),
    )
    monkeypatch.setattr(planner, "gradient_spans", late_gradients)
    assert overlap(spans(lay_out(model, 4, 16, F32, policy, False), 0)) is not None


def test_overlap_check_catches_early_free(monkeypatch):
    monkeypatch.setattr(planner, "lifetimes", freed_early)
    assert overlap(spans(lay_out(gpt2("d6"), 4, 64, F32, "none"), 0)) is not None
