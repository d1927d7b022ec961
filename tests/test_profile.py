"""handgrad profile: every call once, sums that agree, bounds where they are known, a trace that a viewer can read."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rank_threads import on_ranks

from handgrad import Execution, Precision, Trainer, data
from handgrad.backends.cpu import CpuBackend
from handgrad.cli.__main__ import main
from handgrad.optim import AdamW
from handgrad.train.profile import GROUPS, profile, title


@pytest.fixture(scope="module")
def found(tiny, shards):
    tokens = data.tokens(shards, seq_len=16, batch_tokens=64)
    execution = Execution(micro_batch=4, recompute="block", extra_programs=(), backend="cpu")
    trainer = Trainer(tiny(), AdamW(), tokens, precision=Precision("f32"), execution=execution)
    return profile(trainer, 3), trainer


def test_every_call_once_in_order(found):
    p, trainer = found
    assert list(p.calls) == trainer.program.calls and len(p.seconds) == len(p.calls)
    assert all(s >= 0 for s in p.seconds) and p.step_seconds > 0


@pytest.mark.parametrize("by", GROUPS)
def test_rows_add_up(found, by):
    p, _ = found
    rows = p.rows(by)
    assert sum(r.calls for r in rows) == len(p.calls)
    assert sum(r.seconds for r in rows) == pytest.approx(p.total)
    assert sum(r.flops for r in rows) == sum(c.flops for c in p.calls)
    assert sum(r.nbytes for r in rows) == sum(c.op.nbytes(c) for c in p.calls)
    if by == "call":
        assert len(rows) == len(p.calls)
    else:
        assert [r.seconds for r in rows] == sorted((r.seconds for r in rows), reverse=True)


def test_medians_of_the_traces(tiny, shards, monkeypatch):
    tokens = data.tokens(shards, seq_len=16, batch_tokens=64)
    execution = Execution(micro_batch=4, extra_programs=(), backend="cpu")
    trainer = Trainer(tiny(), AdamW(), tokens, precision=Precision("f32"), execution=execution)
    speeds = iter([1.0, 5.0, 2.0])

    def trace(after):
        speed = next(speeds)
        for c in trainer.program.calls:
            after(c, speed)

    monkeypatch.setattr(trainer, "trace", trace)
    assert set(profile(trainer, 3).seconds) == {2.0}


def test_the_bound_is_the_longer_of_bytes_and_flops(found):
    p, _ = found
    assert p.bound(p.calls[0]) is None and p.rows()[0].bound is None
    limited = replace(p, flops_limit=1e12, bytes_limit=1e10)
    for c in p.calls:
        assert limited.bound(c) == max(c.flops / 1e12, c.op.nbytes(c) / 1e10)
    assert sum(r.bound for r in limited.rows()) == pytest.approx(sum(limited.bound(c) for c in p.calls))


def test_a_profiled_trainer_goes_on(found):
    _, trainer = found
    assert 0 < trainer.step(trainer.last_step + 1, 1e-4).loss < 10


def test_trace_is_end_to_end_with_a_track_for_each_phase(found, tmp_path):
    p, _ = found
    p.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert list(tracks.values()) == list(dict.fromkeys(c.phase for c in p.calls))
    assert set(tracks.values()) >= {"forward", "recompute", "backward", "norm", "update"}
    spans, at = [e for e in events if e["ph"] == "X"], 0.0
    for c, e in zip(p.calls, spans, strict=True):
        assert e["name"] == c.op.name and tracks[e["tid"]] == c.phase and e["ts"] == pytest.approx(at)
        assert e["args"]["bytes"] == c.op.nbytes(c) and e["args"]["flops"] == c.flops
        assert "(" in next(v for k, v in e["args"].items() if k not in ("block", "where"))  # a tensor's shape
        at += e["dur"]


def test_command(capsys, tmp_path):
    flags = "profile d1 --backend cpu --micro-batch 1 --seq-len 16 --steps 1 --threads 1 --trace".split()
    assert main([*flags, str(tmp_path / "t.json")]) == 0
    out, err = capsys.readouterr()
    assert not err
    for word in ("op", "share", "lm_loss_forward_backward", "sum", "no bound", "a whole step takes"):
        assert word in out
    assert "of bound" not in out and json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_command_by_call(capsys):
    assert main("profile d1 --backend cpu --micro-batch 1 --seq-len 16 --steps 1 --threads 1 --by call".split()) == 0
    out = capsys.readouterr().out
    assert "fwd h.0 linear N=16 K=64" in out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--steps 0", "--steps is at least 1, but got 0"),
        ("--micro-batch 0", "--micro-batch is a number from 1 on, but got 0"),
        ("--head-mib -1", "--head-mib is a number from 0 on, but got -1"),
        ("--trace /no/such/folder/t.json", "--trace names a file in a folder that exists"),
        ("--by colour", "--by takes one of op, phase, block, call, but got 'colour'"),
        ("--seq-len 4000", "the model reads at most 64 tokens"),
    ],
)
def test_mistakes_are_one_line(flags, line, capsys):
    assert main(["profile", "tiny", "--backend", "cpu", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert not out and line in err and err.count("\n") == 1


def test_titles_name_the_call(found):
    p, _ = found
    assert title(p.calls[0]).startswith("fwd embed embed N=64")


def test_what_ranks_exchange_has_a_lane_of_its_own(tiny, shards):
    """A call that uses the result of an exchange starts after it; other calls do not wait for it."""

    def work(comm):
        tokens = data.tokens(shards, seq_len=16, batch_tokens=64)
        execution = Execution(micro_batch=2, extra_programs=(), backend="cpu", zero=1)
        backend = CpuBackend(1, comm)
        run = Trainer(tiny(), AdamW(), tokens, precision=Precision("f32"), execution=execution, backend=backend)
        return profile(run, 1), run.program

    p, program = on_ranks(2, work)[0]
    buckets = sum(b.size for b in program.buckets)
    links = {name: (calls, nbytes) for name, calls, nbytes, _ in p.links()}
    assert links["reduce_scatter"] == (len(program.buckets), 4 * buckets // 2)
    assert links["all_gather"] == links["reduce_scatter"] and p.exposed > 0
    p = replace(p, seconds=(1.0,) * len(p.calls))
    starts, exchanges = np.array(p.starts()), [i for i, c in enumerate(p.calls) if c.op.communicates]
    assert all(np.diff(starts[exchanges]) >= 1.0)  # one after another
    assert all(np.diff(np.delete(starts, exchanges)) >= 1.0)
    assert all(starts[p.joins[i]] >= starts[i] + 1.0 for i in exchanges if p.joins[i] < len(starts))
    assert starts.max() + 1.0 < len(starts)  # some of them overlap
