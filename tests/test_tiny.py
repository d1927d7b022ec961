"""Smoke test: record, plan, train thirty steps, generate, save and resume, in seconds."""

import numpy as np
import pytest

import handgrad as hg
from handgrad.backends import open_backend
from handgrad.core.backward import backward
from handgrad.core.dtypes import F32
from handgrad.core.plan import plan
from handgrad.core.program import Program
from handgrad.ops import add

STEPS = 30
MODEL = hg.models.GPT2(vocab_size=10, max_seq_len=16, num_layers=2, num_heads=2, hidden_size=32)
LR = hg.schedules.cosine(peak=1e-2, warmup=5, steps=STEPS)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A text that a tiny model can learn: 0 1 2 ... 9 0 1 2 ..."""
    folder = tmp_path_factory.mktemp("count")
    hg.data.write_shard(folder / "a.bin", [np.arange(4000) % 10], hg.data.id_dtype(10))
    return hg.data.tokens(folder / "a.bin", seq_len=16, batch_tokens=128, vocab_size=10)


def trainer(tokens, dtype="f32", check="off", out=None):
    execution, precision = hg.Execution(micro_batch=4, backend="cpu", check=check), hg.Precision(dtype)
    kind = dict(execution=execution, precision=precision, start=hg.Start(seed=1))
    return hg.Trainer(MODEL, hg.optim.AdamW(weight_decay=0.0), tokens, **kind, out=out)


def train(run, first, last):
    return [run.step(step, LR(step)).loss for step in range(first, last + 1)]


@pytest.fixture(scope="module", params=["f32", "bf16"])
def trained(request, tokens, tmp_path_factory):
    run = trainer(tokens, dtype=request.param, out=tmp_path_factory.mktemp("run"))
    return run, train(run, 1, STEPS)


def test_record_and_plan():
    p = Program(F32, trains=True)
    hg.models.forward_loss(p, MODEL, 4, 16)
    forward = len(p.calls)
    backward(p, add)
    assert [c.phase for c in p.calls] == ["forward"] * forward + ["backward"] * (len(p.calls) - forward)
    assert set(p.grads) == set(p.params)
    layout = plan(p)
    assert layout.nbytes < sum(t.nbytes for c in p.calls for t in c.outs if t is not None) + 3 * 4 * p.flat_size


def test_loss_falls_on_counting_text(trained, tokens):
    run, losses = trained
    assert losses[0] == pytest.approx(np.log(10), abs=0.1)
    assert losses[-1] < 0.5 and run.evaluate(tokens, 1024) < 0.5


def test_greedy_generation_counts_and_stops(trained):
    run, _ = trained
    greedy = hg.Sampling(temperature=0.0)
    assert list(run.generate([5, 6, 7], 30, greedy)) == [(8 + i) % 10 for i in range(30)]
    assert list(run.generate([8], 40, greedy, stop_ids=(3,))) == [9, 0, 1, 2]


def test_resume_is_bit_exact(trained, tokens, tmp_path):
    """15 steps, a checkpoint and 15 more steps in a new trainer give the same bits as 30 steps in one."""
    run, losses = trained
    dtype = run.program.dtype.name
    first = trainer(tokens, dtype=dtype, out=tmp_path)
    half = train(first, 1, STEPS // 2)
    first.save(STEPS // 2)
    second = trainer(tokens, dtype=dtype, out=tmp_path)
    assert second.resume() == STEPS // 2
    assert half + train(second, STEPS // 2 + 1, STEPS) == losses
    assert all(np.array_equal(w, second.params()[name]) for name, w in run.params().items())


def test_non_finite_step_changes_no_weight(tokens):
    run = trainer(tokens)
    train(run, 1, 2)
    run.params()["ln_f.weight"][0] = np.inf
    before = {name: w.copy() for name, w in run.params().items()}
    with np.errstate(invalid="ignore"):
        assert "nan" in run.step(3, LR(3)).skipped
    assert all(np.array_equal(w, before[name]) for name, w in run.params().items())


def test_nan_check_names_the_call(tokens):
    run = trainer(tokens, check="nan")
    train(run, 1, 1)
    run.params()["h.1.ln_2.weight"][3] = np.nan
    with pytest.raises(hg.HandgradError, match=r"\[check\] .* 'y' of forward add_norm\. block h\.1, gpt2\.py:\d+"):
        run.step(2, LR(2))


def test_stochastic_rounding_learns_and_resume_is_bit_exact(tmp_path):
    """With master_weights=False weights are bf16 only, rounded stochastically from counters, so a resumed run repeats."""
    hg.data.write_shard(tmp_path / "a.bin", [np.arange(5000) * 7 % 97], hg.data.id_dtype(97))

    def trainer(out=None):
        tokens = hg.data.tokens(tmp_path / "a.bin", seq_len=16, batch_tokens=128)
        kind = dict(execution=hg.Execution(8, backend="cpu"), precision=hg.Precision("bf16", master_weights=False))
        return hg.Trainer(hg.models.GPT2(97, 16, 1, 2, 32), hg.optim.AdamW(), tokens, **kind, out=out)

    run, whole = trainer(tmp_path / "run"), trainer()
    first = [run.step(k, 3e-3).loss for k in range(1, 21)]
    run.save(20)
    again = trainer(tmp_path / "run")
    assert again.resume() == 20 and not any(name.startswith("low.") for name in again._state())
    rest = [again.step(k, 3e-3).loss for k in range(21, 41)]
    assert first + rest == [whole.step(k, 3e-3).loss for k in range(1, 41)] and rest[-1] < first[0] - 1


class NoMasters(hg.optim.AdamW):
    """AdamW that declares no low halves of weights."""

    def declare(self, g):
        g.master = False
        super().declare(g)


def test_bf16_weights_start_where_the_optimizer_keeps_no_low_halves(tokens):
    execution = hg.Execution(micro_batch=4, backend="cpu", extra_programs=())
    run = hg.Trainer(MODEL, NoMasters(), tokens, execution=execution, precision=hg.Precision("bf16"))
    assert "low" not in run.plan.vectors and run.step(1, 1e-3).loss < 5


def test_a_backend_of_another_precision_is_refused(tokens):
    backend = open_backend("cpu")
    backend.tf32 = True
    with pytest.raises(hg.HandgradError, match="tf32=True"):
        hg.Trainer(
            MODEL,
            hg.optim.AdamW(),
            tokens,
            precision=hg.Precision("f32"),
            execution=hg.Execution(micro_batch=4),
            backend=backend,
        )
