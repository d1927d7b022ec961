"""A Trainer with a run folder leaves what `handgrad train` leaves: every verb takes the folder."""

import json
import os
import shutil

import pytest

import handgrad as hg
from handgrad import tokenizers
from handgrad.cli.__main__ import main
from handgrad.train.log_file import read_log

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 60


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with shards of a small text and their characters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    hg.data.prepare_text(["text.txt"], "words", tokenizers.chars(TEXT))
    return tmp_path


def trainer(out="run", **kind):
    data = hg.data.tokens("words", seq_len=16, batch_tokens=64)
    model = hg.models.GPT2(vocab_size=len(set(TEXT)), max_seq_len=16, num_layers=1, num_heads=2, hidden_size=32)
    execution = hg.Execution(micro_batch=2, threads=1, backend="cpu")
    return hg.Trainer(model, hg.optim.AdamW(), data, execution=execution, out=out, **kind)


def test_every_verb_takes_the_folder(here, capsys):
    run = trainer()
    val = hg.data.tokens("words", seq_len=16, batch_tokens=16, split="val", shuffle=False)
    results = [run.step(step, 1e-3) for step in range(1, 7)]
    loss = run.evaluate(val)
    run.save(6)
    lines = [line for line in read_log("run/log.jsonl") if "loss" in line]
    assert [(line["step"], line["loss"], line["lr"]) for line in lines] == [
        (r + 1, x.loss, 1e-3) for r, x in enumerate(results)
    ]
    assert read_log("run/log.jsonl")[-1] == {"step": 6, "val_loss": loss}
    assert main("generate run --prompt To --max-tokens 4".split()) == 0
    assert main("report run".split()) == 0 and "val" in (here / "run/report.html").read_text()
    assert main("convert run hf".split()) == 0
    capsys.readouterr()
    assert main("eval run --threads 1".split()) == 0
    assert float(json.loads((here / "run/eval.json").read_text())["step_000006"]["val"]["loss"]) == pytest.approx(
        loss, 1e-3
    )
    assert main("train --resume run --steps 8 --sample-tokens 0".split()) == 2, "the Trainer holds the folder"
    assert "another process is training in 'run'" in capsys.readouterr().err
    run.close()
    assert main("train --resume run --steps 8 --sample-tokens 0".split()) == 0
    assert "from here on the learning rate is that of schedule cosine with its peak at 0.002" in capsys.readouterr().out
    assert [line["step"] for line in read_log("run/log.jsonl") if "loss" in line] == list(range(1, 9))


def test_a_trainer_resumes_its_log_and_refuses_another_run(here):
    first = trainer()
    for step in range(1, 5):
        first.step(step, 1e-3)
        if step == 3:
            first.save(3)
    with pytest.raises(hg.HandgradError, match=r"\[train\] 'run' already holds a run. hint: resume\(\) continues it"):
        trainer().step(1, 1e-3)
    again = trainer()
    assert again.resume() == 3
    again.step(4, 1e-3)
    with pytest.raises(hg.HandgradError, match=r"another Trainer writes into '.*run'. hint: resume\(\)"):
        first.step(5, 1e-3)
    again.save(4)
    assert [line["step"] for line in read_log("run/log.jsonl")] == [1, 2, 3, 4]
    started_over = trainer("other")
    assert started_over.resume() == 0 and started_over.step(1, 1e-3).loss > 0


def test_without_a_folder_nothing_is_written(here):
    before = sorted(here.rglob("*"))
    run = trainer(out=None)
    run.step(1, 1e-3)
    assert sorted(here.rglob("*")) == before


def test_defaults_are_the_command_lines(here):
    """dtype and backend auto, and the sampling of `generate`."""
    from handgrad.backends import best_dtype, resolve_name
    from handgrad.cli.generate import Generate
    from handgrad.infer.load import MAX_TOKENS, Loaded
    from handgrad.train.config import Config

    assert trainer().precision.dtype == best_dtype("cpu")
    assert hg.Execution(1).backend == Config().compute.backend == "auto" and resolve_name("auto") in ("cpu", "cuda")
    assert (
        hg.Execution(1).recompute == Config().compute.recompute and hg.Execution(1).threads == Config().compute.threads
    )
    assert (Generate.max_tokens, Generate.temperature) == (MAX_TOKENS, hg.Sampling().temperature)
    assert (Generate.top_k, Generate.top_p, Generate.seed) == (0, hg.Sampling().top_p, hg.Sampling().seed)
    assert Loaded.generate.__defaults__[1:3] == (Generate.max_tokens, Generate.temperature)


def test_objects_show_themselves(here):
    run = trainer()
    result = run.step(1, 1e-3)
    assert repr(result) == f"Step(loss={result.loss:.4f}, grad_norm={result.grad_norm:.4f})"
    assert repr(run).startswith("Trainer(GPT2(vocab_size=") and ", step 1, " in repr(run)
    run.save(1)
    model = hg.load("run", threads=1)
    assert repr(model).endswith(f"tokenizer chars of {len(set(TEXT))} tokens)")
    assert repr(model.engine).endswith("0 tokens in the cache)")
    assert len(model.generate("To", max_tokens=3)) == 3


def test_reading_a_run_of_the_command_line_leaves_it_as_it_is(here):
    """resume() and evaluate() change nothing; step() keeps the settings that a Trainer does not know."""
    flags = "--train words --num-layers 1 --num-heads 2 --hidden-size 32 --max-seq-len 16 --micro-batch 2 --threads 1"
    flags += " --batch-tokens 64 --steps 6 --save-every 4 --lr 5e-4 --schedule linear --sample-tokens 0 --out run"
    assert main(["train", *flags.split()]) == 0
    shutil.rmtree("run/step_000006")
    log, settings = (here / "run/log.jsonl").read_bytes(), json.loads((here / "run/config.json").read_text())
    run = trainer()
    assert run.resume() == 4
    run.evaluate(hg.data.tokens("words", seq_len=16, batch_tokens=16, split="val", shuffle=False))
    assert (here / "run/log.jsonl").read_bytes() == log
    run.step(5, 1e-3)
    assert [line["step"] for line in read_log("run/log.jsonl") if "loss" in line] == [1, 2, 3, 4, 5]
    kept = json.loads((here / "run/config.json").read_text())
    assert kept["optim"] == settings["optim"] | {"beta2": 0.95} and kept["run"]["steps"] == 6


def test_a_resume_that_fails_opens_no_log(here):
    run = trainer()
    run.step(1, 1e-3)
    run.save(1)
    run.close()
    log = (here / "run/log.jsonl").read_bytes()
    data = hg.data.tokens("words", seq_len=16, batch_tokens=64)
    model = hg.models.GPT2(vocab_size=len(set(TEXT)), max_seq_len=16, num_layers=2, num_heads=2, hidden_size=32)
    other = hg.Trainer(model, hg.optim.AdamW(), data, execution=hg.Execution(2, backend="cpu"), out="run")
    with pytest.raises(hg.HandgradError, match="the checkpoint's model has num_layers 1"):
        other.resume()
    with pytest.raises(hg.HandgradError, match="'run' already holds a run"):
        other.step(1, 1e-3)
    assert (here / "run/log.jsonl").read_bytes() == log


def test_a_trainer_that_has_trained_cannot_start_over(here):
    run = trainer()
    assert run.resume() == 0
    run.step(1, 1e-3)
    with pytest.raises(hg.HandgradError, match="no checkpoint in 'run' to resume from, and this trainer is at step 1"):
        run.resume()


def test_every_step_is_in_the_log_when_it_has_returned(here):
    """A script may end without a save."""
    run = trainer()
    for step in (1, 2, 3):
        run.step(step, 1e-3)
    assert [line["step"] for line in read_log("run/log.jsonl")] == [1, 2, 3]


def test_save_calls_before_done(here):
    run, called = trainer(), []
    run.step(1, 1e-3)
    run.save(1, before_done=lambda: called.append(True))
    assert called == [True]


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_a_folder_of_something_else_is_refused(here, capsys, name):
    (here / "other").mkdir()
    (here / "other" / name).write_text("{}")
    with pytest.raises(hg.HandgradError, match="'other' already holds a run"):
        trainer("other").step(1, 1e-3)
    assert main("train --out other --steps 1".split()) == 2
    assert "already holds a run" in capsys.readouterr().err and os.listdir("other") == [name]


def test_a_folder_called_shakespeare_is_that_folder(here, capsys):
    """hg.data.tokens takes a folder; the command line's word is the text in the package."""
    os.rename("words", "shakespeare")
    data = hg.data.tokens("shakespeare", seq_len=16, batch_tokens=64)
    model = hg.models.GPT2(vocab_size=len(set(TEXT)), max_seq_len=16, num_layers=1, num_heads=2, hidden_size=32)
    run = hg.Trainer(model, hg.optim.AdamW(), data, execution=hg.Execution(2, backend="cpu"), out="run")
    run.step(1, 1e-3)
    run.save(1)
    run.close()
    assert json.loads((here / "run/config.json").read_text())["data"]["train"] == "./shakespeare"
    assert main("eval run --threads 1 --limit 2".split()) == 0 and not (here / "run/data").exists()


def test_a_closed_trainer_goes_on(here):
    run = trainer()
    run.step(1, 1e-3)
    run.close()
    run.step(2, 1e-3)
    assert [line["step"] for line in read_log("run/log.jsonl")] == [1, 2]
