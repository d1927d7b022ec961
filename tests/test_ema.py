"""The average of the weights: what it is, that it changes no step, on ranks, over a resume, and who reads it."""

import json

import numpy as np
import pytest
from rank_threads import on_ranks

import handgrad as hg
from handgrad.backends.ref import RefBackend
from handgrad.cli.__main__ import main
from handgrad.infer.load import open_source
from handgrad.io import checkpoint
from handgrad.ops.adamw.reference import join_weight
from handgrad.optim import AdamW, Ema
from handgrad.optim.ema import EMA
from handgrad.train.config import OptimConfig
from handgrad.train.optimizers import optimizer_of, optimizer_settings

LR, DECAY = 1e-2, 0.35  # the decay is reached at step 4


def trainer(shards, optim, dtype="f32", out=None, backend=None, zero=1):
    execution = hg.Execution(2, backend="cpu", zero=zero)
    kinds = dict(precision=hg.Precision(dtype), execution=execution, out=out, backend=backend)
    return hg.Trainer(hg.models.GPT2(97, 8, 1, 2, 16), optim, hg.data.tokens(shards, 8, 32), **kinds)


def weights(run):
    """The weights in float32 precision, as float64."""
    state = run._state()
    found = {}
    for name, w in run.params().items():
        low = state.get(f"low.{name}")
        found[name] = np.array(w if low is None else join_weight(np.array(w, np.float32), low), np.float64)
    return found


def averages(run):
    return {name[4:]: np.array(a) for name, a in run._state().items() if name.startswith("ema.")}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_average_of_a_run_over_a_resume(shards, tmp_path, dtype):
    """The recurrence in float64 from the weights of every step; the steps are those without an average; a run that is
    resumed has the same bits."""
    plain, whole = trainer(shards, AdamW(), dtype), trainer(shards, Ema(AdamW(), DECAY), dtype, tmp_path / "run")
    mean = weights(whole)
    for step in range(1, 7):
        assert plain.step(step, LR).loss == whole.step(step, LR).loss
        keep = min(DECAY, (1 + step) / (10 + step))
        mean = {name: keep * mean[name] + (1 - keep) * w for name, w in weights(whole).items()}
        if step == 3:
            whole.save(3)
    assert EMA not in plain.plan.vectors
    assert whole.plan.nbytes - plain.plan.nbytes == pytest.approx(4 * whole.program.flat_size, abs=512)  # alignment
    found = averages(whole)
    for name, expected in mean.items():
        # roundings of the last steps, each at most 2^-24 of values below 1.5; a decay of 0.35 forgets the others
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=3 * 1.6 * 1.5 * 2**-24)
    whole.close()
    again = trainer(shards, Ema(AdamW(), DECAY), dtype, tmp_path / "run")
    assert again.resume() == 3
    for step in (4, 5, 6):
        again.step(step, LR)
    assert all(np.array_equal(a, found[name]) for name, a in averages(again).items())
    again.close()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_ranks_average_as_one(shards, zero):
    def work(comm):
        run = trainer(shards, Ema(AdamW(), DECAY), backend=RefBackend(comm=comm), zero=zero)
        for step in (1, 2, 3):
            run.step(step, LR)
        return [run.plan.vectors[name].size for name in (EMA, "m", "param")], averages(run)

    (_, one), ((size, moments, whole), found) = on_ranks(1, work)[0], on_ranks(2, work)[0]
    assert size == moments and (zero == 3 or size == whole // (2 if zero else 1))
    for name, a in one.items():
        if not name.endswith("c_attn.bias"):  # the key bias has no effect: its gradient is rounding
            np.testing.assert_allclose(found[name], a, rtol=0, atol=1e-12)


def test_average_begins_or_ends_with_a_resume(shards, tmp_path):
    run = trainer(shards, AdamW(), "bf16", tmp_path / "run")
    run.step(1, LR)
    run.save(1)
    expected = weights(run)
    run.close()
    run = trainer(shards, Ema(AdamW(), DECAY), "bf16", tmp_path / "run")
    assert run.resume() == 1
    assert all(np.array_equal(a, expected[name]) for name, a in averages(run).items())
    run.step(2, LR)
    run.save(2)
    run.close()
    run = trainer(shards, AdamW(), "bf16", tmp_path / "run")
    assert run.resume() == 2 and not averages(run)
    run.close()


def test_settings_ask_for_an_average():
    settings = OptimConfig(ema=0.99)
    assert optimizer_of(settings) == Ema(AdamW((0.9, 0.99)), 0.99)
    found = optimizer_settings(optimizer_of(settings))  # with AdamW's own where a setting leaves it to the optimizer
    assert optimizer_of(OptimConfig(**found)) == optimizer_of(settings) and found["ema"] == 0.99
    for decay in (1.0, -0.1, 0.9999999):
        with pytest.raises(hg.HandgradError, match=r"\[optim\]"):
            Ema(AdamW(), decay)
    assert checkpoint.EMA == EMA


def test_generate_eval_and_convert_read_the_average(tmp_path, capsys):
    """convert writes the very average; eval measures the loss of a run that starts from it."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 100)
    out, data = str(tmp_path / "run"), str(tmp_path / "data")
    assert main(["data", "text", str(tmp_path / "text.txt"), "--out", data, "--tokenizer", "chars"]) == 0
    words = "--num-layers 1 --num-heads 2 --hidden-size 16 --max-seq-len 16 --micro-batch 4 --steps 8 --lr 0.03 "
    words += "--warmup 1 --dtype bf16 --backend cpu --threads 1 --sample-tokens 0 --val-every 0 --ema 0.5"
    assert main(["train", "--train", data, "--out", out, *words.split()]) == 0
    average = open_source(out, ema=True).weights
    assert main(["convert", out, f"{tmp_path}/hf", "--ema"]) == 0
    converted = open_source(f"{tmp_path}/hf").weights
    for name in average.shapes:
        assert np.array_equal(average.tensor(name, "bf16"), converted.tensor(name)), name
    assert any(
        not np.array_equal(average.tensor(n, "bf16"), open_source(out).weights.tensor(n)) for n in average.shapes
    )
    for flags in ([], ["--ema"]):
        assert main(["eval", out, "--backend", "cpu", *flags]) == 0
        assert main(["generate", out, "--backend", "cpu", "--max-tokens", "5", *flags]) == 0
    assert main(["eval", f"{tmp_path}/hf", "--backend", "cpu", f"--tasks=val={data}/val_*.bin"]) == 0
    own = json.loads((tmp_path / "run" / "eval.json").read_text())["step_000008"]
    (other,) = json.loads((tmp_path / "hf" / "eval.json").read_text()).values()
    assert own["val of the average"]["loss"] == pytest.approx(other["val"]["loss"], rel=1e-6)
    assert own["val"]["loss"] != own["val of the average"]["loss"]
    capsys.readouterr()
    assert main(["generate", f"{tmp_path}/hf", "--ema"]) == 2
    assert capsys.readouterr().err.startswith("[model] --ema is for runs of handgrad train --ema, but got ")


def test_the_average_of_a_run_in_float64_is_read(shards, tmp_path):
    """The ref backend stores float64."""
    run = trainer(shards, Ema(AdamW(), DECAY), out=tmp_path / "run", backend=RefBackend())
    run.step(1, LR)
    run.save(1)
    found = open_source(tmp_path / "run", ema=True).weights
    for name, mean in averages(run).items():
        rows = found.shapes[name][0]  # without those that pad the vocabulary
        assert mean.dtype == np.float64 and np.array_equal(found.tensor(name, "f32"), mean[:rows].astype(np.float32))
    run.close()


def test_explain_shows_the_average(capsys):
    assert main(["explain", "tiny", "--backend", "ref", "--ema", "0.999", "--calls"]) == 0
    with_it = capsys.readouterr().out
    assert main(["explain", "tiny", "--backend", "ref", "--calls"]) == 0
    without = capsys.readouterr().out
    assert " ema " in with_it and " ema " not in without


def test_frozen_parameters_have_no_average(shards, tmp_path):
    """A run that trains a part starts and resumes; the average is of that part, the rest is read as it is."""
    model, data = hg.models.GPT2(97, 8, 1, 2, 16), hg.data.tokens(shards, 8, 32)
    execution = hg.Execution(2, backend="cpu", train_only=("h.0.*",))
    kinds = {"execution": execution, "precision": hg.Precision("f32"), "out": tmp_path / "run"}
    run = hg.Trainer(model, Ema(AdamW(), DECAY), data, **kinds)
    assert averages(run).keys() == {name for name in run.params() if name.startswith("h.0.")}
    run.step(1, LR)
    run.save(1)
    found = {name: np.array(a) for name, a in averages(run).items()}
    run.close()
    again = hg.Trainer(model, Ema(AdamW(), DECAY), data, **kinds)
    assert again.resume() == 1 and all(np.array_equal(a, found[name]) for name, a in averages(again).items())
    again.close()
