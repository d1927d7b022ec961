"""What a run does with its length: extended runs, the best checkpoint, early ends, another optimizer on resume."""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import handgrad as hg
from handgrad.cli.__main__ import main
from handgrad.cli.train import settings
from handgrad.core.disk import write_text
from handgrad.data import id_dtype, write_shard
from handgrad.infer.load import open_source
from handgrad.io import checkpoint
from handgrad.optim import SGD, AdamW, Ema, Muon, ScheduleFree
from handgrad.train.best import Best
from handgrad.train.config import from_names, num_tokens
from handgrad.train.outliers import Guard
from handgrad.train.report.read import read_run
from handgrad.train.run import train
from handgrad.train.schedule import num_steps
from handgrad.train.trainer import Trainer

BEGIN = 4  # the step before the cooldown of a run of 8 steps


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder of shards: ids below 97 with much repetition."""
    folder = tmp_path_factory.mktemp("words")
    rng = np.random.default_rng(0)
    write_shard(folder / "train_0.bin", [np.cumsum(rng.integers(0, 3, 4000)) % 97], id_dtype(97))
    write_shard(folder / "val_0.bin", [np.cumsum(rng.integers(0, 3, 200)) % 97], id_dtype(97))
    meta = {"tokenizer": {"kind": "chars", "characters": "".join(map(chr, range(33, 130)))}, "vocab_size": 97}
    (folder / "meta.json").write_text(json.dumps(meta | {"dtype": "uint16", "train": {}, "val": {}}))
    return str(folder)


def config(words, out, **more):
    """8 steps with a cooldown over the last 4; rotation keeps the newest checkpoint alone."""
    values = dict(num_layers=1, num_heads=2, hidden_size=16, max_seq_len=8, train=words, batch_tokens=32, micro_batch=4)
    values |= dict(steps=8, schedule="wsd", cooldown=4, warmup=2, lr=1e-2, dtype="f32", threads=1, out=str(out))
    values |= dict(save_every=0, keep_last=1, val_every=0, val_tokens=64, sample_tokens=0, backend="cpu")
    return from_names(values | more)


def longer(c, steps, **run):
    return replace(c, run=replace(c.run, steps=steps, resume=c.run.out, **run))


def log(out):
    """The log without the two keys that tell the time."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def events(out):
    return [(line["step"], line["event"]) for line in log(out) if "event" in line]


def figures(out):
    return [line for line in log(out) if "loss" in line]


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "state.rank00.safetensors")}


def names(out):
    return sorted(path.name for path in Path(out).iterdir() if path.name.startswith(("step_", "cooled_", "best")))


# extend ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(words, tmp_path_factory):
    """A finished run of 8 steps."""
    out = tmp_path_factory.mktemp("short") / "run"
    assert train(config(words, out), quiet=True) == 0
    return out


@pytest.fixture
def copied(short, tmp_path):
    shutil.copytree(short, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_extended_run_is_the_longer_run_bit_for_bit(words, copied, tmp_path):
    assert names(copied) == ["step_000004", "step_000008"]  # the former is kept, whatever --keep-last says
    cooled = files(copied / "step_000008")
    assert train(config(words, tmp_path / "whole", steps=16), quiet=True) == 0
    assert train(longer(config(words, copied), 16, extend=True), quiet=True) == 0
    assert files(copied / "step_000016") == files(tmp_path / "whole" / "step_000016")
    assert figures(copied) == figures(tmp_path / "whole")  # one curve: every step once
    assert read_run(copied).points("loss").steps.tolist() == list(range(1, 17))
    assert names(copied) == ["cooled_000008", "step_000012", "step_000016"]
    assert files(copied / "cooled_000008") == cooled
    assert len((copied / "cooled_000008" / "log.jsonl").read_text().splitlines()) == 8
    assert events(copied) == [
        (4, "extended from step 4 to 16 steps; the cooled weights are in cooled_000008"),
        (4, "from here on steps is 16, not 8"),
    ]
    assert open_source(copied / "cooled_000008").path.name == "cooled_000008"


@pytest.mark.parametrize(
    ("settings", "branch"),
    [(dict(schedule="constant", cooldown=None), 5), (dict(cooldown=2), 5), (dict(cooldown=4), 4)],
    ids=["momentum", "momentum first", "rate first"],
)
def test_an_extended_run_goes_on_from_before_momentum_falls(words, tmp_path, settings, branch):
    """Its checkpoint is kept as that of a cooldown, and a rise in a fraction of the steps stays as long as it was."""
    own = settings | dict(optimizer="sgd", momentum_cooldown=3)
    assert train(config(words, tmp_path / "run", momentum_warmup=0.25, **own), quiet=True) == 0
    assert names(tmp_path / "run") == [f"step_{branch:06d}", "step_000008"]
    assert train(config(words, tmp_path / "whole", steps=16, momentum_warmup=2, **own), quiet=True) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--extend", "--steps", "16"]) == 0
    assert files(tmp_path / "run" / "step_000016") == files(tmp_path / "whole" / "step_000016")


def test_resume_without_extend_is_another_run(words, copied, tmp_path):
    """The comparison above can fail: from the cooled weights the rate jumps."""
    assert train(longer(config(words, copied), 16), quiet=True) == 0
    assert names(copied) == ["step_000012", "step_000016"]
    (jump,) = events(copied)
    assert jump[0] == 8 and "; the learning rate goes from " in jump[1]


def test_an_extension_that_is_killed_is_resumed(words, copied, monkeypatch):
    """Killed after the cooled checkpoint has its other name: the newest is the one before the cooldown."""
    from handgrad.train import run

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "RunLog", killed)
    with pytest.raises(KeyboardInterrupt):
        train(longer(config(words, copied), 16, extend=True), quiet=True)
    assert names(copied) == ["cooled_000008", "step_000004"]
    monkeypatch.undo()
    assert train(longer(config(words, copied), 16, extend=True), quiet=True) == 0
    assert [line["step"] for line in figures(copied)] == list(range(1, 17))


@pytest.mark.parametrize(
    ("flags", "schedule", "lost", "line"),
    [
        ("--steps 8", "wsd", [], "[resume] --extend makes a run longer: --steps is above its 8, but got 8."),
        (
            "--steps 16",
            "cosine",
            [],
            "hint: --resume {out} --steps 16 without it: the rate jumps, and the log says how",
        ),
        (
            "--steps 16 --schedule linear",
            "wsd",
            [],
            "[resume] --extend keeps the schedule of the run, wsd, but got lin",
        ),
        ("--steps 16", "constant", [], "; and a warm-up within the run, but got constant with a warm-up of 9 steps."),
        ("--steps 16", "wsd", [4], "[resume] the run goes on from a checkpoint of step 4 or before, but got none in"),
    ],
)
def test_extension_that_cannot_be_is_refused(copied, capsys, flags, schedule, lost, line):
    saved = json.loads((copied / "config.json").read_text())
    if schedule == "cosine":
        saved["optim"] |= {"schedule": "cosine", "cooldown": None, "cooldown_shape": "", "final": 0.1}
    if schedule == "constant":
        saved["optim"] |= {"schedule": "constant", "cooldown": None, "cooldown_shape": "", "final": 1.0, "warmup": 9}
    (copied / "config.json").write_text(json.dumps(saved))
    for step in lost:
        shutil.rmtree(copied / f"step_{step:06d}")
    before, text = names(copied), (copied / "log.jsonl").read_bytes()
    assert main(["train", "--resume", str(copied), "--extend", *flags.split()]) == 2
    assert line.format(out=copied) in capsys.readouterr().err
    assert names(copied) == before and (copied / "log.jsonl").read_bytes() == text


def test_extend_and_fresh_optimizer_belong_to_a_resume(capsys):
    for flag in ("--extend", "--fresh-optimizer"):
        assert main(["train", flag]) == 2
        assert capsys.readouterr().err == f"[run] {flag} goes with --resume RUN, but got a new run.\n"


# lengths --------------------------------------------------------------------------------------------------------------


def test_length_in_steps_tokens_or_epochs(words, short):
    data = SimpleNamespace(windows=70, sequences=4, batch_tokens=32)
    lengths = [({}, 2000), ({"steps": 0}, 17), ({"epochs": 1}, 17), ({"epochs": 0.4}, 7), ({"epochs": 3}, 52)]
    lengths += [({"tokens": "1K"}, 31), ({"tokens": 64}, 2), ({"tokens": "1"}, 1), ({"steps": 5}, 5)]
    for given, steps in lengths:
        assert num_steps(from_names(given), data) == steps
    assert (num_tokens("1b"), num_tokens("2.5M"), num_tokens("3e3")) == (10**9, 2_500_000, 3000)
    for text in ("many", "0", "1X", "-5", "nan", "inf", "1e99"):
        with pytest.raises(hg.HandgradError, match=r"\[run\] --tokens is a number such as 1B, 300M or 250000, but got"):
            from_names({"tokens": text})
    with pytest.raises(hg.HandgradError, match=r"one of --steps, --tokens and --epochs, but got --steps 0 --epochs 2"):
        from_names({"steps": 0, "epochs": 2})
    c = settings(["--resume", str(short), "--tokens", "1M"])  # the saved length gives way
    assert (c.run.steps, c.run.tokens, c.optim.cooldown) == (None, "1M", 4)
    assert settings(["--resume", str(short)]).run.steps == 8
    c = settings(["--resume", str(short), "--schedule", "cosine"])
    assert (c.optim.cooldown, c.optim.final, c.optim.warmup) == (None, None, 2)  # settings of wsd give way, too


def test_flags_of_other_trainers_are_lengths():
    c = settings("--num-epochs 2 --warmup-ratio 0.03 --ema-decay 0.99 --early-stopping-patience 3".split())
    assert (c.run.epochs, c.optim.warmup, c.optim.ema, c.eval.patience) == (2.0, 0.03, 0.99, 3)


def test_setting_of_another_schedule_is_refused(words, tmp_path):
    with pytest.raises(hg.HandgradError, match=r"cycles is a setting of cosine_with_restarts, but got schedule wsd"):
        train(config(words, tmp_path / "run", cycles=3), quiet=True)
    assert not (tmp_path / "run").exists()


# the best checkpoint --------------------------------------------------------------------------------------------------


def losses(monkeypatch, values):
    """Validations find these losses, by step."""
    monkeypatch.setattr(Trainer, "validate", lambda self, data, most: {"val_loss": values[self.last_step - 1]})


def test_best_checkpoint_stays_and_patience_ends_the_run(words, tmp_path, monkeypatch):
    losses(monkeypatch, [3.0, 2.0, 2.5, 1.5, 1.9, 1.6, math.nan, 1.0])
    c = config(words, tmp_path / "run", schedule="constant", cooldown=None, val_every=1, keep_best=True, patience=3)
    out = tmp_path / "run"
    assert train(c, quiet=True) == 0
    text = "3 validations without a loss below 1.5000, that of step 4"
    assert events(out) == [(7, f"stopped early: {text}")]
    assert names(out) == ["best", "step_000004", "step_000007"] and os.readlink(out / "best") == "step_000004"
    assert checkpoint.load_meta(out / "best")["step"] == 4
    before = log(out)
    assert train(longer(c, 8), quiet=True) == 0  # has ended
    assert log(out) == before
    assert train(replace(longer(c, 8), eval=replace(c.eval, patience=5)), quiet=True) == 0
    assert names(out) == ["best", "step_000008"] and os.readlink(out / "best") == "step_000008"  # 4 was superseded


def test_resume_keeps_the_best_so_far(words, tmp_path, monkeypatch):
    """Also if the process was killed before the link led to the checkpoint that had just become complete."""
    losses(monkeypatch, [3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0])
    out, c = tmp_path / "run", config(words, tmp_path / "run", steps=4, val_every=1, keep_best=True)
    c = replace(c, optim=replace(c.optim, schedule="constant", cooldown=None))
    assert train(c, quiet=True) == 0
    (out / "best").unlink()
    assert train(longer(c, 6), quiet=True) == 0
    assert names(out) == ["best", "step_000002", "step_000006"] and os.readlink(out / "best") == "step_000002"
    assert Best.of(checkpoint.load_meta(out / "step_000006"), out) == Best(2, 2.0, 4)
    with pytest.raises(hg.HandgradError, match=r"run.json gives 'best' as step, val_loss and since, but got 3"):
        Best.of({"best": 3}, out)


def test_the_older_best_goes_only_when_the_better_one_is_complete(words, tmp_path, monkeypatch):
    """A save that fails leaves the older best and its link. The mutation: pruning before the new one has its name."""
    losses(monkeypatch, [3.0, 2.0, 1.0])
    out, c = tmp_path / "run", config(words, tmp_path / "run", steps=3, val_every=1, keep_best=True, cooldown=1)
    give = checkpoint._give_name

    def full(folder, final):
        if final.name == "step_000003":
            raise OSError(28, "no space left on device")
        give(folder, final)

    monkeypatch.setattr(checkpoint, "_give_name", full)
    with pytest.raises(hg.HandgradError, match="no space left"):
        train(c, quiet=True)
    assert names(out) == ["best", "step_000002"] and os.readlink(out / "best") == "step_000002"
    assert open_source(out / "best").path == out / "step_000002"


def test_eval_takes_the_best_by_name(words, tmp_path, capsys):
    """Its loss is the one that the log has at the best step; it is not that of the newest checkpoint."""
    out = tmp_path / "run"
    c = config(words, out, schedule="constant", cooldown=None, warmup=8, lr=20.0)
    c = replace(c, eval=replace(c.eval, val_every=2, val_tokens=0), checkpoint=replace(c.checkpoint, keep_best=True))
    assert train(c, quiet=True) == 0
    vals = {line["step"]: line["val_loss"] for line in log(out) if "val_loss" in line}
    best = min(vals, key=vals.get)
    assert best < 8 and os.readlink(out / "best") == f"step_{best:06d}"
    assert main(["eval", str(out / "best"), "--backend", "cpu"]) == 0
    (found,) = json.loads((out / "eval.json").read_text()).items()
    assert found[0] == f"step_{best:06d}"
    assert found[1]["val"]["loss"] == pytest.approx(vals[best], rel=1e-5)  # the same sums in float32, in other batches
    assert main(["generate", str(tmp_path / "best")]) == 2
    capsys.readouterr()
    (out / "best").unlink()
    assert main(["generate", str(out / "best")]) == 2
    assert "hint: a run with --keep-best has one" in capsys.readouterr().err


def test_best_and_patience_need_validation_data(words, tmp_path):
    only = tmp_path / "only"
    shutil.copytree(words, only)
    (only / "val_0.bin").unlink()
    with pytest.raises(hg.HandgradError, match=r"\[eval\] --keep-best and --patience need validation data, but got no"):
        train(config(only, tmp_path / "run", train=str(only), patience=2), quiet=True)


# another optimizer, momentum ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Other(AdamW):
    """An optimizer that no settings name, and one whose momentum can be scheduled."""

    scheduled_momentum = 0.9


def trainer(words, out, optim, **precision):
    data = hg.data.tokens(f"{words}/train_*.bin", 8, 32, seed=5)
    kinds = dict(precision=hg.Precision("bf16", **precision), execution=hg.Execution(4, backend="cpu"), out=out)
    return hg.Trainer(hg.models.GPT2(97, 8, 1, 2, 16), optim, data, **kinds)


def test_another_optimizer_is_refused_or_starts_afresh(words, tmp_path):
    with trainer_closed(trainer(words, tmp_path, AdamW())) as first:
        for step in (1, 2):
            first.step(step, 1e-2)
        first.save(2)
        held = {name: np.array(a) for name, a in first._state().items()}
        weights = {name: np.array(a) for name, a in first.params().items()}
    hint = "--fresh-optimizer takes the weights alone and starts the state anew"
    with trainer_closed(trainer(words, tmp_path, Other())) as run:
        with pytest.raises(hg.HandgradError, match=r"the checkpoint's optimizer is adamw, but got Other.*" + hint):
            run.resume()
        assert run.resume(fresh=True) == 2
        assert all(np.array_equal(a, weights[name]) for name, a in run.params().items())
        for name, a in run._state().items():
            assert np.array_equal(a, held[name] if name.startswith("low.") else np.zeros_like(a)), name
    assert any(a.any() for name, a in held.items() if name.startswith("m."))  # the zeros above are not the state's
    with trainer_closed(trainer(words, tmp_path, AdamW(), master_weights=False)) as run:
        with pytest.raises(
            hg.HandgradError, match=r"the state of adamw with these settings is m, v, but got low, m, v"
        ):
            run.resume()


def test_a_fresh_state_corrects_its_bias_from_its_own_first_update(words, tmp_path):
    """The first update of a state moves a weight by the learning rate, whatever the betas: m and v, corrected, are the
    gradient and its square. Counted from the run's start it would move it by 0.62 of that."""
    optim = AdamW(weight_decay=0.0, clip=0.0)
    with trainer_closed(trainer(words, tmp_path, optim)) as run:
        for step in (1, 2):
            run.step(step, 1e-2)
        run.save(2)
    with trainer_closed(trainer(words, tmp_path, optim)) as run:
        assert run.resume(fresh=True) == 2
        before = {name: np.array(a, np.float32) for name, a in run.params().items()}
        run.step(3, 0.25)
        moved = np.abs(np.concatenate([(a - before[name]).ravel() for name, a in run.params().items()]).astype(float))
        assert np.quantile(moved[moved > 0.01], [0.1, 0.9]) == pytest.approx([0.25, 0.25], rel=2**-7)  # bf16 weights
        run.save(3)
    with trainer_closed(trainer(words, tmp_path, optim)) as run:
        assert run.resume() == 3 and run.state_since == 2
    meta = tmp_path / "step_000003" / "run.json"
    meta.write_text(meta.read_text().replace('"state_since": 2', '"state_since": 9'))
    with trainer_closed(trainer(words, tmp_path, optim)) as run:
        with pytest.raises(hg.HandgradError, match="state_since as a step from 0 to 3, but got 9"):
            run.resume()


@pytest.mark.parametrize(
    ("saved", "other", "text"),
    [
        (AdamW(), AdamW(moments="bf16"), r"'m\.\S+' in \S+ must be bfloat16 \(\d+, 16\), but got float32"),
        (Muon(), Muon(second_beta=0.9), r"must hold the tensor 'state.squares.\S+', but got no such"),
        (Muon(second_beta=0.9), Muon(), r"must hold only the \d+ expected tensors, but got also 'state.squares"),
    ],
)
def test_other_settings_of_an_optimizer_name_the_way_out(words, tmp_path, saved, other, text):
    with trainer_closed(trainer(words, tmp_path, saved)) as run:
        run.step(1, 1e-2)
        run.save(1)
    hint = "hint: the optimizer's settings are those of the checkpoint, or --fresh-optimizer takes the weights alone"
    with trainer_closed(trainer(words, tmp_path, other)) as run:
        with pytest.raises(hg.HandgradError, match=text + ".*" + hint):
            run.resume()
        assert run.resume(fresh=True) == 1


@pytest.mark.parametrize("optim", [AdamW(weight_decay=0.0, clip=0.0), ScheduleFree(weight_decay=0.0, clip=0.0)])
def test_bias_corrections_count_updates_and_no_skipped_step(words, tmp_path, optim, monkeypatch):
    """The first update moves weights by the learning rate, also after three steps whose gradients are no numbers. With
    these counted, schedule_free, whose second moment starts too small, would move them by nearly 2 of it."""
    with trainer_closed(trainer(words, tmp_path, optim)) as run:
        numbers, start = run.program.segments.norm_update, run._run

        def broken(executable, segment, *more):
            if segment == numbers:
                run.arena.vector("grad")[:4] = np.nan
            start(executable, segment, *more)

        monkeypatch.setattr(run, "_run", broken)
        assert all(run.step(step, 0.25).skipped for step in (1, 2, 3))
        monkeypatch.undo()
        run.save(3)
        check_first_update(run)
    with trainer_closed(trainer(words, tmp_path, optim)) as run:
        assert run.resume() == run.state_since == 3
        check_first_update(run)


def check_first_update(run):
    before = {name: np.array(a, np.float32) for name, a in run.params().items()}
    run.step(4, 0.25)
    moved = np.abs(np.concatenate([(a - before[name]).ravel() for name, a in run.params().items()]).astype(float))
    assert np.quantile(moved[moved > 0.01], [0.1, 0.9]) == pytest.approx([0.25, 0.25], rel=2**-7)  # bf16 weights


@pytest.mark.parametrize("optim", [AdamW(), Ema(SGD(0.0))])
def test_a_momentum_that_is_not_read_is_refused(words, tmp_path, optim):
    with trainer_closed(trainer(words, tmp_path, optim)) as run:
        with pytest.raises(hg.HandgradError, match=rf"\[train\] {type(optim).__name__} reads no momentum, but got 0.9"):
            run.step(1, 1e-2, momentum=0.9)


def test_no_step_lies_before_the_state(words, tmp_path):
    """Bias corrections of AdamW would divide by zero, and Adafactor's and Muon's weights would be no numbers."""
    with trainer_closed(trainer(words, tmp_path, AdamW())) as run:
        for step in (1, 2):
            run.step(step, 1e-2)
        run.save(2)
    with trainer_closed(trainer(words, tmp_path, AdamW())) as run:
        run.resume(fresh=True)
        with pytest.raises(hg.HandgradError, match=r"\[train\] step is a number from 3 on, but got 2"):
            run.step(2, 1e-2)
        assert math.isfinite(run.step(3, 1e-2).loss)


@pytest.mark.parametrize("is_guarded", [False, True])
def test_a_loss_beyond_float32_with_finite_gradients_is_skipped_if_the_log_says_so(words, is_guarded, monkeypatch):
    """Without a guard the norm's kernel decides, and it updates: the step must not say otherwise."""
    data = hg.data.tokens(f"{words}/train_*.bin", 8, 32, seed=5)
    execution = hg.Execution(4, backend="cpu", guard=Guard(loss_z=9.0 * is_guarded))
    run = hg.Trainer(hg.models.GPT2(97, 8, 1, 2, 16), AdamW(), data, execution=execution)
    fetch = run.arena.fetch_scalars
    monkeypatch.setattr(run.arena, "fetch_scalars", lambda p: lambda: SimpleNamespace(**fields_of(fetch(p)())))
    before = {name: np.array(a) for name, a in run.params().items()}
    result = run.step(1, 1e-2)
    assert (result.loss, result.skipped) == (math.inf, "loss is inf" if is_guarded else "")
    assert all(np.array_equal(a, before[name]) for name, a in run.params().items()) == is_guarded


def fields_of(scalars):
    """The step scalars that a step reads, with a loss that a regression's square may have."""
    return {"loss_sum": math.inf, "grad_norm": float(scalars.grad_norm), "exposed_ns": int(scalars.exposed_ns)}


class trainer_closed:
    """Closes a trainer at the end of a block, so that the next one may write into its folder."""

    def __init__(self, run):
        self.run = run

    def __enter__(self):
        return self.run

    def __exit__(self, *error):
        self.run.close()


def test_fresh_optimizer_of_a_run_is_in_its_log(words, copied):
    before = checkpoint.load_state(copied / "step_000008", {}, others=True)
    assert len(before) == 0
    c = longer(config(words, copied), 9, fresh_optimizer=True)
    assert train(c, quiet=True) == 0
    assert (8, "the state of adamw starts anew here; the weights are the checkpoint's") in events(copied)
    assert not json.loads((copied / "config.json").read_text())["run"]["fresh_optimizer"]


def test_momentum_is_a_scalar_of_the_step(words, tmp_path, monkeypatch):
    found = []
    step = Trainer.step

    def noted(self, *args):
        result = step(self, *args)
        found.append(float(self.arena.scalars(self.program).momentum))
        return result

    monkeypatch.setattr(Trainer, "step", noted)
    c = config(words, tmp_path / "run", momentum_warmup=4, momentum_cooldown=0.25)
    with pytest.raises(hg.HandgradError, match=r"optimizers whose momentum is scheduled, but got --optimizer adamw"):
        train(c, quiet=True)
    monkeypatch.setattr(AdamW, "scheduled_momentum", 0.95, raising=False)
    assert train(c, quiet=True) == 0
    assert found == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.9, 0.85])
    found.clear()
    assert train(config(words, tmp_path / "constant", steps=1, cooldown=0, warmup=0), quiet=True) == 0
    assert found == [0.95]


def test_another_optimizer_leaves_the_schedule_of_momentum(tmp_path):
    """As the settings of the former optimizer, it is left unless the command gives it."""
    saved = from_names({"optimizer": "muon", "momentum": 0.9, "momentum_warmup": 0.5, "steps": 4})
    write_text(tmp_path / "config.json", json.dumps(asdict(saved)))
    flags = ["--resume", "auto", "--out", str(tmp_path), "--fresh-optimizer", "--optimizer"]
    assert settings([*flags, "adamw"]).optim.momentum_warmup == 0
    assert settings([*flags, "muon"]).optim.momentum_warmup == 0.5
    assert settings([*flags, "adamw", "--momentum-warmup", "0.25"]).optim.momentum_warmup == 0.25  # refused later


ADAMW = {"optimizer": "adamw", "schedule": "cosine", "final": 0.1, "weight_decay": 0.1, "steps": 4}
WSD = ADAMW | {"schedule": "wsd", "cooldown": 0.5}


@pytest.mark.parametrize("of_file", [False, True], ids=["flags", "file"])
@pytest.mark.parametrize(
    "saved, given, wanted",
    [
        (ADAMW, {"optimizer": "lion", "weight_decay": 0.1}, {"weight_decay": 0.1}),
        (ADAMW, {"optimizer": "lion"}, {"weight_decay": None}),
        (ADAMW, {"schedule": "linear", "final": 0.1}, {"final": 0.1}),
        (ADAMW, {"schedule": "linear"}, {"final": None}),
        (ADAMW, {"optimizer": "schedule_free", "schedule": "cosine"}, {"schedule": "cosine"}),
        (WSD, {"schedule": "cosine"}, {"cooldown": None}),
    ],
)
def test_a_setting_that_is_given_stays_whatever_the_former_had(tmp_path, saved, given, wanted, of_file):
    """Settings of the former optimizer or schedule are left, whether flags or a file name the other one; what they give
    is kept, also the value that the former had."""
    write_text(tmp_path / "config.json", json.dumps(asdict(from_names(saved))))
    write_text(tmp_path / "given.json", json.dumps(given))
    flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    more = ["--config", str(tmp_path / "given.json")] if of_file else flags
    found = settings(["--resume", "auto", "--out", str(tmp_path), "--fresh-optimizer", *more]).optim
    assert {name: getattr(found, name) for name in wanted} == wanted
