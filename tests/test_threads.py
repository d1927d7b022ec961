"""Results are bit-identical for any number of threads: every op, every case and the initial weights."""

import numpy as np
import pytest

import handgrad
from handgrad.backends import open_backend
from handgrad.core import limits
from handgrad.core.dtypes import DTYPES
from handgrad.ops import OPS
from handgrad.ops.adamw.reference import join_weight
from handgrad.testing import case_arrays, case_program, run_case


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", OPS.values(), ids=str)
def test_ops_are_bit_exact_for_any_thread_count(op, dtype):
    for case in (c for c in op.cases if not c.real):
        p, c = case_program(op, case, DTYPES[dtype])
        arrays = case_arrays(op, c)
        one, *others = (run_case(p, c, arrays, open_backend("cpu", threads)) for threads in (1, 2, 5))
        for more in others:
            assert all(np.array_equal(one[name], more[name]) for name in one), case.sizes


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_initial_weights_are_bit_exact_for_any_thread_count(tiny, shards, monkeypatch, dtype):
    data, found = handgrad.data.tokens(shards, 20, 60), []
    for cores in (1, 3):
        monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        kind = dict(execution=handgrad.Execution(3, backend="ref"), precision=handgrad.Precision(dtype))
        run = handgrad.Trainer(tiny(), handgrad.optim.AdamW(), data, **kind, start=handgrad.Start(seed=7))
        found.append(run.params() | run._state())
    for i, (name, info) in enumerate(run.program.params.items()):
        w = np.full(info.tensor.shape, 1.0 if info.init.kind == "ones" else 0.0, np.float32)
        if info.init.kind == "normal":
            rows = w[: info.init.rows]
            rows[:] = np.random.default_rng([7, i]).standard_normal(rows.shape, np.float32) * np.float32(info.init.std)
        for values in found:
            low = values.get(f"low.{name}", np.zeros(w.shape, np.int16))
            assert np.array_equal(join_weight(values[name].astype(np.float32), low), w)
